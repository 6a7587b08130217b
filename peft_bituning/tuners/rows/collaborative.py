"""Collaborative inputs of a batch: checked, padding made inert, rows without any filled in."""

import torch
from torch import Tensor

from ...errors import InputError


def check_collaborative(
    reader: str, width: int, dtype: torch.dtype, batch_size: int, embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check what a frozen recommender says of a batch of B rows and make padding inert.

    Args:
        reader: who reads it, for messages.
        width: C.
        dtype: the reader's type.
        batch_size: B.
        embeds: `C_u` [B, N, C]; padding may hold anything, NaN too.
        mask: which items are real [B, N], int or bool; None means all of them.

    Returns:
        `C_u` in the reader's type, zero at padding, and the mask as bool.

    Raises:
        InputError: they are missing, of the wrong shape, or not finite.
    """
    if embeds is None:
        raise InputError(
            f"collaborative_embeds must be given to {reader}, got None; pass the recommender's embeddings "
            f"[B, N, {width}], and a collaborative_mask of zeros for rows that have none"
        )
    if embeds.ndim != 3 or embeds.shape[0] != batch_size or embeds.shape[2] != width:
        raise InputError(
            f"collaborative_embeds must be [B, N, C] = [{batch_size}, N, {width}], got {list(embeds.shape)}; "
            "pass those of the recommender that the adapter was made for, or set collaborative_dim to its embedding_dim"
        )
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if mask.shape != embeds.shape[:2]:
        raise InputError(
            f"collaborative_mask must be [B, N] = {list(embeds.shape[:2])}, got {list(mask.shape)}; give one value per "
            "item of collaborative_embeds, 0 at padding"
        )
    if embeds.shape[1] == 0:
        embeds, mask = embeds.new_zeros(batch_size, 1, width), mask.new_zeros(batch_size, 1)
    mask = mask.bool()
    embeds = embeds.to(dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(embeds).all()):
        rows = torch.nonzero(~torch.isfinite(embeds).flatten(1).all(1)).flatten().tolist()
        raise InputError(
            f"collaborative_embeds must be finite at real items, got NaN or infinity in rows {rows[:10]}; check the "
            "recommender they come from"
        )
    return embeds, mask


def drop_rows(mask: Tensor, rate: float) -> Tensor:
    """Hide all items of a share of the rows, by their mask [B, N] bool, so that the reader learns to do without."""
    return mask if rate == 0.0 else mask & (torch.rand(mask.shape[0], 1, device=mask.device) >= rate)


def fill_cold_rows(embeds: Tensor, mask: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Give rows of `C_u` [B, N, C] without any item in their mask [B, N] bool `null` [C] as their only one."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0  # [N]
    slot = ~mask.any(1, keepdim=True) & first  # [B, N]
    return torch.where(slot.unsqueeze(-1), null, embeds), mask | slot


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average values [B, N, X] over the real items of each row, of which it has at least one: [B, X]."""
    weights = mask.unsqueeze(-1).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1)
