"""Frozen ID-based recommenders as such: states of a history, scores of the catalog, a hash, a folder.

Shapes: `B` rows, `N` history length, `L` real items of the longest row, `C` collaborative width, `I` catalog items.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import sha256_of_tensors
from ..errors import InputError

MEASURED_ITEMS = 4096


class IDRecommender(nn.Module):
    """A recommender that knows items by their catalog index only.

    A subclass names its kind in `recommender_type`, sets `num_items` (I), `embedding_dim` (C) and `max_length` (of a
    longer history the last `max_length` items count), and gives `item_weights`, `_encode_packed`, `queries`,
    `essentials`, `save_pretrained` and `from_pretrained`. The layout of a history (padding side, holes, new items,
    length) is handled here, so that it can make no difference to the result.
    """

    recommender_type: str = ""
    num_items: int
    embedding_dim: int
    max_length: int
    untrained_items: Collection[int] = ()  # read as new items are
    _scale: float | None = None
    # Writes `config.json` and `model.safetensors`; only declared, so that `PreTrainedModel`'s own is not hidden.
    save_pretrained: Any

    @property
    def item_weights(self) -> Tensor:
        """Vectors that items are scored by `[I, C]`."""
        raise NotImplementedError

    def essentials(self) -> dict[str, Any]:
        """Return the settings that decide what the weights compute, as JSON values."""
        raise NotImplementedError

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the items' scores `[I]`, or None."""
        return None

    def queries(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the vectors `[B, C]` whose products with `item_weights` score the items; arguments as `encode`."""
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Score every catalog item as the next one, `q . w_i + b_i`: `[B, N]` indices and mask -> `[B, I]` float32."""
        scores = self.queries(item_indices, mask) @ self.item_weights.float().T
        return scores if self.output_bias is None else scores + self.output_bias

    def _encode_packed(self, item_indices: Tensor, lengths: Tensor) -> Tensor:
        """Encode histories that begin at column 0: `[B, L]` indices, `[B]` lengths >= 1 -> `[B, L, C]`."""
        raise NotImplementedError

    def encoded_mask(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Tell which positions `encode` gives a state to.

        Masked positions, items outside the catalog (new ones), and all but the last `max_length` items are left out.
        Arguments are those of `encode`, and the mask is `[B, N]` bool.
        """
        if item_indices.ndim != 2 or mask.shape != item_indices.shape:
            raise InputError(
                "item_indices and mask must both have shape [rows, history length], "
                f"got {list(item_indices.shape)} and {list(mask.shape)}"
            )
        if item_indices.dtype.is_floating_point or item_indices.dtype == torch.bool:
            raise InputError(f"item_indices must be integers (catalog indices), got {item_indices.dtype}")
        real = mask.bool() & (item_indices >= 0) & (item_indices < self.num_items)
        if self.untrained_items:
            real &= ~torch.isin(item_indices, torch.tensor(list(self.untrained_items), device=item_indices.device))
        from_the_end = real.flip(1).cumsum(1).flip(1)  # 1 at the last real item
        return real & (from_the_end <= self.max_length)

    def encode(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states over each history, frozen: evaluation mode, no gradient.

        Padding is inert whatever it holds and wherever it stands; see `encoded_mask` for the positions that get a
        state, all others are zero.

        Args:
            item_indices: `[B, N]` catalog indices, oldest first.
            mask: `[B, N]`, true or 1 at real items.

        Returns:
            `[B, N, C]` float32 states in the caller's layout.

        Raises:
            InputError: Shapes or types do not fit, or a state is not finite (the rows are named).
        """
        return self.read(item_indices, mask)[0]

    def encode_items(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the vector that each item is scored by, whatever stands around it; arguments and shapes as `encode`.

        `v_i = s w_i` over `item_weights` w, with one s for all, so that vectors are on average as long as the states
        of one-item histories are. A state tells what follows a history, w_i tells what item i itself is.
        """
        return self.read(item_indices, mask, by_embedding=True)[0]

    @torch.no_grad()
    def read(self, item_indices: Tensor, mask: Tensor, by_embedding: bool = False) -> tuple[Tensor, Tensor]:
        """Return what `encode`, or by embedding `encode_items`, gives [B, N, C], and `encoded_mask` [B, N] with it."""
        encoded = self.encoded_mask(item_indices, mask)
        states = torch.zeros(*item_indices.shape, self.embedding_dim, device=item_indices.device)
        rows = encoded.any(1).nonzero()[:, 0]  # rows with at least one item
        if not len(rows):
            return states, encoded
        if by_embedding:
            states[encoded] = self._item_scale() * self.item_weights[item_indices[encoded]].float()
            return states, encoded
        packed, lengths = pack_histories(item_indices[rows], encoded[rows])
        with evaluation_mode(self):
            packed_states = self._encode_packed(packed, lengths).float()
        states[encoded] = packed_states[mask_of_lengths(lengths, packed.shape[1])]  # row by row, oldest first
        bad = (~states.isfinite()).flatten(1).any(1).nonzero()[:, 0]
        if len(bad):
            raise InputError(
                f"collaborative embeddings must be finite, got NaN or infinity in {len(bad)} of {len(states)} rows, "
                f"first in rows {bad[:5].tolist()}; check the weights of the {self.recommender_type} recommender"
            )
        return states, encoded

    def _item_scale(self) -> float:
        """Return s, from items all over the catalog; remembered, as the weights are frozen."""
        if self._scale is None:
            weights = self.item_weights
            step = -(-self.num_items // MEASURED_ITEMS)
            items = torch.arange(0, self.num_items, step, device=weights.device)[:, None]
            states = self.encode(items, torch.ones_like(items))
            length = float(weights[items[:, 0]].float().norm(dim=-1).mean())
            self._scale = float(states.norm(dim=-1).mean()) / max(length, torch.finfo(torch.float32).tiny)
        return self._scale

    def content_hash(self) -> str:
        """Return the sha256 (hex) over the essential settings and every tensor's name, shape, type and bytes."""
        start = json.dumps({"recommender_type": self.recommender_type, **self.essentials()}, sort_keys=True)
        return sha256_of_tensors(self.state_dict(), "\n{name} {shape} {dtype}\n", start)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, then put the model back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def mask_of_lengths(lengths: Tensor, width: int) -> Tensor:
    """Return `[B, width]` bool, true before each row's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def pack_histories(item_indices: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real items of each row to its start, order kept.

    Args:
        item_indices: `[B, N]` integers.
        mask: `[B, N]` bool.

    Returns:
        `[B, L]` indices with zeros after each row's end (L = the longest row's length), and `[B]` lengths.
    """
    lengths = mask.sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    order = torch.argsort(~mask, dim=1, stable=True)[:, :longest]
    return item_indices.gather(1, order).masked_fill(~mask_of_lengths(lengths, longest), 0), lengths
