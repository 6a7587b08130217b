"""The contrastive loss over the whole table, forward and backward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Row, in_turns, print_table, relative
from torch import Tensor

from peft_bituning.losses import catalog_contrastive_loss

WIDTH, ROWS, TEMPERATURE = 576, 8, 0.05


def run(limit: float, items: int, rounds: int) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        items: I.
        rounds: how often each way is timed.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(items, WIDTH, generator=generator)
    unit = F.normalize(table, dim=-1)
    users = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(0, items, (ROWS,), generator=generator)
    gradients: dict[str, Tensor] = {}

    def way(name: str, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            (gradients[name],) = torch.autograd.grad(loss(), users)

        return step

    def textbook() -> Tensor:
        return F.cross_entropy(F.normalize(users, dim=-1) @ F.normalize(table, dim=-1).T / TEMPERATURE, targets)

    def normalized_once() -> Tensor:
        return catalog_contrastive_loss(users, unit, targets, TEMPERATURE, items, is_normalized=True)

    def ours() -> Tensor:
        return catalog_contrastive_loss(users, unit, targets, TEMPERATURE, is_normalized=True)

    def chunked() -> Tensor:
        return catalog_contrastive_loss(users, unit, targets, TEMPERATURE, 8192, is_normalized=True)

    names = {
        "textbook: table normalised every step": textbook,
        "table normalised once, whole": normalized_once,
        "table normalised once, chunks of 8,192": chunked,
        "ours (chooses by B x I)": ours,
    }
    seconds = in_turns({name: way(name, loss) for name, loss in names.items()}, rounds)
    exact = gradients["textbook: table normalised every step"]
    flops = 2 * 2.0 * ROWS * items * WIDTH  # similarities, and their weighted sum of items
    rows = [Row(name, taken, flops, f"gradient {relative(gradients[name], exact)}") for name, taken in seconds.items()]
    print_table(f"loss: {ROWS} users, {items:,} items of width {WIDTH}, forward and backward", rows, limit)
