"""The Bi-Tuning tuner: a frozen language model between trainable virtual tokens."""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, UnsupportedOperationError
from ...losses import load_balancing_loss
from ..embedding_tuner import Collaborative, EmbeddingTuner, Text
from ..rows.backbone import device_of, token_embeddings
from ..rows.center import EmbeddingCenter
from ..rows.embedding_model import BiTuningOutput
from ..rows.forward_pass import feed, generates_from_ids_alone, placeholder_id
from ..rows.packed_batch import PackedBatch
from ..vocabulary import eos_token_id
from .config import BiTuningConfig
from .encoders import Prefix, PrefixEncoder
from .initialization import make_virtual_tokens
from .layer import VirtualTokens


class BiTuningModel(EmbeddingTuner):
    """A causal language model with a trainable prefix and suffix (paper Section 3.1).

    Made by `peft.get_peft_model(model, BiTuningConfig(...))`; the model's weights are frozen. In `generate` prefix and
    prompt go in as embeddings, so only the new tokens come back [B, new], as transformers does for `inputs_embeds`, and
    processors that read the prompt, such as a repetition penalty, see the new tokens alone.

    Its arguments are those of `EmbeddingTuner`.
    """

    prefix = "bituning_"
    method = "Bi-Tuning"
    config_cls = BiTuningConfig
    layer_cls = VirtualTokens
    file_parts = VirtualTokens.adapter_layer_names
    one_each = "a row has one prefix and one suffix"
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
            return self._layer.suffix(name)
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

    def _make_parts(self, model: PreTrainedModel, config: BiTuningConfig) -> tuple[nn.Module | None, ...]:
        if config.pooling == "eos" and eos_token_id(model) is None:
            raise ConfigurationError(
                "pooling must be suffix, mean or last for a model whose configuration names no eos_token_id, got 'eos'"
            )
        return make_virtual_tokens(model, config)

    def _adapt(self, model: PreTrainedModel, adapter_name: str, layer: VirtualTokens, low_cpu_mem_usage: bool) -> None:
        """Freeze the model, and let modules that the settings name be trained beside the adapter."""
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        if not layer.adapters:
            model.requires_grad_(False)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Not used: no module of the base model is replaced."""
        raise UnsupportedOperationError("Bi-Tuning replaces no module of the base model")


def _new_tokens(output: Any, prompt: int) -> Any:
    """Leave the prompt out of what `generate` returned for ids."""
    if isinstance(output, Tensor):
        return output[:, prompt:]
    output.sequences = output.sequences[:, prompt:]
    return output
