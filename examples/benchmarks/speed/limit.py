"""The machine's float32 matrix products: the limit that every other figure is held against."""

import torch
from timing import in_turns

from peft_bituning.matmul import fast_cpu_matmul

ROWS, INNER, COLUMNS = 512, 576, 1536  # a feed-forward layer of SmolLM2-135M


def measure(rounds: int = 20) -> tuple[float, float, bool]:
    """Time one matrix product by PyTorch's default kernel and by the probed one.

    Args:
        rounds: how often.

    Returns:
        FLOP/s of the default kernel, of the better of both, and whether the probed kernel is exact here.
    """
    left, right = torch.randn(ROWS, INNER), torch.randn(COLUMNS, INNER)

    def repeated() -> None:
        for _ in range(20):
            torch.nn.functional.linear(left, right)

    def probed() -> None:
        with fast_cpu_matmul():
            repeated()

    with fast_cpu_matmul() as exact:
        pass
    seconds = in_turns({"default": repeated, "probed": probed}, rounds)
    flops = 20 * 2.0 * ROWS * INNER * COLUMNS
    default = flops / min(seconds["default"])
    return default, max(default, flops / min(seconds["probed"])) if exact else default, exact
