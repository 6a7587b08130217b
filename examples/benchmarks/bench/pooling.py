"""Any other way to tune a language model as an `EmbeddingModel`, to be compared with Bi-Tuning.

It registers nothing with PEFT and stands around models of any method, so it is no room of its own.
"""

from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_bituning.errors import ConfigurationError, UnsupportedModelError
from peft_bituning.tuners.rows.backbone import embed_text, find_backbone, token_width
from peft_bituning.tuners.rows.center import EmbeddingCenter
from peft_bituning.tuners.rows.embedding_model import BiTuningOutput, Weights
from peft_bituning.tuners.rows.packed_batch import PackedBatch

POOLINGS = ("last", "mean")
VIRTUAL_TOKENS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
POOLED_ALREADY = ("BITUNING", "ILORA")


class PooledModel(nn.Module):
    """Pools the states of a language model that LoRA, prompt tuning, P-tuning or full fine-tuning trains.

    It takes the inputs of `BiTuningModel.forward` and gives its output, so that the same encoder, loss and evaluation
    run it; collaborative inputs are ignored, as these methods have no place for them. Virtual tokens stand before the
    text and are no part of what is pooled. Saving is the wrapped model's own (`model.model.save_pretrained`).

    Args:
        model: a `PeftModel`, or a bare language model of transformers.
        pooling: which state is the embedding: the `last` text token's, or the `mean` of the text.
        center_embeddings: take the mean of the items' unit embeddings off every unit embedding, as
            `BiTuningConfig.center_embeddings` does; the vector is this model's own and not in the wrapped one's files.

    Raises:
        ConfigurationError: an unknown pooling, or `center_embeddings` that is no bool.
        UnsupportedModelError: an adapter that has this interface itself, or works on keys and values.
    """

    # As in `BiTuningModel`: what all rows share runs once; False runs every row whole.
    share_start = True
    needs_collaborative = False
    aux_loss_coef = 0.0

    def __init__(
        self, model: PeftModel | PreTrainedModel, pooling: str = "last", center_embeddings: bool = False
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigurationError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if not isinstance(center_embeddings, bool):
            raise ConfigurationError(f"center_embeddings must be True or False, got {center_embeddings!r}")
        self.model = model
        self.pooling = pooling
        self.embedding_center = EmbeddingCenter(token_width(self.language_model)) if center_embeddings else None
        find_backbone(self.language_model)
        if isinstance(model, PeftModel):
            _check_method(model)

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model, LoRA's layers in it where there are any."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @property
    def num_virtual_tokens(self) -> int:
        """P, the tokens of the prompt."""
        config = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0

    def weights_out(self) -> Weights:
        """Copy the weights that require gradients to the CPU, by their names, with the center.

        PEFT's own files hold what P-tuning's encoder computes and not the encoder; full fine-tuning has no adapter.
        """
        trained: dict[str, Tensor] = {name: each for name, each in self.named_parameters() if each.requires_grad}
        if self.embedding_center is not None:
            trained["embedding_center.weight"] = self.embedding_center.weight
        return {name: value.detach().cpu().clone() for name, value in trained.items()}

    def weights_in(self, weights: Weights) -> None:
        """Put back what `weights_out` copied from a model of the same kind."""
        known: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for name, value in weights.items():
                known[name].copy_(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        collaborative_embeds: Tensor | None = None,
        collaborative_mask: Tensor | None = None,
        **backbone_kwargs: Any,
    ) -> BiTuningOutput:
        """Encode each row into one embedding.

        Args:
            input_ids: the text [B, T].
            attention_mask: which tokens are real [B, T], int or bool; None means all of them.
            inputs_embeds: token embeddings [B, T, D] in place of `input_ids`.
            collaborative_embeds: ignored.
            collaborative_mask: ignored.
            backbone_kwargs: passed on to the language model.

        Returns:
            The output: `last_hidden_state` [B, T, D] in the caller's layout and `pooler_output` [B, D].

        Raises:
            InputError: inputs that are missing or do not fit each other; `ContextLengthError` where they are too long.
        """
        model = self.language_model
        tokens, mask = embed_text(model, input_ids, attention_mask, inputs_embeds)
        batch = PackedBatch.of(model, tokens, mask, input_ids, prefix=self._virtual_tokens(len(tokens)))
        result = batch.run(model, self.pooling, share_start=self.share_start, **backbone_kwargs)
        if self.embedding_center is not None:
            result.pooler_output = self.embedding_center(result.pooler_output)
        return result

    def _virtual_tokens(self, batch_size: int) -> Tensor | None:
        """The prompt [B, P, D] of prompt tuning or P-tuning, or None."""
        if not isinstance(self.model, PeftModel) or not self.model.active_peft_config.is_prompt_learning:
            return None
        if self.model._adapters_disabled:
            return None
        _check_method(self.model)
        return self.model.get_prompt(batch_size)


def _check_method(model: PeftModel) -> None:
    config = model.active_peft_config
    method = PeftType(config.peft_type).value
    if method in POOLED_ALREADY:
        raise UnsupportedModelError(
            f"PooledModel must wrap an adapter that gives no pooled embedding, got {method}; call the model itself"
        )
    if config.is_prompt_learning and config.peft_type not in VIRTUAL_TOKENS:
        raise UnsupportedModelError(
            f"PooledModel must wrap an adapter in the layers (LoRA and the like), prompt tuning or P-tuning, got "
            f"{method}, whose prompt is more than tokens before the text"
        )
