"""The contrastive loss over the whole table, forward and backward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Row, in_turns, print_table, relative
from torch import Tensor

from peft_bituning.losses import catalog_contrastive_loss

WIDTH, ROWS, TEMPERATURE = 576, 8, 0.05


TEXTBOOK = "textbook: table normalised every step"
WAYS = (
    TEXTBOOK,
    "table normalised once, whole",
    "table normalised once, chunks of 8,192",
    "ours (chooses by B x I)",
)


class Losses:
    """The ways to compute the loss and its gradient.

    Args:
        items: I.
        rows: B.
    """

    def __init__(self, items: int, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(items, WIDTH, generator=generator)
        self.unit = F.normalize(self.table, dim=-1)
        self.users = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
        self.targets = torch.randint(0, items, (rows,), generator=generator)
        self.gradients: dict[str, Tensor] = {}

    def build(self, name: str) -> Callable[[], None]:
        """Return one of `WAYS`; calling it keeps the gradient."""
        chunks = {"table normalised once, whole": len(self.table), "table normalised once, chunks of 8,192": 8192}

        def loss() -> Tensor:
            if name == TEXTBOOK:
                scores = F.normalize(self.users, dim=-1) @ F.normalize(self.table, dim=-1).T
                return F.cross_entropy(scores / TEMPERATURE, self.targets)
            return catalog_contrastive_loss(
                self.users, self.unit, self.targets, TEMPERATURE, chunks.get(name), is_normalized=True
            )

        def way() -> None:
            (self.gradients[name],) = torch.autograd.grad(loss(), self.users)

        return way


def run(limit: float, items: int, rounds: int) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        items: I.
        rounds: how often each way is timed.
    """
    losses = Losses(items)
    seconds = in_turns({name: losses.build(name) for name in WAYS}, rounds)
    exact = losses.gradients[TEXTBOOK]
    flops = 2 * 2.0 * ROWS * items * WIDTH  # similarities, and their weighted sum of items
    rows = [
        Row(name, taken, flops, f"gradient {relative(losses.gradients[name], exact)}")
        for name, taken in seconds.items()
    ]
    print_table(f"loss: {ROWS} users, {items:,} items of width {WIDTH}, forward and backward", rows, limit)
