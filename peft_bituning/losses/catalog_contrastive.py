"""The item-item contrastive loss against the whole catalog."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError


def catalog_contrastive_loss(
    user_embeddings: Tensor,
    item_table: Tensor,
    targets: Tensor,
    temperature: float = 0.05,
    chunk_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the cosine similarities between users and every item of the catalog.

    `L = -log( exp(cos(h_u, h_t) / tau) / sum_i exp(cos(h_u, h_i) / tau) )`, the mean over rows (paper Eq. 8).

    Args:
        user_embeddings: `h_u` [B, D], any float dtype; computed in at least float32.
        item_table: `h_i` [I, D]; takes no gradient.
        targets: catalog index of each row's next item [B].
        temperature: tau, > 0, without unit.
        chunk_size: items a chunk; None takes the whole table at once, a number keeps only `[B, chunk_size]`
            similarities in memory and computes them again in the backward pass.
        reduction: `mean` for a scalar, `none` for [B].

    Returns:
        A scalar, or [B] under `reduction="none"`.

    Raises:
        InputError: shapes that do not fit, a target outside the catalog, or a temperature that is not positive.
    """
    _check(user_embeddings, item_table, targets, temperature, chunk_size, reduction)
    dtype = torch.promote_types(torch.promote_types(user_embeddings.dtype, item_table.dtype), torch.float32)
    users = F.normalize(user_embeddings.to(dtype), dim=-1)  # [B, D]
    table = item_table.detach()
    if chunk_size is None or chunk_size >= table.shape[0]:
        logits = users @ F.normalize(table.to(dtype), dim=-1).T / temperature  # [B, I]
        return F.cross_entropy(logits, targets, reduction=reduction)

    def log_sum(users: Tensor, chunk: Tensor) -> Tensor:
        return torch.logsumexp(users @ F.normalize(chunk.to(dtype), dim=-1).T / temperature, dim=-1)  # [B]

    sums = [checkpoint(log_sum, users, chunk, use_reentrant=False) for chunk in table.split(chunk_size)]
    positives = F.normalize(table[targets].to(dtype), dim=-1)  # [B, D]
    losses = torch.logsumexp(torch.stack(sums), dim=0) - (users * positives).sum(-1) / temperature
    return losses.mean() if reduction == "mean" else losses


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
    if (
        targets.device.type == "cpu"
        and targets.numel()
        and not 0 <= int(targets.min()) <= int(targets.max()) < len(table)
    ):
        raise InputError(
            f"targets must be catalog indices in [0, {len(table)}), got {int(targets.min())}..{int(targets.max())}"
        )
