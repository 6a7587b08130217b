"""The item-item contrastive loss against the whole catalog."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError

LARGEST_PRODUCT = 100_000_000  # B x I; above it the similarities are made in chunks
CHUNK_SIZE = 8192


def catalog_contrastive_loss(
    user_embeddings: Tensor,
    item_table: Tensor,
    targets: Tensor,
    temperature: float = 0.05,
    chunk_size: int | None = None,
    reduction: str = "mean",
    is_normalized: bool = False,
) -> Tensor:
    """Cross-entropy of the cosine similarities between users and every item of the catalog.

    `L = -log( exp(cos(h_u, h_t) / tau) / sum_i exp(cos(h_u, h_i) / tau) )`, the mean over rows (paper Eq. 8).

    Args:
        user_embeddings: `h_u` [B, D], any float dtype; computed in at least float32.
        item_table: `h_i` [I, D]; takes no gradient.
        targets: catalog index of each row's next item [B].
        temperature: tau, > 0, without unit.
        chunk_size: items per chunk; only `[B, chunk_size]` similarities are in memory, and the gradient is made in the
            same pass. None takes the whole table at once up to 1e8 similarities, and chunks of 8,192 above.
        reduction: `mean` for a scalar, `none` for [B].
        is_normalized: the rows of `item_table` have length 1 already.

    Returns:
        A scalar, or [B] under `reduction="none"`.

    Raises:
        InputError: shapes that do not fit, a target outside the catalog, or a temperature that is not positive.
    """
    _check(user_embeddings, item_table, targets, temperature, chunk_size, reduction)
    dtype = torch.promote_types(torch.promote_types(user_embeddings.dtype, item_table.dtype), torch.float32)
    users = F.normalize(user_embeddings.to(dtype), dim=-1)  # [B, D]
    table = item_table.detach()
    if chunk_size is None and len(users) * len(table) > LARGEST_PRODUCT:
        chunk_size = CHUNK_SIZE
    if chunk_size is None or chunk_size >= len(table):
        logits = users @ _unit(table, dtype, is_normalized).T / temperature  # [B, I]
        return F.cross_entropy(logits, targets, reduction=reduction)
    losses = _ChunkedCrossEntropy.apply(users, table, targets, temperature, chunk_size, is_normalized)
    return losses.mean() if reduction == "mean" else losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy by online softmax: sums over chunks are rescaled whenever a larger logit is met."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, table: Tensor, targets: Tensor, temperature: float, chunk_size: int, is_unit: bool
    ) -> Tensor:
        largest = users.new_full((len(users),), float("-inf"))
        total = torch.zeros_like(largest)
        weighted = torch.zeros_like(users) if ctx.needs_input_grad[0] else None  # sum_i exp(logit_i - largest) h_i
        for rows in table.split(chunk_size):
            chunk = _unit(rows, users.dtype, is_unit)
            logits = (users @ chunk.T).div_(temperature)  # [B, chunk_size]
            top = torch.maximum(largest, logits.amax(1))
            scale = torch.exp(largest - top)
            weights = logits.sub_(top.unsqueeze(1)).exp_()
            total = total.mul_(scale).add_(weights.sum(1))
            if weighted is not None:
                weighted.mul_(scale.unsqueeze(1)).addmm_(weights, chunk)
            largest = top
        positives = _unit(table[targets], users.dtype, is_unit)  # [B, D]
        if weighted is not None:
            ctx.save_for_backward(weighted.div_(total.unsqueeze(1)).sub_(positives).div_(temperature))
        return largest + total.log() - (users * positives).sum(1) / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradients[0].unsqueeze(1) * gradient, None, None, None, None, None


def _unit(rows: Tensor, dtype: torch.dtype, is_normalized: bool) -> Tensor:
    return rows.to(dtype) if is_normalized else F.normalize(rows.to(dtype), dim=-1)


def _check(
    users: Tensor, table: Tensor, targets: Tensor, temperature: float, chunk_size: int | None, reduction: str
) -> None:
    if users.ndim != 2 or table.ndim != 2 or users.shape[1] != table.shape[1]:
        raise InputError(
            "user_embeddings and item_table must be [B, D] and [I, D] with one D, got "
            f"{list(users.shape)} and {list(table.shape)}"
        )
    if targets.shape != users.shape[:1]:
        raise InputError(f"targets must be [B] = [{users.shape[0]}], got {list(targets.shape)}")
    if not temperature > 0:
        raise InputError(f"temperature must be > 0, got {temperature!r}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be >= 1 or None, got {chunk_size!r}")
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(each) for each in targets.aminmax())
        if not 0 <= low <= high < len(table):
            raise InputError(f"targets must be catalog indices in [0, {len(table)}), got {low}..{high}")
