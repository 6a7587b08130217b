"""The iLoRA tuner: LoRA whose experts every row weighs for itself, under the interface of a Bi-Tuning model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, UnsupportedModelError
from ..rows.adapter_file import check_fit
from ..rows.backbone import embedding_scale, find_backbone, token_embeddings, token_width
from ..rows.embedding_tuner import Collaborative, EmbeddingTuner, Text
from ..rows.packed_batch import PackedBatch, left_padded_prompt
from ..rows.quantization import keep_differentiable
from .config import ILoRAConfig
from .gate import InstanceGate
from .keys import adapter_keys, under_this_base
from .layer import LAYER_NAME, InstanceGates, check_adapter_name, without_head
from .outputs import ILoRAOutput
from .row_gates import RowsOnTheWay
from .variant import NO_MERGING, GatedVariant, can_be_gated


class ILoRAModel(EmbeddingTuner, LoraModel):
    """A causal language model with LoRA experts, weighed for each row by what a frozen recommender says of it.

    Made by `peft.get_peft_model(model, ILoRAConfig(...))`; the model's weights are frozen. `generate` returns the
    prompt, its padding on the left, and the new tokens; the new tokens alone for `inputs_embeds`.

    Args:
        model: a causal language model of transformers, or its headless model.
        peft_config: the adapter's settings.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter's weights on the meta device.
        state_dict: not used; the adapter's structure comes from its settings.

    References:
        Kong et al., Customizing Language Models with Instance-wise LoRA for Sequential Recommendation, 2024,
        https://arxiv.org/abs/2408.10159
    """

    prefix = "ilora_"
    method = "iLoRA"
    layer_name = LAYER_NAME
    one_each = "a row has one gate and one embedding"
    no_merging = NO_MERGING
    no_weighting = "iLoRA adapters cannot be combined into a weighted one: each adapter's experts follow its own gate"
    num_virtual_tokens = 0
    needs_collaborative = True
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]  # LoRA's layers and the one of the gates

    # ------------------------------------------------------------------ rows

    def _embed(
        self, name: str, text: Text, collaborative: Collaborative, labels: Tensor | None, **settings: Any
    ) -> ILoRAOutput:
        gates = self._gates(name, text, collaborative)
        batch = PackedBatch.of(self.model, *text, suffix=self._layer.suffix(name))
        pooling = cast(ILoRAConfig, self.peft_config[name]).pooling
        with self._rows_on_the_way(gates, batch.rows.shape[1]):
            return ILoRAOutput(**batch.run(self.model, pooling, labels, **settings), gates=gates)

    def _continue(
        self, name: str, text: Text, collaborative: Collaborative, generate: Callable[..., Any], **kwargs: Any
    ) -> Any:
        """Feed the prompt with its padding on the left."""
        prompt = left_padded_prompt(self.model, *text)
        with self._rows_on_the_way(self._gates(name, text, collaborative), None):
            return generate(**prompt, **kwargs)

    def _gates(self, name: str, text: Text, collaborative: Collaborative) -> Tensor:
        gate = self._layer.gate(name)
        return gate(*gate.read(len(text.mask), *collaborative))

    @contextmanager
    def _rows_on_the_way(self, gates: Tensor, width: int | None) -> Iterator[None]:
        """Let the adapted layers know the gates [B, K] of the rows that are about to run, W tokens each."""
        row_gates = self._layer.row_gates
        with row_gates.use(RowsOnTheWay(gates, width)), row_gates.reach_checkpoints(self.model):
            yield

    # ------------------------------------------------------------------ adapters

    @property
    def gate(self) -> InstanceGate:
        """The gate of the active adapter."""
        return self._layer.gate(self._active())

    def inject_adapter(  # type: ignore[override]  # a transformers model, not any module
        self,
        model: PreTrainedModel,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter's experts into the linear layers, and its gate and suffix beside them; called by PEFT.

        Args:
            model: the language model.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: not used here; see `_cast_adapter_dtype`.
            low_cpu_mem_usage: make the weights on the meta device.
            state_dict: not used; the structure comes from the settings.

        Raises:
            ConfigurationError: settings that do not fit the model.
            UnsupportedModelError: the model, or a layer that was named, cannot be tuned this way.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, ILoRAConfig):
            raise ConfigurationError(f"peft_config must be an ILoRAConfig, got {type(config).__name__}")
        find_backbone(model)
        check_adapter_name(adapter_name, model)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            gate = InstanceGate(config)
            suffix = nn.Embedding(1, token_width(model)) if config.pooling == "suffix" else None
        if suffix is not None and not suffix.weight.is_meta:
            nn.init.normal_(suffix.weight, std=embedding_scale(model))
        keep_differentiable(model)
        layer = getattr(model, LAYER_NAME, None)
        if layer is None:
            layer = InstanceGates(token_embeddings(model))
            layer.set_adapter([adapter_name])
        self._row_gates = layer.row_gates
        # PEFT matches `modules_to_save` by the end of names: the layer, which has a `gate` too, is out meanwhile.
        model._modules.pop(LAYER_NAME, None)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, None)
            config.target_modules = without_head(config.target_modules, model)
            layer.add(adapter_name, gate, suffix)
        finally:
            if len(layer.ilora_gate):
                model.add_module(LAYER_NAME, layer)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        active = adapter_name in self.active_adapters
        layer.set_requires_grad(adapter_name, active and not config.inference_mode)

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

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the adapter in float32, or in the base model's type where PEFT is told not to cast."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        dtype = token_embeddings(self.model).weight.dtype
        if autocast_adapter_dtype or not dtype.is_floating_point:
            return
        self._layer.gate(adapter_name).to(dtype)
        if adapter_name in self._layer.ilora_suffix:
            self._layer.ilora_suffix[adapter_name].to(dtype)

    # ------------------------------------------------------------------ files

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map file keys to model keys and refuse what does not fit; PEFT itself would load with `strict=False`."""
        names = [cls._remove_adapter_name_from_key(key, adapter_name) for key in adapter_keys(model, adapter_name)]
        renamed = under_this_base(model, state_dict, names)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        check_fit(adapter_name, remapped, model.state_dict(), adapter_keys(model, adapter_name))
        return remapped
