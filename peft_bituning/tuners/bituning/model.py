"""The Bi-Tuning tuner: a frozen language model between trainable virtual tokens."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, UnsupportedOperationError
from ...losses import load_balancing_loss
from ..rows.adapter_file import check_fit
from ..rows.backbone import device_of, eos_token_id, find_backbone, token_embeddings, token_width
from ..rows.center import EmbeddingCenter
from ..rows.embedding_tuner import Collaborative, EmbeddingTuner, Text
from ..rows.forward_pass import feed, generates_from_ids_alone, placeholder_id
from ..rows.outputs import BiTuningOutput
from ..rows.packed_batch import PackedBatch
from ..rows.quantization import keep_differentiable
from .config import BiTuningConfig
from .encoders import Prefix, PrefixEncoder
from .initialization import make_virtual_tokens, start_from_tokens
from .keys import adapter_keys, without_adapter_name
from .layer import LAYER_NAME, NO_MERGING, VirtualTokens


class BiTuningModel(EmbeddingTuner):
    """A causal language model with a trainable prefix and suffix (paper Section 3.1).

    Made by `peft.get_peft_model(model, BiTuningConfig(...))`; the model's weights are frozen. In `generate` prefix and
    prompt go in as embeddings, so only the new tokens come back [B, new], as transformers does for `inputs_embeds`, and
    processors that read the prompt, such as a repetition penalty, see the new tokens alone.

    Args:
        model: a causal language model of transformers, or its headless model.
        peft_config: the adapter's settings.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter's weights on the meta device.
        state_dict: not used; the adapter's structure comes from its settings.
    """

    prefix = "bituning_"
    method = "Bi-Tuning"
    layer_name = LAYER_NAME
    one_each = "a row has one prefix and one suffix"
    no_merging = NO_MERGING
    no_weighting = (
        "Bi-Tuning adapters cannot be combined into a weighted one: states of the language model are not linear in its "
        "inputs"
    )
    tuner_layer_cls = VirtualTokens
    target_module_mapping: dict[str, list[str]] = {}
    # Where the prefix is the same for all rows, what they share runs once: see shared_start.py; False runs rows whole.
    share_start = True

    # ------------------------------------------------------------------ rows

    def _embed(
        self, name: str, text: Text, collaborative: Collaborative, labels: Tensor | None, **settings: Any
    ) -> BiTuningOutput:
        prefix = self._prefix(name, text, collaborative)
        batch = PackedBatch.of(self.model, *text, prefix.embeddings, self._suffix(name))
        share = self.share_start and prefix.is_shared
        result = batch.run(self.model, self._pooling(name), labels, share_start=share, **settings)
        center = self._layer.center(name)
        if center is not None:
            result.pooler_output = center(result.pooler_output)
        result.router_logits = prefix.router_logits
        if prefix.router_logits is not None and prefix.router_mask is not None:
            result.aux_loss = load_balancing_loss(prefix.router_logits, prefix.router_mask, reduce=self.training)
        return result

    def _continue(
        self, name: str, text: Text, collaborative: Collaborative, generate: Callable[..., Any], **kwargs: Any
    ) -> Any:
        """Feed prefix and prompt as embeddings, with ids beside them where a model needs those to generate."""
        batch = PackedBatch.of(self.model, *text, self._prefix(name, text, collaborative).embeddings)
        rows, mask = batch.layout.pad_left(batch.rows)
        by_ids, ids = generates_from_ids_alone(self.model), None
        if by_ids and text.input_ids is not None:
            ids = batch.layout.pad_left(batch.layout.pack_ids(text.input_ids, placeholder_id(self.model)))[0]
        with feed(self.model, rows, ids, by_ids) as inputs:
            output = generate(attention_mask=mask, **inputs, **kwargs)
        return _new_tokens(output, rows.shape[1]) if by_ids else output

    def _prefix(self, name: str, text: Text, collaborative: Collaborative) -> Prefix:
        """Make each row's prefix."""
        encoder, rows = self._layer.encoder(name), len(text.tokens)
        return encoder(rows, *encoder.read(rows, *collaborative))

    def _suffix(self, name: str) -> Tensor | None:
        """The token after the text [1, 1, D]: trainable, the frozen EOS embedding, or none."""
        pooling = self._pooling(name)
        if pooling == "suffix":
            suffix = self._layer.suffix(name)
            return None if suffix is None else suffix.unsqueeze(0)
        if pooling == "eos":
            embeddings = token_embeddings(self.model)
            return embeddings(torch.tensor([[eos_token_id(self.model)]], device=device_of(embeddings)))
        return None

    def _pooling(self, name: str) -> str:
        return cast(BiTuningConfig, self.peft_config[name]).pooling

    # ------------------------------------------------------------------ adapters

    @property
    def prefix_encoder(self) -> PrefixEncoder:
        """The prefix encoder of the active adapter."""
        return self._layer.encoder(self._active())

    @property
    def num_virtual_tokens(self) -> int:
        """P, the number of prefix tokens of the active adapter."""
        return self.prefix_encoder.num_tokens

    @property
    def needs_collaborative(self) -> bool:
        """Whether the active adapter's prefix encoder reads a frozen recommender."""
        return self.prefix_encoder.needs_collaborative

    @property
    def embedding_center(self) -> EmbeddingCenter | None:
        """What the embeddings of the active adapter are centered by; None where they are not."""
        return self._layer.center(self._active())

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
        center = EmbeddingCenter(token_width(model)) if config.center_embeddings else None
        start_from_tokens(model, config, encoder, suffix)
        layer = getattr(model, LAYER_NAME, None) or VirtualTokens(token_embeddings(model))
        layer.check_name(adapter_name, encoder)
        if not hasattr(model, LAYER_NAME):
            model.requires_grad_(False)
            keep_differentiable(model)
            model.add_module(LAYER_NAME, layer)
            self._layer.set_adapter([adapter_name])
        self._layer.add(adapter_name, encoder, suffix, center)
        self._layer._move_adapter_to_device_of_base_layer(adapter_name)
        active = adapter_name in self.active_adapters
        self._layer.set_requires_grad(adapter_name, active and not config.inference_mode)
        # PEFT matches `modules_to_save` by the end of names: the layer, with an M-Former's `norm`, is out meanwhile.
        del model._modules[LAYER_NAME]
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
        tensors = model.state_dict()
        check_fit(adapter_name, remapped, tensors, adapter_keys(tensors, adapter_name))
        return remapped


def _new_tokens(output: Any, prompt: int) -> Any:
    """Leave the prompt out of what `generate` returned for ids."""
    if isinstance(output, Tensor):
        return output[:, prompt:]
    output.sequences = output.sequences[:, prompt:]
    return output
