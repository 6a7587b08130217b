"""The kind of LoRA that an adapted layer runs."""

from typing import Any, NoReturn

from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor

from ...errors import UnsupportedOperationError
from .row_gates import RowGates

NO_MERGING = (
    "iLoRA experts cannot be merged into the base model: their weights differ from row to row; keep the adapter beside "
    "the model"
)
# Quantised layers of PEFT that run a variant, by name: their libraries need not be installed.
QUANTISED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")


def can_be_gated(layer: LoraLayer) -> bool:
    """Say whether a LoRA layer of PEFT runs variants on low-rank states: a linear one, quantised ones among them."""
    return isinstance(layer, Linear) or type(layer).__name__ in QUANTISED


class GatedVariant(LoraVariant):
    """`y = W0 x + (alpha / (r / K)) sum_k g_k B_k A_k x`: plain LoRA with the output of `lora_A` scaled by row.

    Args:
        row_gates: where the gates of the rows are found.
        num_experts: K.
    """

    def __init__(self, row_gates: RowGates, num_experts: int) -> None:
        self.row_gates = row_gates
        self.num_experts = num_experts

    def supports_lora_conversion(self) -> bool:
        """No: one plain LoRA cannot do what differs by row."""
        return False

    def forward(  # type: ignore[override]  # PEFT's are static, as they keep nothing
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the experts' part to a layer's result [B, ..., out] for its input [B, ..., in]."""
        states = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # [B, ..., r]
        states = self.row_gates.scale(states)
        return result + module.lora_B[active_adapter](states) * (module.scaling[active_adapter] * self.num_experts)

    def init(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Nothing: the layer's own weights are all there is."""

    def merge_safe(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """Refuse, and so do the others: the weights differ by row."""
        raise UnsupportedOperationError(NO_MERGING)

    merge_unsafe = unmerge = merge_safe  # type: ignore[assignment]
