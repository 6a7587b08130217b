"""What an iLoRA model returns."""

from dataclasses import dataclass

from torch import Tensor

from ..bituning import BiTuningOutput


@dataclass
class ILoRAOutput(BiTuningOutput):
    """The output of `ILoRAModel.forward`: that of a Bi-Tuning model, and the gates.

    `router_logits` and `aux_loss` are None: every expert works for every row, so there is no load to balance.

    Args:
        gates: each row's weights of the experts [B, K]; they add up to 1.
    """

    gates: Tensor | None = None
