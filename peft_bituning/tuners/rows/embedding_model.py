"""The embedding model: what training and serving ask of anything that turns rows of text into embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .center import EmbeddingCenter

Weights = dict[str, Tensor]


@dataclass
class BiTuningOutput(ModelOutput):
    """The output of `BiTuningModel.forward`.

    Args:
        loss: language-model loss over the text, a scalar; under `CAUSAL_LM` with `labels` only.
        logits: scores over the vocabulary at the text positions [B, T, V]; under `CAUSAL_LM` with `labels` only.
        last_hidden_state: states of the text tokens in the caller's layout [B, T, D], zero at padding.
        pooler_output: the user or item embedding [B, D].
        router_logits: the router's scores `m(u)` (Eq. 5) [B, N, K], zero at padding; None without a router.
        aux_loss: the load-balancing loss (Eq. 9), unweighted, a scalar; None without a router.
        hidden_states: states of every layer over the packed rows `[prefix | text | suffix | padding]`, on demand.
        attentions: attention weights over the packed rows, on demand.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    router_logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class EmbeddingModel(Protocol):
    """Text and what a frozen recommender says of the rows go in, one embedding per row comes out.

    A `PeftModel` with a Bi-Tuning or an iLoRA adapter is one, as it passes on what its tuner offers; so is any
    `nn.Module` with these names.
    """

    training: bool

    @property
    def num_virtual_tokens(self) -> int:
        """P, the tokens that it puts before the text."""

    @property
    def needs_collaborative(self) -> bool:
        """Whether it reads a frozen recommender; one that does not gives every row the same prefix."""

    @property
    def aux_loss_coef(self) -> float:
        """Weight of `aux_loss` in the training loss (paper: lambda); 0 where there is none."""

    @property
    def embedding_center(self) -> EmbeddingCenter | None:
        """What the embeddings are centered by; None where they are not."""

    def __call__(self, **inputs: Any) -> BiTuningOutput:
        """Embed rows: `input_ids`, `attention_mask` [B, T], `collaborative_embeds` [B, N, C], `collaborative_mask`."""

    def weights_out(self) -> Weights:
        """Copy the trained weights to the CPU, by their names in a file."""

    def weights_in(self, weights: Weights) -> None:
        """Put back what `weights_out` copied."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights; those that require a gradient are trained."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all weights with their names."""

    def train(self, mode: bool = True) -> Self:
        """Switch training mode on or off."""

    def to(self, device: torch.device) -> Self:
        """Move to a device."""
