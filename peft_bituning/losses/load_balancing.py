"""The load-balancing loss of the query experts."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def load_balancing_loss(router_logits: Tensor, mask: Tensor, scope: str = "batch", reduce: bool = False) -> Tensor:
    """Penalise experts that take more than their share of the items.

    `L = K * sum_j f_j P_j`, where `f_j` is the share of items whose best expert is j and `P_j` the mean router
    probability of expert j (paper Eqs. 9-11). It is 1 where the load is even and K where one expert takes all.

    Args:
        router_logits: `m(u)` [B, N, K], before the softmax.
        mask: which items are real [B, N], int or bool; rows without any real item do not count.
        scope: `batch` takes f and P over all items of the batch, as GShard and Switch do; `row` is the paper's
            equation as printed, a loss for each row, averaged over rows.
        reduce: with `batch`, take f and P over the batches of all processes; every process must call it.

    Returns:
        A scalar, differentiable through P; 0 where no item is real.

    Raises:
        InputError: shapes that do not fit, or an unknown scope.
    """
    if router_logits.ndim != 3 or mask.shape != router_logits.shape[:2]:
        raise InputError(
            "router_logits and mask must be [B, N, K] and [B, N], got "
            f"{list(router_logits.shape)} and {list(mask.shape)}"
        )
    if scope not in ("batch", "row"):
        raise InputError(f"scope must be 'batch' or 'row', got {scope!r}")
    num_experts = router_logits.shape[-1]
    real = mask.bool().unsqueeze(-1)  # [B, N, 1]
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)).masked_fill(~real, 0.0)
    probabilities = logits.softmax(-1) * real  # [B, N, K]
    chosen = (F.one_hot(logits.argmax(-1), num_experts) * real).to(logits.dtype)  # [B, N, K]
    over = 1 if scope == "row" else (0, 1)
    chosen_sum, probability_sum = chosen.sum(over), probabilities.sum(over)  # [B, K] or [K]
    items = real.sum(over).to(probabilities.dtype)  # [B, 1] or [1]
    if scope == "batch" and reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # The gradient of this all-reduce sums over processes too, which makes the mean that DDP takes exact.
        from torch.distributed.nn.functional import all_reduce

        probability_sum = all_reduce(probability_sum)
        counts = torch.cat([chosen_sum, items])
        dist.all_reduce(counts)
        chosen_sum, items = counts[:-1], counts[-1:]
    items = items.clamp(min=1)
    losses = num_experts * ((chosen_sum / items) * (probability_sum / items)).sum(-1)  # [B] or a scalar
    return losses.sum() / real.any(1).sum().clamp(min=1) if scope == "row" else losses
