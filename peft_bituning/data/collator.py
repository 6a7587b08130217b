"""From histories to tensors: padded token ids and padded item indices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .prompts import PromptEncoder


class HistoryBatch(NamedTuple):
    """A batch of histories.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T].
        item_indices: catalog indices, 0 at padding [B, N].
        item_mask: [B, N] bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    item_indices: Tensor
    item_mask: Tensor

    def to(self, device: torch.device | str) -> "HistoryBatch":
        """Return the batch on another device."""
        return HistoryBatch(*(tensor.to(device) for tensor in self))


class HistoryCollator:
    """Renders and pads histories.

    Args:
        prompts: turns a history into token ids.
        pad_token_id: what fills the end of shorter rows.
        max_items: N at most, the newest items of a history that the recommender reads.
    """

    def __init__(self, prompts: PromptEncoder, pad_token_id: int, max_items: int) -> None:
        self.prompts = prompts
        self.pad_token_id = pad_token_id
        self.max_items = max_items

    def length(self, history: Sequence[int], kind: str = "user") -> int:
        """Return T of a history's own row, tokens."""
        return self.prompts.length(history, kind)

    def __call__(
        self,
        histories: Sequence[Sequence[int]],
        kind: str = "user",
        collaborative_histories: Sequence[Sequence[int]] | None = None,
    ) -> HistoryBatch:
        """Make a batch.

        Args:
            histories: catalog indices in time order, one sequence a row; an empty one is a cold start.
            kind: `user`, or `item` for one-item histories that stand for an item.
            collaborative_histories: what the recommender reads, one a row; None is the histories themselves.

        Returns:
            The batch on the CPU, padded at the right.
        """
        ids = [self.prompts.encode(history, kind) for history in histories]
        items = [list(history)[-self.max_items :] for history in collaborative_histories or histories]
        width, count = max(1, *map(len, ids)), max(1, *map(len, items))
        return HistoryBatch(
            _pad(ids, width, self.pad_token_id),
            _pad([[1] * len(row) for row in ids], width, 0),
            _pad(items, count, 0),
            _pad([[1] * len(row) for row in items], count, 0).bool(),
        )


def _pad(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)
