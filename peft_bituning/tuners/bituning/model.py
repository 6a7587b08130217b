"""The Bi-Tuning tuner: a frozen language model between trainable virtual tokens."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, InputError, UnsupportedOperationError
from ...losses import load_balancing_loss
from .backbone import (
    device_of,
    embed_text,
    eos_token_id,
    find_backbone,
    token_embeddings,
)
from .config import BiTuningConfig
from .encoders import Prefix, PrefixEncoder
from .encoders.base import check_collaborative
from .forward_pass import feed, generates_from_ids_alone, placeholder_id
from .initialization import make_virtual_tokens, start_from_tokens
from .keys import check_fit, without_adapter_name
from .layer import LAYER_NAME, VirtualTokens
from .packed_batch import PackedBatch
from .quantization import keep_differentiable


class BiTuningModel(BaseTuner):
    """A causal language model with a trainable prefix and suffix (paper Section 3.1).

    Made by `peft.get_peft_model(model, BiTuningConfig(...))`; the model's weights are frozen.

    Args:
        model: a causal language model of transformers, or its headless model.
        peft_config: the adapter's settings.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter's weights on the meta device.
        state_dict: not used; the adapter's structure comes from its settings.
    """

    model: PreTrainedModel
    prefix = "bituning_"
    tuner_layer_cls = VirtualTokens
    target_module_mapping: dict[str, list[str]] = {}
    # Where the prefix is the same for all rows, what they share runs once: see shared_start.py; False runs rows whole.
    share_start = True
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
        """Encode each row into one embedding (paper Eq. 2).

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
            `BiTuningOutput`; where the adapter is disabled, the base model's own output.

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
        prefix = self._prefix(name, len(tokens), collaborative_embeds, collaborative_mask)
        suffix = self._suffix(name, config)
        batch = PackedBatch.of(self.model, tokens, mask, input_ids, prefix.embeddings, suffix)
        settings = {"output_hidden_states": output_hidden_states, **backbone_kwargs}
        result = batch.run(
            self.model, config.pooling, labels, share_start=self.share_start and prefix.is_shared, **settings
        )
        result.router_logits = prefix.router_logits
        if prefix.router_logits is not None and prefix.router_mask is not None:
            result.aux_loss = load_balancing_loss(prefix.router_logits, prefix.router_mask, reduce=self.training)
        return result if return_dict in (None, True) else result.to_tuple()

    def _prefix(
        self, name: str, batch_size: int, collaborative_embeds: Tensor | None, collaborative_mask: Tensor | None
    ) -> Prefix:
        """Make each row's prefix."""
        encoder = self._layer.encoder(name)
        return encoder(batch_size, *check_collaborative(encoder, batch_size, collaborative_embeds, collaborative_mask))

    def _suffix(self, name: str, config: BiTuningConfig) -> Tensor | None:
        """The token after the text [1, 1, D]: trainable, the frozen EOS embedding, or none."""
        if config.pooling == "suffix":
            suffix = self._layer.suffix(name)
            return None if suffix is None else suffix.unsqueeze(0)
        if config.pooling == "eos":
            embeddings = token_embeddings(self.model)
            return embeddings(torch.tensor([[eos_token_id(self.model)]], device=device_of(embeddings)))
        return None

    # ------------------------------------------------------------------ generate

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue each row's text, conditioned on its prefix; `CAUSAL_LM` only.

        The prefix and the prompt go in as embeddings, so only the new tokens come back [B, new], as transformers
        does for `inputs_embeds`, and processors that read the prompt, such as a repetition penalty, see the new
        tokens alone.

        Args:
            input_ids: the prompt [B, T].
            kwargs: `attention_mask`, `inputs_embeds`, `collaborative_embeds` and `collaborative_mask` as in
                `forward`, and any argument of transformers' `generate`.

        Returns:
            What transformers' `generate` returns; where the adapter is disabled, the base model's own.

        Raises:
            UnsupportedOperationError: the task is not `CAUSAL_LM`, or the model has no language-model head.
            InputError: inputs that are missing or do not fit each other.
            ContextLengthError: a prompt longer than the model's context.
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
                "BiTuningConfig(task_type='CAUSAL_LM'), or call it inside `with model.disable_adapter():` for the base "
                "model's own text"
            )
        given = [kwargs.pop(key, None) for key in ("attention_mask", "inputs_embeds")]
        tokens, mask = embed_text(self.model, input_ids, *given)
        prefix = self._prefix(
            name, len(tokens), kwargs.pop("collaborative_embeds", None), kwargs.pop("collaborative_mask", None)
        )
        batch = PackedBatch.of(self.model, tokens, mask, input_ids, prefix.embeddings)
        rows, rows_mask = batch.layout.pad_left(batch.rows)
        by_ids = generates_from_ids_alone(self.model)
        ids = batch.layout.pack_ids(input_ids, placeholder_id(self.model)) if by_ids and input_ids is not None else None
        with feed(self.model, rows, None if ids is None else batch.layout.pad_left(ids)[0], by_ids) as inputs:
            output = generate(self.model, attention_mask=rows_mask, **inputs, **kwargs)
        return _new_tokens(output, rows.shape[1]) if by_ids else output

    # ------------------------------------------------------------------ adapters

    @property
    def backbone(self) -> nn.Module:
        """The headless language model."""
        return find_backbone(self.model)

    @property
    def prefix_encoder(self) -> PrefixEncoder:
        """The prefix encoder of the active adapter."""
        return self._layer.encoder(self._active()[0])

    @property
    def _layer(self) -> VirtualTokens:
        return getattr(self.model, LAYER_NAME)

    def _active(self) -> tuple[str, BiTuningConfig]:
        names = self.active_adapters
        if len(names) != 1:
            raise UnsupportedOperationError(
                f"exactly one Bi-Tuning adapter must be active, got {names}; a row has one prefix and one suffix"
            )
        config = self.peft_config[names[0]]
        if not isinstance(config, BiTuningConfig):
            raise TypeError(f"adapter {names[0]!r} must have a BiTuningConfig, got {type(config).__name__}")
        return names[0], config

    def inject_adapter(  # type: ignore[override]  # a transformers model, not any module
        self,
        model: PreTrainedModel,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter's virtual tokens to the model; called by PEFT.

        Args:
            model: the language model.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: not used here; see `_cast_adapter_dtype`.
            low_cpu_mem_usage: make the weights on the meta device.
            state_dict: not used; the structure comes from the settings.

        Raises:
            ConfigurationError: settings that do not fit the model.
            UnsupportedModelError: the model cannot be Bi-Tuned.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, BiTuningConfig):
            raise ConfigurationError(f"peft_config must be a BiTuningConfig, got {type(config).__name__}")
        self._check_new_adapter_config(config)
        find_backbone(model)
        if config.pooling == "eos" and eos_token_id(model) is None:
            raise ConfigurationError(
                "pooling must be suffix, mean or last for a model whose configuration names no eos_token_id, got 'eos'"
            )
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            encoder, suffix = make_virtual_tokens(model, config)
        start_from_tokens(model, config, encoder, suffix)
        layer = getattr(model, LAYER_NAME, None) or VirtualTokens(token_embeddings(model))
        layer.check_name(adapter_name, encoder)
        if not hasattr(model, LAYER_NAME):
            model.requires_grad_(False)
            keep_differentiable(model)
            model.add_module(LAYER_NAME, layer)
            self._layer.set_adapter([adapter_name])
        self._layer.add(adapter_name, encoder, suffix)
        self._layer._move_adapter_to_device_of_base_layer(adapter_name)
        active = adapter_name in self.active_adapters
        self._layer.set_requires_grad(adapter_name, active and not config.inference_mode)
        del model._modules[
            LAYER_NAME
        ]  # PEFT matches `modules_to_save` by the end of names: `norm` is in an M-Former too
        try:
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=self.get_model_config(self),
                adapter_name=adapter_name,
                activate_adapter=active,
            )
        finally:
            model.add_module(LAYER_NAME, layer)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Not used: no module of the base model is replaced."""
        raise UnsupportedOperationError("Bi-Tuning replaces no module of the base model")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the adapter in float32, or in the base model's type where PEFT is told not to cast."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        dtype = token_embeddings(self.model).weight.dtype
        if not dtype.is_floating_point:
            return
        self._layer.encoder(adapter_name).to(dtype)
        if adapter_name in self._layer.bituning_suffix:
            self._layer.bituning_suffix[adapter_name].to(dtype)

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base model."""
        if hasattr(self.model, LAYER_NAME):
            delattr(self.model, LAYER_NAME)
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: there is no weight that virtual tokens could be merged into."""
        self._layer.merge()
        return self.model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: there is no weight that virtual tokens could be merged into."""
        self._layer.merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the mean of two prefixes is not the prefix of a mean."""
        raise UnsupportedOperationError(
            "Bi-Tuning adapters cannot be combined into a weighted one: states of the language model are not linear "
            "in its inputs"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Lead `generate` here while PEFT runs the model: `PeftModel.generate` calls the base model's directly."""
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedOperationError(
                "Bi-Tuning cannot mix adapters within a batch (adapter_names); call set_adapter and run one batch an "
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
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...bituning_prefix.NAME.router.weight` -> `...bituning_prefix.router.weight`: the name stands mid-key."""
        short = without_adapter_name(key, adapter_name)
        if short is not None:
            return short
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map file keys to model keys and refuse what does not fit; PEFT itself would load with `strict=False`."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_fit(adapter_name, remapped, model.state_dict())
        return remapped


def _new_tokens(output: Any, prompt: int) -> Any:
    """Leave the prompt out of what `generate` returned for ids."""
    if isinstance(output, Tensor):
        return output[:, prompt:]
    output.sequences = output.sequences[:, prompt:]
    return output
