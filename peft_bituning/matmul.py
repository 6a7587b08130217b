"""The CPU matrix product behind every step: a probed switch to a faster float32 kernel."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5


@contextmanager
def fast_cpu_matmul(enabled: bool = True) -> Iterator[bool]:
    """Let oneDNN choose its own float32 kernel while inside, where that stays a true float32 product.

    On some CPUs the switch selects a faster kernel with full precision, on others it computes in bfloat16: a
    process's first use measures one product, and the switch is kept only where its relative error is below 1e-5. The
    former setting is restored on leaving. What is given says whether the switch is on.
    """
    backend = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    if not enabled or backend is None or not hasattr(backend, "fp32_precision"):
        yield False
        return
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        error = _relative_error()
        if error > TOLERANCE:
            backend.fp32_precision = before
            logger.info("fast CPU matmul is off: its relative error here is %.1e", error)
        yield error <= TOLERANCE
    finally:
        backend.fp32_precision = before


@functools.cache
def _relative_error() -> float:
    """Measure one product with the switch on, as it is when this is called."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 576, generator=generator)
    right = torch.randn(512, 576, generator=generator)
    exact = (left.double() @ right.double().T).float()
    return float((torch.nn.functional.linear(left, right) - exact).norm() / exact.norm())
