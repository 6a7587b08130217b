"""One optimizer update, on any number of processes, of whatever has rows and a loss."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from ..errors import NonFiniteLossError
from ..tuners.rows.embedding_model import EmbeddingModel
from .arguments import LaserArguments
from .sharding import average_gradients
from .update_plan import plan_passes

AFTER_NON_FINITE = (
    "The last checkpoint is from before and stays; lower learning_rate or max_grad_norm, or use bfloat16 or float32, "
    "and start again with --overwrite_output_dir"
)


@dataclass(frozen=True)
class PassLoss:
    """The loss of one pass.

    Args:
        total: sum over its rows of weight times loss, a scalar.
        aux: a loss of the whole pass, unweighted, such as load balancing; None without one.
        expert_rows: rows that each expert took [K]; None without experts.
    """

    total: Tensor
    aux: Tensor | None = None
    expert_rows: Tensor | None = None


class EpochRows(Protocol):
    """The rows of an epoch.

    Args:
        aux_loss_coef: lambda, the weight of `PassLoss.aux`.
        num_virtual_tokens: tokens of a row beside its text, for `max_tokens_per_pass`.
    """

    aux_loss_coef: float
    num_virtual_tokens: int

    @property
    def lengths(self) -> Sequence[int]:
        """Text tokens of each row."""

    @property
    def users(self) -> Sequence[int] | None:
        """The user of each row where a user's rows run in one pass; None where each runs alone."""

    @property
    def weights(self) -> Sequence[int]:
        """What each row counts in the mean loss of an update."""

    def loss(self, model: EmbeddingModel, rows: Sequence[int], is_idle: bool) -> PassLoss:
        """Run a pass with gradients.

        Args:
            model: as accelerate prepared it.
            rows: numbers of its rows.
            is_idle: the process has no row of its own: one is run without weight, as the others wait for its gradients.
        """


class Update:
    """An optimizer with its schedule: AdamW, warm-up and cosine; `L = L_IIC + lambda L_LB` (paper Eq. 12).

    Args:
        accelerator: accelerate's launcher-independent device, precision and process handling.
        model: the model as `prepare_model` returned it.
        arguments: the run's settings.
        learning_rate: its peak.
        num_updates: updates of the stage, for the schedule.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: EmbeddingModel,
        arguments: LaserArguments,
        learning_rate: float,
        num_updates: int,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.arguments = arguments
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=arguments.weight_decay)
        accelerator.free_memory()  # it would unscale the gradients of an earlier stage's optimizer too (fp16)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        warmup = int(arguments.warmup_ratio * num_updates)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, warmup, num_updates)

    def run(self, epoch: EpochRows, rows: Sequence[int], where: str) -> dict[str, Any]:
        """Make one optimizer update.

        Every row has its weight, however the rows fall into processes and passes.

        Args:
            epoch: the epoch's rows.
            rows: numbers of those of this update, over all processes.
            where: position in the run, for messages.

        Returns:
            `loss`, `contrastive_loss` (the mean over rows), `aux_loss`, `grad_norm`, `learning_rate`, `expert_rows`
            (rows each expert took, [K]) and `tokens` (text tokens), over all processes.

        Raises:
            NonFiniteLossError: the loss or a gradient is not a finite number; nothing was updated.
        """
        accelerator = self.accelerator
        sums, experts = self._accumulate(epoch, rows)
        sums = accelerator.reduce(sums, reduction="sum")
        contrastive_loss, aux_loss = float(sums[0]), float(sums[1])
        total = contrastive_loss + epoch.aux_loss_coef * aux_loss
        if not isfinite(total):
            raise NonFiniteLossError(self._explain(where, contrastive_loss, aux_loss, epoch.aux_loss_coef))
        average_gradients(accelerator, cast(nn.Module, self.model))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        grad_norm = 0.0 if norm is None else float(norm)
        if not isfinite(grad_norm) and accelerator.scaler is None:
            raise NonFiniteLossError(self._explain(where, contrastive_loss, aux_loss, epoch.aux_loss_coef))
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
            "tokens": sum(epoch.lengths[row] for row in rows),
        }

    def _accumulate(self, epoch: EpochRows, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Run this process's passes backward; return its sums of both losses [2], and the rows of experts [K]."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        shares = self._passes(epoch, rows)
        total = sum(epoch.weights[row] for row in rows)
        sums = torch.zeros(2, device=accelerator.device)
        experts: Tensor | None = None
        for step, share in enumerate(shares[accelerator.process_index]):
            part = sum(len(each[step]) for each in shares) / len(rows)  # of the update's rows, over all processes
            with nullcontext() if step == len(shares[0]) - 1 else accelerator.no_sync(self.model):
                found = epoch.loss(self.model, share or rows[:1], not share)
                contrastive = found.total * ((1.0 if share else 0.0) / total)
                loss = contrastive * world  # the mean over processes that DDP takes gives the sum
                if found.aux is not None:
                    loss = loss + epoch.aux_loss_coef * found.aux * part
                    sums[1] += found.aux.detach() * part / world
                accelerator.backward(loss)
            sums[0] += contrastive.detach()
            if found.expert_rows is not None:
                experts = found.expert_rows if experts is None else experts + found.expert_rows
        return sums, experts

    def _passes(self, epoch: EpochRows, rows: Sequence[int]) -> list[list[list[int]]]:
        lengths = {row: epoch.lengths[row] + epoch.num_virtual_tokens for row in rows}
        world, settings = self.accelerator.num_processes, self.arguments
        accumulation, limit = settings.gradient_accumulation_steps, settings.max_tokens_per_pass
        return plan_passes(rows, lengths, epoch.users, world, accumulation, limit)

    def _explain(self, where: str, contrastive_loss: float, aux_loss: float, coef: float) -> str:
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        weights = [name for name, value in parameters.items() if not bool(torch.isfinite(value).all())]
        if weights:
            cause = f"{len(weights)} trainable tensors are not finite, first {weights[0]}"
        elif not isfinite(contrastive_loss):
            cause = (
                "the contrastive loss is not finite though the weights are: the base model overflowed, or the item "
                "table or the temperature is off"
            )
        elif not isfinite(aux_loss):
            cause = "the load-balancing loss is not finite: the router's logits overflowed"
        else:
            cause = "the loss is finite but its gradient is not: the backward pass overflowed"
        return (
            f"training stopped at {where}: loss {contrastive_loss} + {coef} x {aux_loss}; {cause}. {AFTER_NON_FINITE}"
        )
