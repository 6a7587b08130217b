"""Batches of histories as tensors: padded token ids and padded item indices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .prompts import PromptEncoder


class HistoryBatch(NamedTuple):
    """A batch of histories: the prompts' tokens, and the catalog indices that a recommender reads."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    item_indices: Tensor  # [B, N], 0 at padding
    item_mask: Tensor  # [B, N] bool

    def to(self, device: torch.device | str) -> "HistoryBatch":
        """Return the batch on another device."""
        return HistoryBatch(*(tensor.to(device) for tensor in self))


class HistoryCollator:
    """Renders and pads histories; a recommender reads the newest `max_items` (N at most) of each."""

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
        """Make a batch of B histories, on the CPU and padded at the right; an empty one is a cold start.

        The kind is `item` for one-item histories that stand for an item. The recommender reads the histories
        themselves, unless there are other ones for it.
        """
        prompts = [self.prompts.encode(history, kind) for history in histories]
        input_ids, token_mask = pad_histories(prompts, value=self.pad_token_id)
        item_indices, item_mask = pad_histories(collaborative_histories or histories, self.max_items)
        return HistoryBatch(input_ids, token_mask.long(), item_indices, item_mask)


def pad_histories(
    histories: Sequence[Sequence[int]], max_length: int | None = None, value: int = 0
) -> tuple[Tensor, Tensor]:
    """Put histories, of catalog indices or tokens, into one tensor, padded at the right.

    Args:
        histories: B histories, oldest first; an empty one gives a masked row.
        max_length: Keep only the last so many of each.
        value: What fills the end of shorter rows.

    Returns:
        `[B, N]` int64 and its `[B, N]` bool mask, N at least 1.
    """
    rows = [list(row) if max_length is None else list(row)[-max_length:] for row in histories]
    width = max([1, *map(len, rows)])
    padded = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return padded.reshape(len(rows), width), torch.arange(width) < lengths[:, None]
