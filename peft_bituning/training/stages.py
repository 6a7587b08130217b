"""The two training stages (paper Section 3.3.2)."""

import logging
import time
from typing import Any

import torch
from accelerate import Accelerator

from ..artifacts import weights_hash
from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..catalog.item_tables import TABLES, encode_table
from ..data.samples import LeaveOneOut, Sample
from ..errors import CheckpointError, InputError, NonFiniteLossError
from ..evaluation import rank_users
from .arguments import LaserArguments
from .checkpoint import Checkpoint, CheckpointStore
from .resumable import ResumableTraining
from .stage_result import ItemSide, StageResult
from .stage_rows import StageRows
from .update import AFTER_NON_FINITE, Update
from .update_plan import plan_updates

logger = logging.getLogger(__name__)

ADAPTER = "default"
ITEMS = "items-"  # the tensors of an item side in a checkpoint, by its epoch


class TwoStageTraining(ResumableTraining):
    """Trains the model: stage 1 refreshes the item table every epoch, stage 2 keeps the best one.

    Stage 1 encodes the table with the weights A at the start of an epoch, trains against it and validates the new
    weights A' on it; the epoch with the best validation NDCG gives A', A and the table. Stage 2 starts from A',
    keeps the table fixed, and keeps its own best epoch. A stage 1 without epochs leaves the untrained adapter and its
    table (the paper's "w/o training stage 1", Table 4).

    Args:
        accelerator: accelerate's device, precision and process handling.
        encoder: encodes without gradients; its model, not yet prepared by accelerate, is what is trained.
        split: who is trained and validated on what.
        num_items: I.
        arguments: the run's settings.
        store: where checkpoints go.
        identity: hashes of data, recommender and base model that a resumed run must share.
        together: put a user's rows into the same updates and run them in one pass; None does so where all of them have
            the same prefix.
    """

    constant_groups = ITEMS

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: HistoryEncoder,
        split: LeaveOneOut,
        num_items: int,
        arguments: LaserArguments,
        store: CheckpointStore,
        identity: dict[str, Any],
        together: bool | None = None,
    ) -> None:
        super().__init__(accelerator, encoder.model, arguments, store, identity)
        self.encoder = encoder
        self.split = split
        self.num_items = num_items
        self.together = not self.model.needs_collaborative if together is None else together
        self.validation = arguments.validation_samples(split)
        self.items: ItemSide | None = None
        self.best: StageResult | None = None
        self.stage1: StageResult | None = None

    # ------------------------------------------------------------------ stages

    def run(self, first_table: ItemTable | None = None) -> tuple[StageResult, StageResult]:
        """Run both stages, from the checkpoint that `read_checkpoint` found, if any.

        Args:
            first_table: the item table of the untrained model, where it is at hand already; a model that centers its
                embeddings moves the center first, and encodes its own.

        Returns:
            What stage 1 and stage 2 keep; the same where `stage2_epochs` is 0.

        Raises:
            NonFiniteLossError: training met a loss that is not finite.
        """
        if not self._begin() and first_table is not None and self.model.embedding_center is None:
            self.items = ItemSide(1, self.model.weights_out(), first_table)
        while self.state.stage <= 2:
            self._run_stage()
        if self.stage1 is None or self.best is None:
            raise CheckpointError("the checkpoint holds no result of stage 1; start again with --overwrite_output_dir")
        return self.stage1, self.best

    def _run_stage(self) -> None:
        state = self.state
        epochs = self.arguments.stage1_epochs if state.stage == 1 else self.arguments.stage2_epochs
        while self._goes_on(epochs):
            self._run_epoch()
            self._save()
        if state.epoch < epochs:
            logger.info("stage %d stops early after epoch %d", state.stage, state.epoch)
        if self.best is None:
            self.best = self._untrained() if state.stage == 1 else self.stage1
        if state.stage == 1:
            self.stage1 = self.best
            self.best = None
            if self.stage1 is not None:
                self.model.weights_in(self.stage1.user_weights)
                self.items = self.stage1.item_side
        state.stage, state.epoch, state.update = state.stage + 1, 0, 0
        state.best_epoch, state.best_metric = 0, -1.0
        self.update = None
        self._save()

    def _untrained(self) -> StageResult:
        """What a stage 1 without epochs keeps: the weights and the item table that training starts from."""
        items = self.items or self._encode_side(1)
        table = items.table.to(self.accelerator.device)
        report = rank_users(self.encoder, self.validation, table, self._progress, "validating before training")
        return StageResult(self.model.weights_out(), items, 0, report.metrics())

    def _run_epoch(self) -> None:
        state = self.state
        started = time.perf_counter()
        if self.items is None or (state.stage == 1 and self.items.epoch != state.epoch + 1):
            self.items = self._encode_side(state.epoch + 1)
        table = self.items.table.to(self.accelerator.device)
        number = state.epoch + (self.arguments.stage1_epochs if state.stage == 2 else 0)
        rows = StageRows(self.encoder, self.epoch_samples(number), table, self.arguments, self.together)
        plan = plan_updates(rows.lengths, self.rows_per_update, self.arguments.seed, number, rows.users)
        name = f"stage {state.stage}, epoch {state.epoch + 1}"
        self._run_updates(rows, plan, name)
        seconds = time.perf_counter() - started
        try:
            report = rank_users(
                self.encoder, self.validation, table, self._progress, f"validating epoch {state.epoch + 1}"
            )
        except InputError as error:  # the epoch's last update broke the weights
            raise NonFiniteLossError(
                f"training stopped at {name}, after update {state.update}: the weights are no good any more, {error}. "
                f"{AFTER_NON_FINITE}"
            ) from error
        metrics = report.metrics()
        metric = metrics["unfiltered"]["ndcg@10"]
        if self._end_epoch(metric, metrics, seconds):
            self.best = StageResult(self.model.weights_out(), self.items, state.epoch, metrics)
        self.accelerator.log({"valid_ndcg@10": metric, "stage": state.stage}, step=state.global_step)

    # ------------------------------------------------------------------ pieces

    def epoch_samples(self, number: int) -> list[Sample]:
        """Return the training rows of an epoch, which is counted from 0 over both stages."""
        arguments = self.arguments
        samples = self.split.training_samples(arguments.cuts, arguments.seed, number)  # type: ignore[arg-type]
        return samples[: arguments.max_samples_per_epoch]

    def _encode_side(self, epoch: int, moves_center: bool = True) -> ItemSide:
        """Encode the item table with the weights at hand; the center, if there is one, moves to its mean first."""
        center = self.model.embedding_center if moves_center else None
        identity = {**self.identity, "weights": weights_hash(self.model.weights_out())}
        table = encode_table(self.encoder, self.num_items, self.store.folder / TABLES, identity, self._progress, center)
        return ItemSide(epoch, self._item_weights(), table)

    def _item_weights(self) -> dict[str, torch.Tensor]:
        """The weights to keep beside an item table, for new items."""
        return self.model.weights_out()

    def _start_update(self) -> Update:
        arguments, rate, epochs = self.arguments, self.arguments.learning_rate, self.arguments.stage1_epochs
        if self.state.stage == 2:
            rate, epochs = arguments.stage2_learning_rate or rate / 3, arguments.stage2_epochs
        updates = -(-len(self.epoch_samples(0)) // self.rows_per_update)
        return Update(self.accelerator, self._prepared, arguments, rate, updates * epochs)

    # ------------------------------------------------------------------ checkpoints

    def _kept(self) -> Checkpoint:
        groups = {"adapter": self.model.weights_out()}
        sides = [self.items]
        numbers: dict[str, int] = {}
        kept: dict[str, Any] = {}
        for name, result in (("best", self.best), ("stage1", self.stage1)):
            if result is not None:
                groups[name] = result.user_weights
                numbers[name] = result.item_side.epoch
                kept[name] = {"epoch": result.epoch, "valid": result.valid}
                sides.append(result.item_side)
        if self.items is not None:
            numbers["current"] = self.items.epoch
        groups |= {f"{ITEMS}{side.epoch}": side.to_tensors() for side in sides if side is not None}
        return Checkpoint({"item_sides": numbers, "kept": kept}, groups)

    def _put_back(self, saved: Checkpoint) -> None:
        tensors, numbers = saved.tensors, saved.state["item_sides"]
        self.model.weights_in(tensors["adapter"])
        sides = {epoch: ItemSide.from_tensors(epoch, tensors[f"{ITEMS}{epoch}"]) for epoch in set(numbers.values())}
        self.items = sides[numbers["current"]] if "current" in numbers else None
        results = {
            name: StageResult(tensors[name], sides[numbers[name]], **kept) for name, kept in saved.state["kept"].items()
        }
        self.best, self.stage1 = results.get("best"), results.get("stage1")
