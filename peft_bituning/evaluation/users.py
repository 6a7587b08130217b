"""Full ranking with the model at hand, on all processes together."""

from collections.abc import Sequence

import numpy as np
import torch

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..data.samples import Sample
from .catalog_ranks import catalog_ranks
from .evaluator import RankingReport, rank_batches

USERS_A_PASS = 1024


def rank_users(
    encoder: HistoryEncoder,
    samples: Sequence[Sample],
    table: ItemTable,
    progress: bool = False,
    description: str = "evaluating",
    swap_collaborative: bool = False,
) -> RankingReport:
    """Rank the whole catalog for users; every process must call it, and all get the same report.

    Args:
        encoder: Holds the weights to rank with.
        samples: One row per user.
        table: The item table.
        progress: Show a progress bar.
        description: Its label.
        swap_collaborative: Give every user the collaborative embeddings of another, to see what they matter.
    """
    table = table.to(encoder.device)
    generator = torch.Generator().manual_seed(0)

    def rank(batch: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        histories = [sample.history for sample in batch]
        others = None
        if swap_collaborative:
            # Rolled along a random cycle: nobody keeps their own.
            cycle = torch.randperm(len(batch), generator=generator).tolist()
            other_of = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
            others = [histories[other_of[row]] for row in range(len(batch))]
        users = encoder.encode(histories, "user", True, progress, description, others)
        return catalog_ranks(users.to(encoder.device), table, [sample.target for sample in batch], histories)

    return rank_batches(rank, samples, batch_size=USERS_A_PASS)
