"""The two training stages (paper Section 3.3.2)."""

import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ..artifacts import weights_hash
from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..catalog.item_tables import TABLES, encode_table
from ..data.samples import LeaveOneOut, Sample
from ..errors import CheckpointError, InputError, NonFiniteLossError
from ..tuners.bituning import BiTuningModel, EmbeddingCenter, EmbeddingTuner, PrefixEncoder
from .arguments import LaserArguments
from .batches import plan_updates
from .checkpoint import Checkpoint, CheckpointStore
from .loop import AFTER_NON_FINITE, UpdateLoop
from .parameter_groups import parameter_groups
from .ranking import rank_users
from .resumable import ResumableTraining
from .stage_result import ItemSide, StageResult, Weights
from .state import RunningMeans

logger = logging.getLogger(__name__)

ADAPTER = "default"
ITEMS = "items-"  # the tensors of an item side in a checkpoint, by its epoch


class TwoStageTraining(ResumableTraining):
    """Trains the adapter: stage 1 refreshes the item table every epoch, stage 2 keeps the best one.

    Stage 1 encodes the table with the weights A at the start of an epoch, trains against it and validates the new
    weights A' on it; the epoch with the best validation NDCG gives A', A and the table. Stage 2 starts from A',
    keeps the table fixed, and keeps its own best epoch. A stage 1 without epochs leaves the untrained adapter and its
    table (the paper's "w/o training stage 1", Table 4).

    Args:
        accelerator: accelerate's device, precision and process handling.
        model: the PEFT model, not yet prepared by accelerate.
        encoder: encodes without gradients, on the unwrapped model.
        split: who is trained and validated on what.
        num_items: I.
        arguments: the run's settings.
        store: where checkpoints go.
        identity: hashes of data, recommender and base model that a resumed run must share.
    """

    constant_groups = ITEMS

    def __init__(
        self,
        accelerator: Accelerator,
        model: PeftModel,
        encoder: HistoryEncoder,
        split: LeaveOneOut,
        num_items: int,
        arguments: LaserArguments,
        store: CheckpointStore,
        identity: dict[str, Any],
    ) -> None:
        super().__init__(accelerator, model, arguments, store, identity)
        self.model = model
        self.encoder = encoder
        self.split = split
        self.num_items = num_items
        self.validation = validation_samples(split, arguments)
        parameter_groups(model, arguments.learning_rate, arguments)  # refuses what does not fit before any work
        self.items: ItemSide | None = None
        self.best: StageResult | None = None
        self.stage1: StageResult | None = None
        self._loop: UpdateLoop | None = None

    # ------------------------------------------------------------------ stages

    def run(self, first_table: ItemTable | None = None) -> tuple[StageResult, StageResult]:
        """Run both stages, from the checkpoint that `read_checkpoint` found, if any.

        Args:
            first_table: the item table of the untrained adapter, where it is at hand already.

        Returns:
            What stage 1 and stage 2 keep; the same where `stage2_epochs` is 0.

        Raises:
            NonFiniteLossError: training met a loss that is not finite.
        """
        self._started = time.perf_counter()
        if self._saved is not None:
            self._restore(self._saved)
            self._saved = None
        else:
            set_seed(self.arguments.seed, device_specific=True)  # processes draw different dropout masks
            if first_table is not None:
                self.items = ItemSide(1, self._weights(), first_table)
        while self.state.stage <= 2:
            self._run_stage()
        if self.stage1 is None or self.best is None:
            raise CheckpointError("the checkpoint holds no result of stage 1; start again with --overwrite_output_dir")
        return self.stage1, self.best

    def _run_stage(self) -> None:
        state, arguments = self.state, self.arguments
        epochs = arguments.stage1_epochs if state.stage == 1 else arguments.stage2_epochs
        while state.epoch < epochs and state.epoch - state.best_epoch < arguments.early_stopping_patience:
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
                self.set_weights(self.stage1.user_weights)
                self.items = self.stage1.item_side
        state.stage, state.epoch, state.update = state.stage + 1, 0, 0
        state.best_epoch, state.best_metric = 0, -1.0
        self._loop = None
        self._save()

    def _untrained(self) -> StageResult:
        """What a stage 1 without epochs keeps: the weights and the item table that training starts from."""
        items = self.items or self._encode_side(1)
        table = items.table.to(self.accelerator.device)
        report = rank_users(self.encoder, self.validation, table, self._progress, "validating before training")
        return StageResult(self._weights(), items, 0, report.metrics())

    def _run_epoch(self) -> None:
        state, arguments = self.state, self.arguments
        started = time.perf_counter()
        if self.items is None or (state.stage == 1 and self.items.epoch != state.epoch + 1):
            self.items = self._encode_side(state.epoch + 1)
        table = self.items.table.to(self.accelerator.device)
        samples = self._epoch_samples(self._epoch_number())
        updates = self._plan(samples, self._epoch_number())
        loop = self._loop or self._start_loop()
        self.model.train()
        with tqdm(
            total=len(updates),
            initial=state.update,
            desc=f"stage {state.stage} epoch {state.epoch + 1}",
            unit="update",
            disable=not self._progress,
            leave=False,
        ) as bar:
            while state.update < len(updates):
                where = f"stage {state.stage}, epoch {state.epoch + 1}, update {state.update + 1}"
                values = loop.run(samples, updates[state.update], table, where)
                state.update += 1
                state.global_step += 1
                self._log(values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                bar.update()
                if state.global_step % arguments.save_steps == 0 and state.update < len(updates):
                    self._save()
        self._end_epoch(self.items, table, time.perf_counter() - started)

    def _end_epoch(self, items: ItemSide, table: ItemTable, seconds: float) -> None:
        state = self.state
        try:
            report = rank_users(
                self.encoder, self.validation, table, self._progress, f"validating epoch {state.epoch + 1}"
            )
        except InputError as error:  # the epoch's last update broke the weights
            raise NonFiniteLossError(
                f"training stopped at stage {state.stage}, epoch {state.epoch + 1}, after update {state.update}: the "
                f"weights are no good any more, {error}. {AFTER_NON_FINITE}"
            ) from error
        metrics = report.metrics()
        total = sum(state.expert_rows)
        record: dict[str, Any] = {
            "stage": state.stage,
            "epoch": state.epoch + 1,
            "global_step": state.global_step,
            **{f"train_{name}": value for name, value in state.since_epoch.means().items()},
            "valid": metrics,
            "expert_load": [rows / total for rows in state.expert_rows] if total else None,
            "seconds": seconds,
        }
        state.epochs.append(record)
        state.since_epoch, state.expert_rows = RunningMeans(), []
        state.epoch, state.update = state.epoch + 1, 0
        metric = metrics["unfiltered"]["ndcg@10"]
        if metric > state.best_metric:
            state.best_metric, state.best_epoch = metric, state.epoch
            self.best = StageResult(self._weights(), items, state.epoch, metrics)
        self.accelerator.log({"valid_ndcg@10": metric, "stage": state.stage}, step=state.global_step)
        if self.accelerator.is_main_process:
            logger.info(
                "stage %d epoch %d: train loss %.4f, validation NDCG@10 %.4f, expert load %s, %.0f s",
                state.stage,
                state.epoch,
                record["train_loss"],
                metric,
                "-" if record["expert_load"] is None else [round(share, 2) for share in record["expert_load"]],
                seconds,
            )

    # ------------------------------------------------------------------ pieces

    @property
    def _one_pass_a_user(self) -> bool:
        """Whether a user's rows are put together; an encoder that reads nothing of a row gives all the same prefix."""
        if self.arguments.group_cuts is not None:
            return self.arguments.group_cuts
        return not self._prefix_encoder.needs_collaborative

    @property
    def _prefix_encoder(self) -> PrefixEncoder:
        return cast(BiTuningModel, self.model.base_model).prefix_encoder

    @property
    def _embedding_center(self) -> EmbeddingCenter | None:
        return cast(EmbeddingTuner, self.model.base_model).embedding_center

    @property
    def _aux_loss_coef(self) -> float:
        return getattr(self.model.peft_config[ADAPTER], "router_aux_loss_coef", 0.0)

    def _epoch_number(self) -> int:
        return self.state.epoch + (self.arguments.stage1_epochs if self.state.stage == 2 else 0)

    def _epoch_samples(self, epoch: int) -> list[Sample]:
        arguments = self.arguments
        samples = self.split.training_samples(arguments.cuts, arguments.seed, epoch)  # type: ignore[arg-type]
        return samples[: arguments.max_samples_per_epoch]

    def _plan(self, samples: Sequence[Sample], epoch: int) -> list[list[int]]:
        lengths = [self.encoder.collator.length(sample.history) for sample in samples]
        users = [sample.user for sample in samples] if self._one_pass_a_user else None
        return plan_updates(lengths, self.rows_per_update, self.arguments.seed, epoch, users)

    def _encode_side(self, epoch: int, center: bool = True) -> ItemSide:
        """Encode the item table with the weights at hand, which are centered by it first where the adapter is."""
        identity = {**self.identity, "weights": weights_hash(self._weights())}
        moved = self._embedding_center if center else None
        tables = self.store.folder / TABLES
        table = encode_table(self.encoder, self.num_items, tables, identity, self._progress, moved)
        return ItemSide(epoch, self._item_weights(), table)

    def _start_loop(self) -> UpdateLoop:
        arguments, stage = self.arguments, self.state.stage
        rate = arguments.learning_rate
        epochs = arguments.stage1_epochs
        if stage == 2:
            rate, epochs = arguments.stage2_learning_rate or rate / 3, arguments.stage2_epochs
        updates = -(-len(self._epoch_samples(0)) // self.rows_per_update)
        groups = parameter_groups(self.model, rate, arguments)
        optimizer = torch.optim.AdamW(groups, weight_decay=arguments.weight_decay)
        self.accelerator.free_memory()  # it would unscale the gradients of stage 1's optimizer too (fp16)
        optimizer = self.accelerator.prepare_optimizer(optimizer)
        encoder = HistoryEncoder(
            self._prepared,
            self.encoder.collator,
            self.encoder.recommender,
            self.accelerator.device,
            self.encoder.batch_size,
            self.encoder.max_collaborative_states,
            self.encoder.item_collaborative,
        )
        self._loop = UpdateLoop(
            self.accelerator,
            encoder,
            self._prepared,
            optimizer,
            arguments,
            self._aux_loss_coef,
            updates * epochs,
            self._prefix_encoder.num_tokens + 1,
            self._one_pass_a_user,
        )
        return self._loop

    def _log(self, values: dict[str, Any]) -> None:
        state = self.state
        numbers = {name: values[name] for name in ("loss", "contrastive_loss", "aux_loss", "grad_norm", "tokens")}
        state.since_log.add(numbers)
        state.since_epoch.add(numbers)
        counts = values["expert_rows"]
        state.expert_rows = [a + b for a, b in zip(state.expert_rows or [0] * len(counts), counts, strict=True)]
        if state.global_step % self.arguments.logging_steps:
            return
        means = {**state.since_log.means(), "learning_rate": values["learning_rate"]}
        state.since_log = RunningMeans()
        state.log_history.append({"stage": state.stage, "epoch": state.epoch + 1, "step": state.global_step, **means})
        self.accelerator.log(means, step=state.global_step)

    def _weights(self) -> Weights:
        weights = get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
        return {name: value.detach().cpu().clone() for name, value in weights.items()}

    def _item_weights(self) -> Weights:
        """The weights to keep beside an item table, for new items."""
        return self._weights()

    def set_weights(self, weights: Weights) -> None:
        """Put weights into the trained adapter."""
        set_peft_model_state_dict(self.model, weights, adapter_name=ADAPTER)

    # ------------------------------------------------------------------ checkpoints

    def _moving(self) -> tuple[torch.optim.Optimizer, LRScheduler] | None:
        return None if self._loop is None else (self._loop.optimizer, self._loop.scheduler)

    def _kept(self) -> Checkpoint:
        groups = {"adapter": self._weights()}
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
        self.set_weights(tensors["adapter"])
        sides = {epoch: ItemSide.from_tensors(epoch, tensors[f"{ITEMS}{epoch}"]) for epoch in set(numbers.values())}
        self.items = sides[numbers["current"]] if "current" in numbers else None
        results = {
            name: StageResult(tensors[name], sides[numbers[name]], **kept) for name, kept in saved.state["kept"].items()
        }
        self.best, self.stage1 = results.get("best"), results.get("stage1")
        if saved.state["optimizer"] is not None:
            self._start_loop()


def validation_samples(split: LeaveOneOut, arguments: LaserArguments) -> list[Sample]:
    """Return the users to validate on, all of them or a seeded draw of `max_validation_users`."""
    samples = split.samples("valid")
    limit = arguments.max_validation_users
    if limit is None or limit >= len(samples):
        return samples
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = torch.randperm(len(samples), generator=generator)[:limit].sort().values
    return [samples[index] for index in chosen.tolist()]
