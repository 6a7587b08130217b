"""The report of a run: what the model is held against, what it reached, and what that was measured with."""

import json
import logging
import os
import resource
import time
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any, cast

import torch
from peft import PeftModel

from ..artifacts import to_json, write_whole
from ..base_models import BaseModel
from ..catalog.item_table import ItemTable
from ..catalog.item_tables import TABLES, encode_table
from ..data import Interactions, LeaveOneOut, PromptEncoder
from ..evaluation import (
    EncodedUsers,
    RankingReport,
    evaluate_ranking,
    history_scorer,
    rank_users,
    user_groups,
)
from ..recommenders import Hybrid, IDRecommender, ItemKNN, Popularity
from ..tuners.bituning import BiTuningConfig
from ..tuners.rows.embedding_model import EmbeddingModel
from .hybrids import WITH, WITHOUT, RunHybrids, read_text, what_it_adds
from .run_folder import RunFolder, parts_of, settings_of
from .stage_result import StageResult
from .stages import ADAPTER, TwoStageTraining

logger = logging.getLogger(__name__)

BASELINES_FILE = "baselines.json"
UNTRAINED_MEAN = "untrained_mean"
PACKAGES = ("peft_bituning", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


class Report:
    """Measures on the test split, each row with `name` and `test` metrics; the model stays as it is.

    Args:
        folder: the run's.
        training: the training, at its beginning.
        data: what it is trained on.
        base: the language model beneath.
        id_recommender: the frozen ID recommender, whether the prefix reads it or not.
    """

    def __init__(
        self,
        folder: RunFolder,
        training: TwoStageTraining,
        data: Interactions,
        base: BaseModel,
        id_recommender: IDRecommender | None,
    ) -> None:
        self.folder = folder
        self.training = training
        self.data = data
        self.base = base
        self.id_recommender = id_recommender
        self.samples = training.split.samples("test")
        self.groups = user_groups(training.split, self.samples)
        self.encoded: EncodedUsers | None = None
        self.hybrid: Hybrid | None = None
        self.language_model: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.swapped: dict[str, Any] | None = None
        self._progress = training.accelerator.is_main_process and not training.arguments.disable_tqdm

    # ------------------------------------------------------------------ rows

    def baselines(self) -> ItemTable | None:
        """Measure the baselines, or read them where this very run has measured them before.

        Returns:
            The item table of the untrained adapter, where it was made.
        """
        training, accelerator = self.training, self.training.accelerator
        path = training.store.folder / BASELINES_FILE
        asked = {name: getattr(training.arguments, name) for name in ("text_model", "hold_out_items")}
        identity = {**training.identity, **asked}
        saved = json.loads(path.read_text(encoding="utf-8")) if training.arguments.resume and path.is_file() else {}
        accelerator.wait_for_everyone()
        if saved.get("identity") == identity:
            self.rows = saved["rows"]
            return None
        with self.folder.timed("baselines"):
            self._count()
            self._without_language_model()
            first_table = self._untrained()
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"identity": identity, "rows": self.rows}))
        accelerator.wait_for_everyone()
        return first_table

    def _count(self) -> None:
        """Popularity and item-kNN, fit on training and validation events, as they have nothing to choose on validation;
        the ID recommender, trained on training events with early stopping on validation.
        """
        split, known, device = self.training.split, self.id_recommender, self.training.encoder.device
        counting = (("popularity", Popularity), ("item-kNN", ItemKNN))
        methods: list[tuple[str, Any, Any]] = [
            (name, kind(self.training.num_items).fit(split.known_sequences), "cpu") for name, kind in counting
        ]
        if known is not None:
            known = known.to(device).eval()
            methods.append((f"frozen ID recommender ({known.recommender_type})", known, device))
        for name, method, place in methods:
            self._row(name, evaluate_ranking(history_scorer(method, place), self.samples))

    def _row(self, name: str, report: RankingReport, **more: Any) -> None:
        self.rows.append({"name": name, **more, "test": report.metrics(self.groups)})

    @cached_property
    def hybrids(self) -> RunHybrids:
        """What fits the hybrids, once the texts are read."""
        arguments, training = self.training.arguments, self.training
        with training.accelerator.main_process_first():  # which makes the file that the others read
            text = read_text(arguments.text_model, self.data, self.base, training.store.folder, self._progress)
        return RunHybrids(self.data, training.split, training.validation, self.id_recommender, text, arguments.seed)

    def _without_language_model(self) -> None:
        hybrid = self.hybrids.fit()
        text = self.hybrids.text_alone(hybrid)
        if text is not None:
            self._row(f"text ({hybrid.text_model})", text)
        self._row(WITHOUT, self.hybrids.rank(hybrid))

    def with_language_model(self, kept: StageResult) -> Hybrid:
        """Fit the hybrid with what stage 2 kept, whose weights the model has, and say what that adds."""
        with self.folder.timed("hybrid"):
            encoded, encoder = self.encoded or EncodedUsers(kept.item_side.table), self.training.encoder
            histories = [sample.history for sample in self.training.validation]
            users = encoder.encode(histories, "user", True, self._progress, "validation users")
            encoded.keep(histories, users)
            hybrid = self.hybrids.fit(encoded)
            with_it, without = (self.hybrids.rank(each) for each in (hybrid, hybrid.without("laser")))
            self._row(WITH, with_it)
            self.language_model = what_it_adds(hybrid, with_it, without)
        logger.info(self.language_model["verdict"])
        self.hybrid = hybrid
        return hybrid

    def _untrained(self) -> ItemTable:
        """The language model as it is: the mean of the prompt's text states, and the untrained suffix."""
        model = cast(PeftModel, self.training.model)
        model.add_adapter(UNTRAINED_MEAN, BiTuningConfig(prefix_encoder="none", pooling="mean"))
        model.set_adapter(UNTRAINED_MEAN)
        self._add("untrained LLM (mean of text states)", self._table(UNTRAINED_MEAN), "untrained LLM")
        model.set_adapter(ADAPTER)
        model.delete_adapter(UNTRAINED_MEAN)
        table = self._table(ADAPTER)
        self._add("untrained suffix", table, "untrained suffix")
        return table

    def _table(self, adapter: str) -> ItemTable:
        training = self.training
        identity = {**training.identity, "adapter": adapter}
        folder = training.store.folder / TABLES
        return encode_table(training.encoder, training.num_items, folder, identity, self._progress)

    def _add(self, name: str, table: ItemTable, description: str, **more: Any) -> None:
        self.encoded = EncodedUsers(table)  # in the end what stage 2 kept
        report = rank_users(
            self.training.encoder, self.samples, table, self._progress, description, encoded=self.encoded
        )
        self._row(name, report, **more)

    def stages(self, stage1: StageResult, stage2: StageResult) -> None:
        """Score what each stage kept, once it was chosen on validation."""
        encoder = self.training.encoder
        with self.folder.timed("test"):
            for number, kept in ((1, stage1), (2, stage2)):
                self.training.model.weights_in(kept.user_weights)
                more = {"epoch": kept.epoch, "valid": kept.valid}
                self._add(f"after stage {number}", kept.item_side.table, f"test, stage {number}", **more)
            if encoder.id_recommender is not None:
                table = stage2.item_side.table
                self.swapped = rank_users(encoder, self.samples, table, self._progress, "swapped", True).metrics()

    # ------------------------------------------------------------------ results

    def results(self, stage1: StageResult, stage2: StageResult) -> dict[str, Any]:
        """Return everything as JSON values, with what it was measured with."""
        training, encoder = self.training, self.training.encoder
        prompts, known = encoder.collator.prompts, self.id_recommender
        took = {"training": training.state.seconds, "total_this_run": time.perf_counter() - self.folder.started}
        return {
            "rows": self.rows,
            "language_model": self.language_model,
            "hybrid": {} if self.hybrid is None else self.hybrid.settings(),
            "swapped_collaborative": self.swapped,
            "stage2_weight_change": weight_change(stage1.user_weights, stage2.user_weights),
            "epochs": training.state.epochs,
            "dataset": {**self.data.counts(), "users_not_evaluated": training.split.users_not_evaluated},
            "prompts": {"twins": prompts.twin_count, **prompt_cuts(prompts, training.split)},
            "base_model": self.base.name,
            "id_recommender": None if known is None else known.recommender_type,
            "data": self.data.content_hash,
            "settings": {**settings_of(training.arguments), "processes": training.accelerator.num_processes},
            "parts": parts_of(self.data, known, prompts.template),
            "adapter": to_json(cast(PeftModel, training.model).peft_config[ADAPTER].to_dict()),
            "seconds": {**self.folder.seconds, **took},
            **provenance(training.model, encoder.device),
            "log_history": training.state.log_history,
        }


def provenance(model: EmbeddingModel, device: torch.device) -> dict[str, Any]:
    """Say with how many `parameters`, which `peak_memory_mb`, `versions` and `machine` numbers were made."""
    trainable, total = count_parameters(model)
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device) / 2**20
    return {
        "parameters": {"trainable": trainable, "total": total},
        "peak_memory_mb": peak,
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"cpu_cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "device": device.type},
    }


def count_parameters(model: EmbeddingModel) -> tuple[int, int]:
    """Return how many weights are trained, and how many there are with the frozen ones."""
    sizes = [(each.numel(), each.requires_grad) for each in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def prompt_cuts(prompts: PromptEncoder, split: LeaveOneOut) -> dict[str, int]:
    """Count what had to be left out of the prompts of the test users."""
    prompts.reset_counts()
    for sample in split.samples("test"):
        prompts.encode(sample.history)
    return dict(prompts.counts)


def weight_change(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Return the relative change of all weights together, `||right - left|| / ||left||`."""
    change = sum(float((right[name].double() - value.double()).square().sum()) for name, value in left.items())
    size = sum(float(value.double().square().sum()) for value in left.values())
    return (change / size) ** 0.5 if size else 0.0
