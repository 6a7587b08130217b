"""The iLoRA tuner: LoRA whose experts every row weighs for itself, under the interface of a Bi-Tuning model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ..adapter_file import adapter_keys, under_this_base
from ..embedding_tuner import Collaborative, EmbeddingTuner, Text
from ..rows.embedding_model import BiTuningOutput
from ..rows.packed_batch import PackedBatch, left_padded_prompt
from ..vocabulary import embedding_scale, make_suffix
from .config import ILoRAConfig
from .gate import InstanceGate
from .layer import InstanceGates, without_head
from .row_gates import RowsOnTheWay
from .variant import GatedVariant, can_be_gated


@dataclass
class ILoRAOutput(BiTuningOutput):
    """The output of `ILoRAModel.forward`: that of a Bi-Tuning model, and the gates.

    `router_logits` and `aux_loss` are None: every expert works for every row, so there is no load to balance.

    Args:
        gates: each row's weights of the experts [B, K]; they add up to 1.
    """

    gates: Tensor | None = None


class ILoRAModel(EmbeddingTuner, LoraModel):
    """A causal language model with LoRA experts, weighed for each row by what a frozen recommender says of it.

    Made by `peft.get_peft_model(model, ILoRAConfig(...))`; the model's weights are frozen. `generate` returns the
    prompt, its padding on the left, and the new tokens; the new tokens alone for `inputs_embeds`.

    Its arguments are those of `EmbeddingTuner`.

    References:
        Kong et al., Customizing Language Models with Instance-wise LoRA for Sequential Recommendation, 2024,
        https://arxiv.org/abs/2408.10159
    """

    prefix = "ilora_"
    method = "iLoRA"
    config_cls = ILoRAConfig
    layer_cls = InstanceGates
    file_parts = (*LoraLayer.adapter_layer_names, *InstanceGates.adapter_layer_names)
    one_each = "a row has one gate and one embedding"
    no_weighting = "iLoRA adapters cannot be combined into a weighted one: each adapter's experts follow its own gate"
    num_virtual_tokens = 0
    needs_collaborative = True
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]  # LoRA's layers and the one of the gates

    # ------------------------------------------------------------------ rows

    def _embed(
        self, name: str, text: Text, collaborative: Collaborative, labels: Tensor | None, **settings: Any
    ) -> ILoRAOutput:
        gates, row_gates = self._gates(name, text, collaborative), self._layer.row_gates
        batch = PackedBatch.of(self.model, *text, suffix=self._layer.suffix(name))
        pooling = cast(ILoRAConfig, self.peft_config[name]).pooling
        with row_gates.use(RowsOnTheWay(gates, batch.rows.shape[1]), self.model):
            return ILoRAOutput(**batch.run(self.model, pooling, labels, **settings), gates=gates)

    def _continue(
        self, name: str, text: Text, collaborative: Collaborative, generate: Callable[..., Any], **kwargs: Any
    ) -> Any:
        """Feed the prompt with its padding on the left."""
        prompt = left_padded_prompt(self.model, *text)
        gates = self._gates(name, text, collaborative)
        with self._layer.row_gates.use(RowsOnTheWay(gates, None), self.model):
            return generate(**prompt, **kwargs)

    def _gates(self, name: str, text: Text, collaborative: Collaborative) -> Tensor:
        gate = self._layer.gate(name)
        return gate(*gate.read(len(text.mask), *collaborative))

    # ------------------------------------------------------------------ adapters

    @property
    def gate(self) -> InstanceGate:
        """The gate of the active adapter."""
        return self._layer.gate(self._active())

    def _make_parts(self, model: PreTrainedModel, config: ILoRAConfig) -> tuple[nn.Module | None, ...]:
        gate = InstanceGate(config)
        return gate, make_suffix(model, embedding_scale(model)) if config.pooling == "suffix" else None

    def _adapt(self, model: PreTrainedModel, adapter_name: str, layer: InstanceGates, low_cpu_mem_usage: bool) -> None:
        """Put the adapter's experts into the linear layers."""
        self._row_gates = layer.row_gates
        LoraModel.inject_adapter(self, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        config = cast(ILoRAConfig, self.peft_config[adapter_name])
        config.target_modules = without_head(config.target_modules, model)

    def _create_and_replace(  # type: ignore[override]  # the settings are iLoRA's
        self,
        lora_config: ILoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Let PEFT put LoRA into a layer, and the gates into LoRA."""
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key)
        layer = self.model.get_submodule(current_key)
        if not (isinstance(layer, LoraLayer) and can_be_gated(layer)):
            base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            raise UnsupportedModelError(
                f"iLoRA's experts must stand in linear layers, got {type(base).__name__} at {current_key!r}; leave it "
                "out by target_modules or exclude_modules"
            )
        layer.lora_variant[adapter_name] = GatedVariant(self._row_gates, lora_config.num_experts)

    # ------------------------------------------------------------------ files

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Read files of an adapter that was made for the base model with its head, or without."""
        own = adapter_keys(model.state_dict(), cls.file_parts, adapter_name)
        names = [cls._remove_adapter_name_from_key(key, adapter_name) for key in own]
        renamed = under_this_base(model, state_dict, names)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
