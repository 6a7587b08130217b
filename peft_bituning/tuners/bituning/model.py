"""The Bi-Tuning tuner: a frozen language model between trainable virtual tokens."""

from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import AdapterLoadError, ConfigurationError, InputError, UnsupportedOperationError
from ...losses import load_balancing_loss
from .backbone import (
    INITIAL_SCALE,
    check_context,
    embedding_scale,
    eos_token_id,
    find_backbone,
    token_width,
)
from .config import BiTuningConfig
from .encoders import PrefixEncoder, build_prefix_encoder
from .encoders.base import check_collaborative
from .layer import VirtualTokens, check_adapter_name
from .layout import RowLayout
from .outputs import BiTuningOutput

LAYER_NAME = "virtual_tokens"


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
                f"labels need task_type=CAUSAL_LM, got {config.task_type}; train embeddings with "
                "peft_bituning.losses.catalog_contrastive_loss on `pooler_output` instead"
            )
        tokens, mask = self._token_embeddings(input_ids, attention_mask, inputs_embeds)
        encoder = self._layer.encoder(name)
        embeds, embeds_mask = check_collaborative(encoder, len(tokens), collaborative_embeds, collaborative_mask)
        prefix = encoder(len(tokens), embeds, embeds_mask)
        suffix = self._suffix(name, config)
        layout = RowLayout.from_mask(mask, encoder.num_tokens, suffix is not None)
        if config.pooling in ("mean", "last") and encoder.num_tokens == 0 and not bool(mask.bool().any(1).all()):
            raise InputError(f"pooling={config.pooling!r} without a prefix needs at least one token in every row")
        self._check_context(layout)
        outputs, states, logits = self._run(
            layout.pack(prefix.embeddings, tokens, suffix),
            layout.attention_mask,
            with_logits=labels is not None,
            output_hidden_states=output_hidden_states,
            **backbone_kwargs,
        )
        aux_loss = None
        if prefix.router_logits is not None and prefix.router_mask is not None:
            aux_loss = load_balancing_loss(prefix.router_logits, prefix.router_mask, reduce=self.training)
        result = BiTuningOutput(
            last_hidden_state=layout.text_states(states),
            pooler_output=layout.mean_states(states) if config.pooling == "mean" else layout.last_states(states),
            router_logits=prefix.router_logits,
            aux_loss=aux_loss,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
        if labels is not None and logits is not None:
            result.logits = layout.text_states(logits)
            result.loss = self._language_model_loss(layout, logits, labels, backbone_kwargs)
        return result if return_dict in (None, True) else result.to_tuple()

    def _run(self, rows: Tensor, mask: Tensor, with_logits: bool, **kwargs: Any) -> tuple[Any, Tensor, Tensor | None]:
        """Run the packed rows: the headless backbone, or the whole model where its logits are wanted."""
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        kwargs.setdefault("use_cache", False)
        backbone = self.backbone
        if not with_logits:
            kwargs.pop("num_items_in_batch", None)
            outputs = backbone(inputs_embeds=rows, attention_mask=mask, return_dict=True, **kwargs)
            return outputs, outputs.last_hidden_state, None
        states: list[Tensor] = []
        handle = backbone.register_forward_hook(lambda _m, _i, output: states.append(output[0]))
        kwargs.pop("num_items_in_batch", None)
        try:
            outputs = self.model(inputs_embeds=rows, attention_mask=mask, return_dict=True, **kwargs)
        finally:
            handle.remove()
        return outputs, states[0], outputs.logits

    def _language_model_loss(self, layout: RowLayout, logits: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Next-token loss over the text, by the model's own loss function."""
        text = slice(layout.num_prefix, layout.num_prefix + labels.shape[1])
        return self.model.loss_function(
            logits=logits[:, text],
            labels=layout.pack_text(labels, fill=-100),
            vocab_size=self.model.config.get_text_config().vocab_size,
            **{key: value for key, value in kwargs.items() if key == "num_items_in_batch" and value is not None},
        )

    def _token_embeddings(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise InputError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
        if inputs_embeds is None:
            if input_ids is None or input_ids.ndim != 2:
                raise InputError(
                    f"input_ids must be [B, T], got {list(input_ids.shape) if input_ids is not None else None}"
                )
            inputs_embeds = self.model.get_input_embeddings()(input_ids)
        width = token_width(self.model)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != width:
            raise InputError(f"inputs_embeds must be [B, T, D] with D = {width}, got {list(inputs_embeds.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        if attention_mask.shape != inputs_embeds.shape[:2]:
            raise InputError(
                f"attention_mask must be [B, T] = {list(inputs_embeds.shape[:2])}, got {list(attention_mask.shape)}"
            )
        return inputs_embeds, attention_mask

    def _suffix(self, name: str, config: BiTuningConfig) -> Tensor | None:
        """The token after the text [1, 1, D]: trainable, the frozen EOS embedding, or none."""
        if config.pooling == "suffix":
            suffix = self._layer.suffix(name)
            return None if suffix is None else suffix.unsqueeze(0)
        if config.pooling == "eos":
            eos = torch.tensor([[eos_token_id(self.model)]], device=self.model.get_input_embeddings().weight.device)
            return self.model.get_input_embeddings()(eos)
        return None

    def _check_context(self, layout: RowLayout) -> None:
        width = layout.order.shape[1]
        try:
            check_context(self.model, layout.num_prefix, width, int(layout.has_suffix))
        except InputError:
            # Padding may be what is too long: measure the rows themselves, at the price of a device sync.
            check_context(self.model, layout.num_prefix, int(layout.lengths.max()), int(layout.has_suffix))
            raise

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

    def inject_adapter(
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
        width = token_width(model)
        scale = embedding_scale(model) if config.init_weights else INITIAL_SCALE
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            encoder = build_prefix_encoder(config, width, scale)
            suffix = nn.Embedding(1, width) if config.pooling == "suffix" else None
        if suffix is not None:
            nn.init.normal_(suffix.weight, std=scale)
        check_adapter_name(adapter_name, config, encoder)
        if not hasattr(model, LAYER_NAME):
            model.requires_grad_(False)
            model.add_module(LAYER_NAME, VirtualTokens(model.get_input_embeddings()))
            self._layer.set_adapter([adapter_name])
        self._layer.add(adapter_name, encoder, suffix)
        self._layer._move_adapter_to_device_of_base_layer(adapter_name)
        active = adapter_name in self.active_adapters
        self._layer.set_requires_grad(adapter_name, active and not config.inference_mode)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=active,
        )

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
        dtype = self.model.get_input_embeddings().weight.dtype
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
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedOperationError(
                "Bi-Tuning cannot mix adapters within a batch (adapter_names); call set_adapter and run one batch an "
                "adapter"
            )
        yield

    # ------------------------------------------------------------------ files

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...bituning_prefix.NAME.router.weight` -> `...bituning_prefix.router.weight`: the name stands mid-key."""
        for part in VirtualTokens.adapter_layer_names:
            head, found, tail = key.partition(f"{LAYER_NAME}.{part}.{adapter_name}")
            if found and (not tail or tail.startswith(".")):
                return f"{head}{LAYER_NAME}.{part}{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map file keys to model keys and refuse what does not fit; PEFT itself would load with `strict=False`."""
        own = {
            key: value
            for key, value in model.state_dict().items()
            if f"{LAYER_NAME}.bituning_prefix.{adapter_name}." in key
            or f"{LAYER_NAME}.bituning_suffix.{adapter_name}." in key
        }
        expected = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in own.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict()
        missing = sorted(set(own) - set(remapped))
        unexpected = sorted(key for key in remapped if key not in known)
        wrong = [
            f"{key}: file {list(value.shape)}, model {list(known[key].shape)}"
            for key, value in sorted(remapped.items())
            if key in own and value.shape != known[key].shape
        ]
        problems = [
            f"{title}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if keys
        ]
        if problems:
            raise AdapterLoadError(
                f"the saved tensors do not fit the adapter {adapter_name!r} ({len(expected)} tensors expected, "
                f"{len(state_dict)} in the file); {'; '.join(problems)}. The file is from another configuration, "
                "another base model (token width), or damaged; save it again or load it with the model it was made for"
            )
        return remapped
