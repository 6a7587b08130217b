"""Ranking metrics over the whole catalog, and the same ones as an `evaluate` module."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ranking import ranking_metrics, standard_errors, target_ranks, user_gains

if TYPE_CHECKING:
    from evaluate import Metric

__all__ = ["load", "path", "ranking_metrics", "standard_errors", "target_ranks", "user_gains"]


def path() -> str:
    """Return the absolute path of this package's `evaluate` module, a script, as `evaluate.load` takes it."""
    return str(Path(__file__).resolve().with_name("full_ranking.py"))


def load(**arguments: Any) -> "Metric":
    """Load this package's `evaluate` module from its installed script; no network is used.

    `load().compute(predictions=scores, references=targets, k=10, seen=None)` gives
    `{"recall@10": .., "ndcg@10": .., "mrr": ..}`. The arguments are those of `evaluate.load`, such as `num_process`.
    """
    import evaluate  # here, because it takes a second to import

    return evaluate.load(path(), **arguments)
