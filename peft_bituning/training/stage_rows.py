"""Training rows of an epoch, and their loss against the item table."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..data.samples import Sample
from ..losses import catalog_contrastive_loss
from ..tuners.bituning.encoders.mformer import row_scores
from ..tuners.rows.embedding_model import EmbeddingModel
from .arguments import LaserArguments
from .update import PassLoss


class StageRows:
    """An epoch's cuts of histories with the items that came next; an `EpochRows`.

    Args:
        encoder: its model says what reads a recommender and how many virtual tokens there are.
        samples: the rows.
        table: the item table, on the model's device.
        arguments: give the temperature and the chunk size of the loss.
        together: whether a user's rows run in one pass, which is exact where all have the same prefix.
    """

    def __init__(
        self,
        encoder: HistoryEncoder,
        samples: Sequence[Sample],
        table: ItemTable,
        arguments: LaserArguments,
        together: bool,
    ) -> None:
        self.encoder = encoder
        self.samples = samples
        self.table = table
        self.arguments = arguments
        self.lengths: Sequence[int] = [encoder.collator.length(sample.history) for sample in samples]
        self.users: Sequence[int] | None = [sample.user for sample in samples] if together else None
        self.weights: Sequence[int] = [1] * len(samples)
        self.aux_loss_coef = encoder.model.aux_loss_coef
        self.num_virtual_tokens = encoder.model.num_virtual_tokens + 1

    def loss(self, model: EmbeddingModel, rows: Sequence[int], is_idle: bool) -> PassLoss:
        """Encode rows with gradients and hold them against the catalog (Eq. 8); see `EpochRows.loss`.

        An idle process's row has no collaborative items, so that it does not count in load balancing either.
        """
        samples = [self.samples[row] for row in rows]
        histories = [sample.history for sample in samples]
        output, _ = self.encoder.around(model).forward(histories, "user", [()] if is_idle else None)
        targets = torch.tensor([sample.target for sample in samples], device=self.encoder.device)
        losses = catalog_contrastive_loss(
            output["pooler_output"],
            self.table.embeddings,
            targets,
            self.arguments.temperature,
            self.arguments.loss_chunk_size,
            reduction="none",
            is_normalized=True,
        )
        logits = output.router_logits
        return PassLoss(losses.sum(), output.aux_loss, None if logits is None else _expert_rows(logits.detach()))


def _expert_rows(router_logits: Tensor) -> Tensor:
    """Count the rows each expert takes [K]; rows without collaborative information (all logits zero) do not count."""
    mask = (router_logits != 0).any(-1)  # [B, N]
    scores = row_scores(router_logits, mask | ~mask.any(1, keepdim=True))  # [B, K]
    counted = scores[mask.any(1)].argmax(-1)
    return torch.bincount(counted, minlength=router_logits.shape[-1])
