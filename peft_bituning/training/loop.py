"""One optimizer update of the adapter, on any number of processes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..data.collator import HistoryBatch
from ..data.samples import Sample
from ..errors import NonFiniteLossError
from ..losses import catalog_contrastive_loss
from ..tuners.bituning import BiTuningOutput
from ..tuners.bituning.encoders.mformer import row_scores
from .arguments import LaserArguments
from .batches import share_of, split_by_tokens
from .sharding import average_gradients

AFTER_NON_FINITE = (
    "The last checkpoint is from before and stays; lower learning_rate or max_grad_norm, or use bfloat16 or float32, "
    "and start again with --overwrite_output_dir"
)


class UpdateLoop:
    """Trains the adapter against a fixed item table: `L = L_IIC + lambda L_LB` (paper Eq. 12).

    Args:
        accelerator: accelerate's launcher-independent device, precision and process handling.
        encoder: runs the model with gradients.
        model: the model as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        arguments: the run's settings.
        aux_loss_coef: lambda.
        num_updates: updates of the stage, for the learning-rate schedule.
        num_virtual_tokens: a row's tokens beside its text, for `arguments.max_tokens_per_pass`.
        one_pass_a_user: a user's rows run in one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: HistoryEncoder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        arguments: LaserArguments,
        aux_loss_coef: float,
        num_updates: int,
        num_virtual_tokens: int = 0,
        one_pass_a_user: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.encoder = encoder
        self.model = model
        self.optimizer = optimizer
        self.arguments = arguments
        self.aux_loss_coef = aux_loss_coef
        self.num_virtual_tokens = num_virtual_tokens
        self.one_pass_a_user = one_pass_a_user
        self.scheduler = get_cosine_schedule_with_warmup(
            optimizer, int(arguments.warmup_ratio * num_updates), num_updates
        )

    def run(self, samples: Sequence[Sample], rows: Sequence[int], table: ItemTable, where: str) -> dict[str, Any]:
        """Make one optimizer update.

        The loss of every row has the same weight, however the rows fall into processes and micro-batches.

        Args:
            samples: training rows of the epoch.
            rows: those of this update, over all processes.
            table: the item table, on the model's device.
            where: position in the run, for messages.

        Returns:
            `loss`, `contrastive_loss`, `aux_loss`, `grad_norm`, `learning_rate`, `expert_rows` (rows each expert
            took, [K]) and `tokens` (text tokens), over all processes.

        Raises:
            NonFiniteLossError: the loss or a gradient is not a finite number; nothing was updated.
        """
        accelerator, world = self.accelerator, self.accelerator.num_processes
        shares = self._passes(samples, rows)
        sums = torch.zeros(3, device=accelerator.device)  # contrastive, aux, tokens
        experts: Tensor | None = None
        for step, share in enumerate(shares[accelerator.process_index]):
            last = step == len(shares[0]) - 1
            part = sum(len(each[step]) for each in shares) / len(rows)  # of the update's rows, over all processes
            with nullcontext() if last else accelerator.no_sync(self.model):
                output, batch = self._forward(samples, share, rows[0])
                targets = torch.tensor([samples[row].target for row in share] or [0], device=accelerator.device)
                losses = catalog_contrastive_loss(
                    output["pooler_output"],
                    table.embeddings,
                    targets,
                    self.arguments.temperature,
                    self.arguments.loss_chunk_size,
                    reduction="none",
                    is_normalized=True,
                )
                weight = 1.0 if share else 0.0
                contrastive = losses.sum() * (weight / len(rows))
                loss = contrastive * world  # the mean over processes that DDP takes gives the sum
                if output.aux_loss is not None:
                    loss = loss + self.aux_loss_coef * output.aux_loss * part
                    sums[1] += output.aux_loss.detach() * part / world
                accelerator.backward(loss)
            sums[0] += contrastive.detach()
            sums[2] += float(batch.attention_mask.sum()) * weight
            if output.router_logits is not None:
                counts = _expert_rows(output.router_logits.detach())
                experts = counts if experts is None else experts + counts
        sums = accelerator.reduce(sums, reduction="sum")
        contrastive_loss, aux_loss = float(sums[0]), float(sums[1])
        total = contrastive_loss + self.aux_loss_coef * aux_loss
        if not _is_finite(total):
            raise NonFiniteLossError(self._explain(where, contrastive_loss, aux_loss))
        average_gradients(accelerator, self.model)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        grad_norm = float(norm) if norm is not None else 0.0
        if not _is_finite(grad_norm) and accelerator.scaler is None:
            raise NonFiniteLossError(self._explain(where, contrastive_loss, aux_loss))
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not getattr(self.optimizer, "step_was_skipped", False):
            self.scheduler.step()
        self.optimizer.zero_grad()
        return {
            "loss": total,
            "contrastive_loss": contrastive_loss,
            "aux_loss": aux_loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "expert_rows": [] if experts is None else accelerator.reduce(experts, reduction="sum").tolist(),
            "tokens": int(sums[2]),
        }

    def _passes(self, samples: Sequence[Sample], rows: Sequence[int]) -> list[list[list[int]]]:
        """Cut an update into the passes of each process; all make as many, the last of some without rows."""
        world = self.accelerator.num_processes
        passes: list[list[list[int]]] = []
        for process in range(world):
            passes.append([])
            for share in share_of(rows, process, world, self.arguments.gradient_accumulation_steps):
                if self.arguments.max_tokens_per_pass is None:
                    passes[-1].append(share)
                    continue
                histories = [samples[row].history for row in share]
                lengths = [self.encoder.collator.length(each) + self.num_virtual_tokens for each in histories]
                users = [samples[row].user for row in share] if self.one_pass_a_user else None
                passes[-1].extend(split_by_tokens(share, lengths, self.arguments.max_tokens_per_pass, users))
        most = max(map(len, passes))
        return [own + [[]] * (most - len(own)) for own in passes]

    def _forward(
        self, samples: Sequence[Sample], share: Sequence[int], idle_row: int
    ) -> tuple[BiTuningOutput, HistoryBatch]:
        """Run a micro-batch; a process without rows runs one without weight, as the others wait for its gradients."""
        if share:
            return self.encoder.forward([samples[row].history for row in share])
        # Without collaborative items it does not count in load balancing either.
        return self.encoder.forward([samples[idle_row].history], collaborative_histories=[()])

    def _explain(self, where: str, contrastive_loss: float, aux_loss: float) -> str:
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        weights = [name for name, value in parameters.items() if not bool(torch.isfinite(value).all())]
        if weights:
            cause = f"{len(weights)} trainable tensors are not finite, first {weights[0]}"
        elif not _is_finite(contrastive_loss):
            cause = (
                "the contrastive loss is not finite though the weights are: the base model overflowed, or the item "
                "table or the temperature is off"
            )
        elif not _is_finite(aux_loss):
            cause = "the load-balancing loss is not finite: the router's logits overflowed"
        else:
            cause = "the loss is finite but its gradient is not: the backward pass overflowed"
        return (
            f"training stopped at {where}: loss {contrastive_loss} + {self.aux_loss_coef} x {aux_loss}; {cause}. "
            f"{AFTER_NON_FINITE}"
        )


def _expert_rows(router_logits: Tensor) -> Tensor:
    """Count the rows each expert takes; rows without collaborative information (all logits zero) do not count."""
    mask = (router_logits != 0).any(-1)  # [B, N]
    scores = row_scores(router_logits, mask | ~mask.any(1, keepdim=True))  # [B, K]
    counted = scores[mask.any(1)].argmax(-1)
    return torch.bincount(counted, minlength=router_logits.shape[-1])


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
