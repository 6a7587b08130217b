"""A batch ready for the language model, and the embeddings that come out of it; what every pooled tuner shares."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from .backbone import check_context, max_positions
from .embedding_model import BiTuningOutput
from .forward_pass import placeholder_id, reads_token_ids, run_rows
from .layout import RowLayout
from .shared_start import run_shared


@dataclass(frozen=True)
class PackedBatch:
    """Rows `[P virtual tokens | text | suffix | padding]`, the same whatever padding the caller used.

    Args:
        layout: where each token of a row stands.
        rows: token embeddings [B, W, D].
        mask: which of them are real [B, W].
        ids: token ids [B, W] where the model needs them, or None.
        input_ids: the text [B, T] in the caller's layout, or None where it came as embeddings.
    """

    layout: RowLayout
    rows: Tensor
    mask: Tensor
    ids: Tensor | None
    input_ids: Tensor | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokens: Tensor,
        mask: Tensor,
        input_ids: Tensor | None,
        prefix: Tensor | None = None,
        suffix: Tensor | None = None,
    ) -> "PackedBatch":
        """Pack a batch, as wide as its longest row where padding alone would not fit the context.

        Args:
            model: the language model.
            tokens: token embeddings [B, T, D], padding anywhere.
            mask: which of them are real [B, T], int or bool.
            input_ids: the text [B, T], or None where it came as embeddings.
            prefix: virtual tokens before the text [B, P, D], or None.
            suffix: the token after the text [1, 1, D] or [B, 1, D], or None.

        Raises:
            InputError: a row without any token.
            ContextLengthError: a row longer than the model's context.
        """
        num_prefix = 0 if prefix is None else prefix.shape[1]
        layout = RowLayout.from_mask(mask, num_prefix, suffix is not None)
        if num_prefix == 0 and suffix is None:
            _refuse_empty(mask)
        width, limit = layout.width, max_positions(model)
        if limit is not None and width > limit:
            longest = int(layout.lengths.max())  # only here, at the price of a device sync
            check_context(model, num_prefix, longest, int(layout.has_suffix))
            width = num_prefix + longest + int(layout.has_suffix)
        ids = None
        if input_ids is not None and reads_token_ids(model):
            ids = layout.pack_ids(input_ids, placeholder_id(model))[:, :width]
        rows = layout.pack(prefix, tokens, suffix)[:, :width]
        return cls(layout, rows, layout.attention_mask[:, :width], ids, input_ids)

    def run(
        self,
        model: PreTrainedModel,
        pooling: str,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        share_start: bool = False,
        **settings: Any,
    ) -> BiTuningOutput:
        """Run the rows and pool their states; `loss` and `logits` come with `labels` only.

        Args:
            model: the language model.
            pooling: `mean` of the text's states; else the last real token's, the suffix where there is one.
            labels: next tokens [B, T] with -100 at positions without loss, or None.
            num_items_in_batch: what the loss is divided by, in place of the labels that count.
            share_start: run what rows share once; only where every row goes through the same weights.
            settings: passed on to the language model.
        """
        settings = {key: value for key, value in settings.items() if value is not None}
        outputs, states, logits = None, None, None
        if share_start and self.input_ids is not None and labels is None and not settings:
            states = run_shared(model, self.layout, self.rows, self.mask, self.input_ids)
        if states is None:
            outputs, states, logits = run_rows(
                model, self.rows, self.ids, self.mask, labels is not None, **{"use_cache": False, **settings}
            )
        states = self._fill(states)
        result = BiTuningOutput(
            last_hidden_state=self.layout.text_states(states),
            pooler_output=self.layout.mean_states(states) if pooling == "mean" else self.layout.last_states(states),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
        if labels is not None and logits is not None:
            logits = self._fill(logits)
            result.logits = self.layout.text_states(logits)
            text = slice(self.layout.num_prefix, self.layout.num_prefix + labels.shape[1])
            result.loss = model.loss_function(
                logits=logits[:, text].contiguous(),
                labels=self.layout.pack_text(labels, fill=-100),
                vocab_size=model.config.get_text_config().vocab_size,
                **({} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}),
            )
        return result

    def _fill(self, states: Tensor) -> Tensor:
        """Give states the columns of padding that were not run."""
        missing = self.layout.width - states.shape[1]
        return F.pad(states, (0, 0, 0, missing)) if missing else states


def left_padded_prompt(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, input_ids: Tensor | None
) -> dict[str, Tensor]:
    """Bring prompts (see `PackedBatch.of`) to the right edge, where generation goes on.

    Returns:
        `input_ids` [B, W], or `inputs_embeds` [B, W, D] where there are no ids, and `attention_mask` [B, W], where W is
        the longest row's tokens.
    """
    layout = RowLayout.from_mask(mask, 0, False)
    if input_ids is None:
        rows, rows_mask = layout.pad_left(layout.pack(None, tokens, None))
        return {"inputs_embeds": rows, "attention_mask": rows_mask}
    placeholder = placeholder_id(model)
    ids, ids_mask = layout.pad_left(layout.pack_ids(input_ids, placeholder))
    return {"input_ids": ids.masked_fill(ids_mask == 0, placeholder), "attention_mask": ids_mask}


def _refuse_empty(mask: Tensor) -> None:
    if torch.compiler.is_compiling() or bool(mask.bool().any(1).all()):
        return
    empty = (~mask.bool().any(1)).nonzero().flatten().tolist()
    raise InputError(
        f"every row must have at least one token of text, got none in rows {empty[:10]}; give a text, or use a "
        "trainable suffix"
    )
