"""Full ranking of held-out targets over the whole catalog."""

from .evaluator import RankingReport, evaluate_ranking, history_scorer

__all__ = ["RankingReport", "evaluate_ranking", "history_scorer"]
