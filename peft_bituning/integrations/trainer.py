"""Training with transformers' own `Trainer`: its batches and its loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..data.samples import Sample
from ..losses import catalog_contrastive_loss


@dataclass(frozen=True)
class SampleCollator:
    """Makes of training samples what `Trainer` feeds the model: its `data_collator`.

    `TrainingArguments(remove_unused_columns=False)` is needed, or the collaborative inputs are dropped.

    Args:
        encoder: the model's histories to inputs; its recommender stays frozen.
    """

    encoder: HistoryEncoder

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate samples.

        Args:
            samples: B histories with their targets.

        Returns:
            The model's inputs, and `labels` [B, 2]: the target's catalog index behind a -100. `Trainer` counts labels,
            for some models without the first column; so it counts rows.
        """
        inputs, _ = self.encoder.inputs([sample.history for sample in samples])
        targets = torch.tensor([[-100, sample.target] for sample in samples])
        return {**inputs, "labels": targets}


@dataclass
class CatalogLoss:
    """The training loss for `Trainer(compute_loss_func=...)`: `L = L_IIC + lambda L_LB` (paper Eq. 12).

    With gradient accumulation and on several processes every row has the same weight, as in the package's own loop.

    Args:
        table: the item table [I, D].
        temperature: of the contrastive loss.
        router_aux_loss_coef: lambda.
        chunk_size: items a chunk, for large tables.
    """

    table: ItemTable
    temperature: float = 0.05
    router_aux_loss_coef: float = 0.01
    chunk_size: int | None = None

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the share of a micro-batch in the update's loss.

        Args:
            outputs: the model's.
            labels: [B, 2] from `SampleCollator`.
            num_items_in_batch: rows of the update, over all micro-batches and processes; None means B.

        Returns:
            Scalar.
        """
        targets = labels[:, -1]
        embeddings = outputs["pooler_output"]
        self.table = self.table.to(embeddings.device)
        rows = len(targets) if num_items_in_batch is None else num_items_in_batch
        losses = catalog_contrastive_loss(
            embeddings,
            self.table.embeddings,
            targets,
            self.temperature,
            self.chunk_size,
            reduction="none",
            is_normalized=self.table.embeddings.dtype == torch.float32,
        )
        loss = losses.sum() / rows
        if outputs.get("aux_loss") is not None:
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"] * (len(targets) / rows)
        return loss
