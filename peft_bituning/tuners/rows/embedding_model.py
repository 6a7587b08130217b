"""The embedding model: what training and serving ask of anything that turns rows of text into embeddings."""

from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from .center import EmbeddingCenter
from .outputs import BiTuningOutput

Weights = dict[str, Tensor]


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
