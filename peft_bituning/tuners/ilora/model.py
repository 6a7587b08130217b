"""The iLoRA tuner: LoRA whose experts every row weighs for itself, under the interface of a Bi-Tuning model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, TaskType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, InputError, UnsupportedModelError, UnsupportedOperationError
from ..bituning.backbone import embed_text, embedding_scale, find_backbone, token_embeddings, token_width
from ..bituning.packed_batch import PackedBatch, left_padded_prompt
from ..bituning.quantization import keep_differentiable
from .config import ILoRAConfig
from .gate import InstanceGate
from .keys import adapter_keys, check_tensors, under_this_base
from .layer import LAYER_NAME, InstanceGates, check_adapter_name, without_head
from .outputs import ILoRAOutput
from .row_gates import RowsOnTheWay
from .variant import NO_MERGING, GatedVariant, can_be_gated

_TEXT_KEYS = ("attention_mask", "inputs_embeds")
_COLLABORATIVE_KEYS = ("collaborative_embeds", "collaborative_mask")


class ILoRAModel(LoraModel):
    """A causal language model with LoRA experts, weighed for each row by what a frozen recommender says of it.

    Made by `peft.get_peft_model(model, ILoRAConfig(...))`; the model's weights are frozen.

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

    model: PreTrainedModel
    prefix = "ilora_"
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]  # LoRA's layers and the one of the gates
    # transformers' own `load_adapter` injects layers without this class around them: let it refuse.
    uses_shared_state = True

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        collaborative_embeds: Tensor | None = None,
        collaborative_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **backbone_kwargs: Any,
    ) -> Any:
        """Encode each row into one embedding, through experts that its own gates weigh.

        Args:
            input_ids: the text [B, T].
            attention_mask: which tokens are real [B, T], int or bool; None means all of them.
            inputs_embeds: token embeddings [B, T, D] in place of `input_ids`.
            collaborative_embeds: `C_u` [B, N, C] of a frozen recommender.
            collaborative_mask: which of its rows are real [B, N]; all zeros says that a row has none.
            labels: next tokens [B, T] with -100 at positions without loss; `CAUSAL_LM` only.
            output_hidden_states: also return the states of every layer.
            return_dict: False returns a tuple.
            backbone_kwargs: passed on to the language model.

        Returns:
            `ILoRAOutput`; where the adapter is disabled, the base model's own output.

        Raises:
            InputError: inputs that are missing or do not fit each other.
            ContextLengthError: a row longer than the model's context.
        """
        if self._layer.disable_adapters:
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **({} if labels is None else {"labels": labels}),
                **backbone_kwargs,
            )
        name, config = self._active()
        if labels is not None and config.task_type != TaskType.CAUSAL_LM:
            raise InputError(
                f"labels need task_type=CAUSAL_LM, got {TaskType(config.task_type).value}; train embeddings with "
                "peft_bituning.losses.catalog_contrastive_loss on `pooler_output` instead"
            )
        tokens, mask = embed_text(self.model, input_ids, attention_mask, inputs_embeds)
        if labels is not None and labels.shape != mask.shape:
            raise InputError(f"labels must be [B, T] = {list(mask.shape)}, got {list(labels.shape)}")
        gates = self._gates(name, len(mask), collaborative_embeds, collaborative_mask)
        batch = PackedBatch.of(self.model, tokens, mask, input_ids, suffix=self._layer.suffix(name))
        with self._rows_on_the_way(gates, batch.rows.shape[1]):
            output = batch.run(
                self.model, config.pooling, labels, output_hidden_states=output_hidden_states, **backbone_kwargs
            )
        result = ILoRAOutput(**output, gates=gates)
        return result if return_dict in (None, True) else result.to_tuple()

    def _gates(self, name: str, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Tensor:
        gate = self._layer.gate(name)
        return gate(*gate.check(batch_size, embeds, mask))

    @contextmanager
    def _rows_on_the_way(self, gates: Tensor, width: int | None) -> Iterator[None]:
        """Let the adapted layers know the gates [B, K] of the rows that are about to run, W tokens each."""
        row_gates = self._layer.row_gates
        with row_gates.use(RowsOnTheWay(gates, width)), row_gates.reach_checkpoints(self.model):
            yield

    # ------------------------------------------------------------------ generate

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue each row's text, through experts that its own gates weigh; `CAUSAL_LM` only.

        Args:
            input_ids: the prompt [B, T], padding anywhere.
            kwargs: `attention_mask`, `inputs_embeds`, `collaborative_embeds` and `collaborative_mask` as in
                `forward`, and any argument of transformers' `generate`.

        Returns:
            What transformers' `generate` returns: the prompt, its padding on the left, and the new tokens; the new
            tokens alone for `inputs_embeds`. Where the adapter is disabled, the base model's own.

        Raises:
            UnsupportedOperationError: the task is not `CAUSAL_LM`, or the model has no language-model head.
            InputError: inputs that are missing or do not fit each other.
        """
        # The class's own: inside PEFT's context the instance's leads back here.
        generate = getattr(type(self.model), "generate", None)
        if generate is None:
            raise UnsupportedOperationError(
                f"generate needs a base model with a language-model head, got {type(self.model).__name__}; load one "
                "with AutoModelForCausalLM"
            )
        if self._layer.disable_adapters:
            return generate(self.model, input_ids, **kwargs)
        name, config = self._active()
        if config.task_type != TaskType.CAUSAL_LM:
            raise UnsupportedOperationError(
                f"generate needs task_type=CAUSAL_LM, got {TaskType(config.task_type).value}; make the adapter with "
                "ILoRAConfig(task_type='CAUSAL_LM'), or call it inside `with model.disable_adapter():` for the base "
                "model's own text"
            )
        tokens, mask = embed_text(self.model, input_ids, *(kwargs.pop(key, None) for key in _TEXT_KEYS))
        gates = self._gates(name, len(mask), *(kwargs.pop(key, None) for key in _COLLABORATIVE_KEYS))
        prompt = left_padded_prompt(self.model, tokens, mask, input_ids)
        with self._rows_on_the_way(gates, None):
            return generate(self.model, **prompt, **kwargs)

    # ------------------------------------------------------------------ adapters

    @property
    def backbone(self) -> nn.Module:
        """The headless language model."""
        return find_backbone(self.model)

    @property
    def gate(self) -> InstanceGate:
        """The gate of the active adapter."""
        return self._layer.gate(self._active()[0])

    @property
    def prefix_encoder(self) -> InstanceGate:
        """The gate, where training asks a `BiTuningModel` for what reads the collaborative embeddings."""
        return self.gate

    @property
    def _layer(self) -> InstanceGates:
        return getattr(self.model, LAYER_NAME)

    def _active(self) -> tuple[str, ILoRAConfig]:
        names = self.active_adapters
        if len(names) != 1:
            raise UnsupportedOperationError(
                f"exactly one iLoRA adapter must be active, got {names}; a row has one gate and one embedding"
            )
        config = self.peft_config[names[0]]
        if not isinstance(config, ILoRAConfig):
            raise TypeError(f"adapter {names[0]!r} must have an ILoRAConfig, got {type(config).__name__}")
        return names[0], config

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

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base model."""
        if hasattr(self.model, LAYER_NAME):
            delattr(self.model, LAYER_NAME)
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: the weights of the experts differ by row."""
        raise UnsupportedOperationError(NO_MERGING)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the weights of the experts differ by row."""
        raise UnsupportedOperationError(NO_MERGING)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: each adapter's experts follow a gate of their own."""
        raise UnsupportedOperationError(
            "iLoRA adapters cannot be combined into a weighted one: each adapter's experts follow its own gate"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Lead `generate` here while PEFT runs the model: `PeftModel.generate` calls the base model's directly."""
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedOperationError(
                "iLoRA cannot mix adapters within a batch (adapter_names); call set_adapter and run one batch an "
                "adapter"
            )
        if torch.compiler.is_compiling():
            yield
            return
        self.model.__dict__["generate"] = self.generate
        try:
            yield
        finally:
            self.model.__dict__.pop("generate", None)

    # ------------------------------------------------------------------ files

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map file keys to model keys and refuse what does not fit; PEFT itself would load with `strict=False`."""
        names = [cls._remove_adapter_name_from_key(key, adapter_name) for key in adapter_keys(model, adapter_name)]
        renamed = under_this_base(model, state_dict, names)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        check_tensors(adapter_name, remapped, model)
        return remapped
