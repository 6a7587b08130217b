"""Training of an ID-based recommender with early stopping on validation NDCG@10."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collator import pad_histories
from ..data.samples import HistoryAndTarget
from ..errors import ConfigurationError, DataError, NonFiniteLossError
from ..metrics import ranking_metrics, target_ranks
from .transformer import ItemSequenceModel

logger = logging.getLogger(__name__)

# Batches are cut from pools of this many batches sorted by length: little padding, still shuffled.
POOL_BATCHES = 16
MAX_SCORES = 1 << 24  # held at once in validation: 64 MiB


@dataclass
class FitReport:
    """What happened in a training run.

    Args:
        losses: Mean training loss of each epoch.
        valid_ndcg: Validation NDCG@10 (unfiltered) of each validated epoch, by epoch number from 1; empty without
            validation samples.
        best_epoch: The epoch whose weights were kept (the last one without validation samples).
        best_ndcg: Its validation NDCG@10, or `None`.
        stopped_early: Whether patience ran out.
        seconds: Wall-clock time.
    """

    losses: list[float] = field(default_factory=list)
    valid_ndcg: dict[int, float] = field(default_factory=dict)
    best_epoch: int = 0
    best_ndcg: float | None = None
    stopped_early: bool = False
    seconds: float = 0.0


def fit_recommender(
    model: ItemSequenceModel,
    sequences: Sequence[Sequence[int]],
    valid_samples: Sequence[HistoryAndTarget] = (),
    *,
    epochs: int = 100,
    batch_size: int = 512,
    batch_positions: int = 4096,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    patience: int = 10,
    validate_every: int = 1,
    seed: int = 0,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> FitReport:
    """Train a SASRec or BERT4Rec in place and leave it with the weights of its best epoch.

    Args:
        model: The model; it is moved to `device` and left there, in evaluation mode.
        sequences: Training histories of catalog indices, oldest first; those with one item or none teach nothing.
        valid_samples: Histories and targets for early stopping; without them the last epoch is kept.
        epochs: Most passes over the training sequences.
        batch_size: Most rows of a step; a sequence longer than `max_length` + 1 makes several rows.
        batch_positions: Most rows x longest row of a step (one row at least), so that long histories do not make
            few and huge steps.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        patience: Stop after so many validations without a better NDCG@10.
        validate_every: Epochs from one validation to the next.
        seed: Of the shuffling, the masking and the dropout; torch's global random state is left as it was.
        progress: Show a bar over the epochs.
        device: Where to train; `None` is where the model is.

    Raises:
        ConfigurationError: A setting is out of its range.
        DataError: No sequence has two items, or an item lies outside the model's catalog.
        NonFiniteLossError: The loss is NaN or infinite (epoch, step and cause are named).
    """
    counts = {"epochs": epochs, "batch_size": batch_size, "batch_positions": batch_positions}
    for name, count in {**counts, "patience": patience, "validate_every": validate_every}.items():
        if count < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {count!r}")
    if not learning_rate > 0:
        raise ConfigurationError(f"learning_rate must be above 0, got {learning_rate!r}")
    rows = _training_rows(model, sequences)
    model.to(model.device if device is None else device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    training = _Training(model, *rows, optimizer, torch.Generator().manual_seed(seed), batch_size, batch_positions)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return training.run(valid_samples, epochs, patience, validate_every, progress)


@dataclass(frozen=True)
class _Training:
    """A model, its training rows, and what a step needs."""

    model: ItemSequenceModel
    rows: Tensor  # [rows, L] catalog indices from column 0 on
    lengths: Tensor  # [rows]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    batch_size: int
    batch_positions: int

    def run(
        self, valid_samples: Sequence[HistoryAndTarget], epochs: int, patience: int, validate_every: int, progress: bool
    ) -> FitReport:
        """Train until the last epoch or until patience runs out, then go back to the best epoch's weights."""
        model, report = self.model, FitReport()
        best_weights: dict[str, Tensor] | None = None
        started = time.monotonic()
        bar = tqdm(range(1, epochs + 1), desc=f"fit {model.recommender_type}", disable=not progress, unit="epoch")
        for epoch in bar:
            report.losses.append(self._epoch(epoch))
            if not valid_samples:
                report.best_epoch = epoch
            elif epoch % validate_every == 0 or epoch == epochs:
                ndcg = report.valid_ndcg[epoch] = validation_ndcg(model, valid_samples)
                if report.best_ndcg is None or ndcg > report.best_ndcg:
                    report.best_epoch, report.best_ndcg = epoch, ndcg
                    best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                bar.set_postfix(loss=f"{report.losses[-1]:.4f}", ndcg=f"{ndcg:.4f}", best=f"{report.best_ndcg:.4f}")
                if sum(validated > report.best_epoch for validated in report.valid_ndcg) >= patience:
                    report.stopped_early = True
                    break
        if best_weights is not None:
            model.load_state_dict(best_weights)
        model.eval()
        report.seconds = time.monotonic() - started
        logger.info("%s kept epoch %d, NDCG@10 %s", model.recommender_type, report.best_epoch, report.best_ndcg)
        return report

    def _epoch(self, epoch: int) -> float:
        """Train for one epoch and return the mean loss of its rows."""
        self.model.train()
        loss_sum = 0.0
        for step, batch in enumerate(self._batches(), start=1):
            lengths = self.lengths[batch]
            rows = self.rows[batch, : int(lengths.max())]
            loss = self.model.training_loss(rows.to(self.model.device), lengths.to(self.model.device), self.generator)
            value = loss.item()
            if not math.isfinite(value):
                raise self._non_finite(epoch, step, value)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss_sum += value * len(batch)
        return loss_sum / len(self.lengths)

    def _batches(self) -> Iterator[Tensor]:
        """Yield shuffled row numbers, rows of like length together."""
        order = torch.randperm(len(self.lengths), generator=self.generator)
        batches: list[Tensor] = []
        for pool in order.split(self.batch_size * POOL_BATCHES):
            by_length = pool[self.lengths[pool].argsort(stable=True)]
            end = len(by_length)
            while end > 0:
                width = int(self.lengths[by_length[end - 1]])
                start = max(0, end - max(1, min(self.batch_size, self.batch_positions // width)))
                batches.append(by_length[start:end])
                end = start
        for position in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[position]

    def _non_finite(self, epoch: int, step: int, value: float) -> NonFiniteLossError:
        bad = [name for name, tensor in self.model.named_parameters() if not bool(torch.isfinite(tensor).all())]
        cause = f"weights already not finite: {bad[:3]}" if bad else "the weights are finite, the loss overflowed"
        return NonFiniteLossError(
            f"training {self.model.recommender_type}: the loss is {value} in epoch {epoch}, step {step} ({cause}); "
            f"lower learning_rate (now {self.optimizer.param_groups[0]['lr']}) or check the initial weights"
        )


def validation_ndcg(model: ItemSequenceModel, samples: Sequence[HistoryAndTarget], batch_size: int = 512) -> float:
    """Return the unfiltered NDCG@10, with mid-rank ties, of a model over samples, at least one.

    Rows scored at once are `batch_size`, or fewer where that would be more than 16.8 million scores.
    """
    ranks: list[float] = []
    batch_size = min(batch_size, max(1, MAX_SCORES // model.num_items))
    by_length = sorted(samples, key=lambda sample: len(sample.history))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        item_indices, mask = pad_histories([sample.history for sample in batch], model.max_length)
        scores = model.scores(item_indices.to(model.device), mask.to(model.device))
        ranks.extend(target_ranks(scores, [sample.target for sample in batch]))
    return ranking_metrics(ranks, k=10)["ndcg@10"]


def _training_rows(model: ItemSequenceModel, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Cut sequences into windows that share one item, so that every item but the first is a target once."""
    windows: list[Sequence[int]] = []
    for position, sequence in enumerate(sequences):
        outside = [item for item in sequence if not 0 <= item < model.num_items]
        if outside:
            raise DataError(
                f"training sequence {position} holds catalog indices {outside[:5]} outside 0 to {model.num_items - 1}; "
                "build the model with the size of this catalog"
            )
        end = len(sequence)
        while end >= 2:  # something to see and something to predict
            start = max(0, end - model.max_length - 1)
            windows.append(sequence[start:end])
            end = start + 1
    if not windows:
        raise DataError(f"no training sequence has 2 items or more, got {len(sequences)} sequences")
    rows, mask = pad_histories(windows)
    return rows, mask.sum(1)


def default_fit_arguments(kind: str) -> dict[str, Any]:
    """Return, in a new dict, the keyword arguments of `fit_recommender` that did best on validation.

    Args:
        kind: `"sasrec"` or `"bert4rec"`.

    Raises:
        ConfigurationError: No such kind.
    """
    best = {"sasrec": {"epochs": 200, "patience": 10}, "bert4rec": {"epochs": 400, "patience": 20}}
    if kind not in best:
        raise ConfigurationError(f"kind must be one of {', '.join(best)}, got {kind!r}")
    return {"batch_size": 512, "learning_rate": 2e-3, "weight_decay": 0.0, **best[kind]}
