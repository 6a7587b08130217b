"""The letters that stand for candidates, as the language model's next token."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_bituning.errors import ConfigurationError, UnsupportedModelError

from ..pooling import PooledModel
from .prompts import ALPHABET, CandidatePrompts


def letter_tokens(prompts: CandidatePrompts, count: int) -> list[int]:
    """Return the token that each letter is after a prompt.

    Args:
        prompts: give the tokenizer, and what the letter follows.
        count: letters from A on, K.

    Returns:
        K token ids, with the blank before the letter where the tokenizer has such tokens.

    Raises:
        ConfigurationError: the tokenizer has no token of its own for some letter.
    """
    for blank in (" ", ""):
        pieces = [prompts.following(blank + letter) for letter in ALPHABET[:count]]
        tokens = [piece[0] for piece in pieces if len(piece) == 1]
        if len(set(tokens)) == count:
            return tokens
    raise ConfigurationError(
        f"the tokenizer must have a token for every letter from A to {ALPHABET[count - 1]}, got "
        f"{type(prompts.tokenizer).__name__}, which cuts or merges some; take fewer candidates or another base model"
    )


class LetterModel(nn.Module):
    """Scores letters: the language-model head's logits of the letters' tokens after the last token of each row.

    The head runs on that one state of a row, never on the others.

    Args:
        pooled: the tuned language model, pooled at the `last` token.
        tokens: the letters' token ids.

    Raises:
        ConfigurationError: another pooling.
        UnsupportedModelError: the language model has no head.
    """

    def __init__(self, pooled: PooledModel, tokens: list[int]) -> None:
        super().__init__()
        if pooled.pooling != "last":
            raise ConfigurationError(f"pooling must be 'last' to read the next token, got {pooled.pooling!r}")
        if pooled.language_model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"the base model must have a language-model head, got {type(pooled.language_model).__name__}; load "
                "one with AutoModelForCausalLM"
            )
        self.pooled = pooled
        self.tokens = tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """Score the letters.

        Args:
            input_ids: prompts [B, T], padding anywhere.
            attention_mask: which tokens are real [B, T].
            kwargs: passed on to the tuned model.

        Returns:
            The logits of the letters' tokens [B, K], float32.
        """
        states = self.pooled(input_ids, attention_mask, **kwargs).pooler_output  # [B, D]
        head = cast(nn.Module, self.pooled.language_model.get_output_embeddings())
        logits = head(states.to(next(head.parameters()).dtype))  # [B, V]
        return logits[:, torch.tensor(self.tokens, device=logits.device)].float()
