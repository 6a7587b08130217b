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

    `TrainingArguments(remove_unused_columns=False)` is needed, or the collaborative inputs are dropped. The encoder's
    recommender stays frozen.
    """

    encoder: HistoryEncoder

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate B samples to the model's inputs and `labels` [B, 2].

        These are the targets' catalog indices behind a -100: `Trainer` counts labels, for some models without the first
        column, and so it counts rows.
        """
        inputs, _ = self.encoder.inputs([sample.history for sample in samples])
        targets = torch.tensor([[-100, sample.target] for sample in samples])
        return {**inputs, "labels": targets}


@dataclass
class CatalogLoss:
    """The training loss for `Trainer(compute_loss_func=...)`: `L = L_IIC + lambda L_LB` (paper Eq. 12).

    With gradient accumulation and on several processes every row has the same weight, as in the package's own loop.
    """

    table: ItemTable
    temperature: float = 0.05
    router_aux_loss_coef: float = 0.01  # lambda
    chunk_size: int | None = None  # items per chunk, for large tables

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the share of a micro-batch, with `labels` [B, 2] from `SampleCollator`, in the update's loss.

        The update has `num_items_in_batch` rows, over all micro-batches and processes; None means B.
        """
        targets = labels[:, -1]
        embeddings = outputs["pooler_output"]
        self.table = self.table.to(embeddings.device)
        rows = len(targets) if num_items_in_batch is None else num_items_in_batch
        table, exact = self.table.embeddings, self.table.embeddings.dtype == torch.float32
        losses = catalog_contrastive_loss(
            embeddings, table, targets, self.temperature, self.chunk_size, reduction="none", is_normalized=exact
        )
        loss = losses.sum() / rows
        if outputs.get("aux_loss") is not None:
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"] * (len(targets) / rows)
        return loss
