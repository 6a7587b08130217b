"""Full ranking of held-out targets over the whole catalog."""

from .catalog_ranks import catalog_ranks
from .encoded_users import EncodedUsers
from .evaluator import (
    SEEN_ITEMS,
    HistoryScorer,
    RankingReport,
    evaluate_ranking,
    history_scorer,
    rank_batches,
    rank_users,
)
from .groups import user_groups

__all__ = [
    "SEEN_ITEMS",
    "EncodedUsers",
    "HistoryScorer",
    "RankingReport",
    "catalog_ranks",
    "evaluate_ranking",
    "history_scorer",
    "rank_batches",
    "rank_users",
    "user_groups",
]
