"""Quantised language models that gradients must pass through."""

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on a CPU from packing their weights for inference.

    On CPUs with AVX-512 bf16 a first evaluation without gradients rewrites their weights for a kernel that has no
    backward pass: later gradients would be zero without an error. Weights that were packed before are unpacked.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # bitsandbytes unpacks the weights in place before it saves them
