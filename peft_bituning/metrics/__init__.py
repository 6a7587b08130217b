"""Ranking metrics over the whole catalog, and the same ones as `evaluate` modules."""

from .modules import load, path
from .ranking import ranking_metrics, standard_errors, target_ranks, user_gains

__all__ = ["load", "path", "ranking_metrics", "standard_errors", "target_ranks", "user_gains"]
