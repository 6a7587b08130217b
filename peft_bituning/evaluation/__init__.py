"""Full ranking of held-out targets over the whole catalog."""

from .bootstrap import PairedDifference, paired_bootstrap
from .catalog_ranks import catalog_ranks
from .evaluator import HistoryScorer, RankingReport, evaluate_ranking, history_scorer, rank_batches

__all__ = [
    "HistoryScorer",
    "PairedDifference",
    "RankingReport",
    "catalog_ranks",
    "evaluate_ranking",
    "history_scorer",
    "paired_bootstrap",
    "rank_batches",
]
