"""`fit`: from purchase histories to a saved recommender; what the example script does, for notebooks too."""

import json
import logging
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from tqdm.contrib.logging import logging_redirect_tqdm

from ..base_models import BaseModel, load_base_model
from ..catalog.encoder import HistoryEncoder
from ..data import PRESETS, Interactions, LeaveOneOut, PromptEncoder, PromptTemplate, interactions_from_tables
from ..data.collator import HistoryCollator
from ..errors import ConfigurationError, DataError
from ..matmul import fast_cpu_matmul
from ..recommenders import (
    IDRecommender,
)
from ..serving.recommender import ITEM_ADAPTER, LaserRecommender, LaserSettings, pad_token_id
from ..tuners.bituning import BiTuningConfig, BiTuningModel
from ..tuners.bituning.backbone import max_positions
from .arguments import LaserArguments
from .baselines import counting_rows, language_model_rows
from .checkpoint import CheckpointStore
from .curves import plot_curves
from .frozen import provide_recommender
from .ranking import rank_users
from .results import data_hash, prompt_cuts, provenance, to_json, weight_change, write_whole
from .stages import ADAPTER, StageResult, TwoStageTraining

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
BASELINES_FILE = "baselines.json"
CURVES_FILE = "training_curves.png"
CHECKPOINTS = "checkpoints"


def fit(
    interactions: Any,
    items: Any = None,
    base_model: str | Path | BaseModel = "smollm2-135m",
    config: BiTuningConfig | None = None,
    arguments: LaserArguments | None = None,
    recommender: IDRecommender | None = None,
    template: PromptTemplate | None = None,
) -> LaserRecommender:
    """Train Laser in two stages, evaluate it beside its baselines, and save everything into `output_dir`.

    Args:
        interactions: `Interactions`, or a table with `user_id`, `item_id` and `timestamp` or `order`.
        items: a table with `item_id`, `title` and other attributes, or a catalog; None with `Interactions`.
        base_model: Hub id, folder, alias, or a loaded `BaseModel`.
        config: the adapter; None is the paper's M-Former. Its `collaborative_dim` is filled in.
        arguments: the run; None is the defaults.
        recommender: a trained ID recommender over the same catalog (`Precomputed`, say); None trains or loads the
            one that `arguments.recommender` names.
        template: the prompt; None takes `arguments.template`.

    Returns:
        The trained recommender; its folder holds `results.json` and the training curves too.

    Raises:
        ConfigurationError: settings that do not fit each other.
        DataError: data that cannot be trained on.
        CheckpointError: a checkpoint of another run.
        NonFiniteLossError: training diverged; the last checkpoint stays.
    """
    arguments = arguments or LaserArguments()
    config = config or BiTuningConfig()
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision, log_with=arguments.log_with, project_dir=arguments.output_dir
    )
    run = _Run(accelerator, arguments)
    with logging_redirect_tqdm(), fast_cpu_matmul(arguments.fast_cpu_matmul):
        run.prepare_folder()
        set_seed(arguments.seed)
        data = run.read(interactions, items)
        split = run.split(data)
        base = load_base_model(base_model)
        known = run.recommender(recommender, data, split)
        model, config = run.adapter(base, config, known)
        prompts = run.prompts(base, model, config, data, template)
        collator = HistoryCollator(prompts, pad_token_id(base.tokenizer), known.max_length if known else 1)
        needed = known if cast(BiTuningModel, model.base_model).prefix_encoder.needs_collaborative else None
        encoder = HistoryEncoder(model, collator, needed, accelerator.device, arguments.per_device_eval_batch_size)
        model.to(accelerator.device)
        return run.train(base, model, encoder, data, split, known, prompts)


class _Run:
    """The steps of `fit`, in their order, with what they measure."""

    def __init__(self, accelerator: Accelerator, arguments: LaserArguments) -> None:
        self.accelerator = accelerator
        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        self.store = CheckpointStore(self.folder / CHECKPOINTS, arguments.save_total_limit)
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.progress = accelerator.is_main_process and not arguments.disable_tqdm

    def prepare_folder(self) -> None:
        """Refuse to run over an unfinished run; make the folder."""
        if self.arguments.log_with:
            self.accelerator.init_trackers("peft_bituning", config=_flat(self.arguments.trajectory()))
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = bool(self.store.complete())
        self.accelerator.wait_for_everyone()
        if unfinished and not self.arguments.resume:
            if not self.arguments.overwrite_output_dir:
                raise ConfigurationError(
                    f"output_dir {self.folder} holds an unfinished run; go on with it by --resume, drop it by "
                    "--overwrite_output_dir, or choose another folder"
                )
            if self.accelerator.is_main_process:
                self.store.clear()
        if self.accelerator.is_main_process and not self.arguments.resume:
            (self.folder / BASELINES_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def read(self, interactions: Any, items: Any) -> Interactions:
        """Bring the data into histories over a catalog."""
        if isinstance(interactions, Interactions):
            if items is not None:
                raise ConfigurationError("items must be None where interactions bring their own catalog, got both")
            return interactions
        if items is None:
            raise ConfigurationError("items must be given with a table of interactions, got None")
        rejects = self.folder / "rejects.jsonl" if self.accelerator.is_main_process else None
        return interactions_from_tables(interactions, items, rejects_path=rejects)

    def split(self, data: Interactions) -> LeaveOneOut:
        """Split by leave-one-out and check that there is something to train and to choose on."""
        split = LeaveOneOut(data.histories)
        if len(data.items) < 2:
            raise DataError(
                f"the catalog must have at least 2 items to rank, got {len(data.items)}; there is nothing to recommend"
            )
        if not split.samples("valid"):
            raise DataError(
                "no user has the three events that training, validation and test need; give longer histories"
            )
        if not split.training_samples("last_cut"):
            raise DataError(
                "no user has the four events that a training row beside validation and test needs; give longer "
                "histories"
            )
        if split.users_not_evaluated and self.accelerator.is_main_process:
            logger.info("%d users with fewer than three events train only", split.users_not_evaluated)
        return split

    def recommender(self, given: IDRecommender | None, data: Interactions, split: LeaveOneOut) -> IDRecommender | None:
        """Take, load or train the frozen ID recommender."""
        start = time.perf_counter()
        folder = self.folder / CHECKPOINTS / "recommender"
        found = given or provide_recommender(self.accelerator, self.arguments, folder, len(data.items), split)
        if found is not None and found.num_items != len(data.items):
            raise ConfigurationError(
                f"the recommender must know the catalog's {len(data.items)} items, got one of {found.num_items}; "
                "train it on the same catalog, in the same order"
            )
        self.seconds["recommender"] = time.perf_counter() - start
        return None if found is None else found.to(self.accelerator.device).eval()

    def adapter(
        self, base: BaseModel, config: BiTuningConfig, recommender: IDRecommender | None
    ) -> tuple[PeftModel, BiTuningConfig]:
        """Put a fresh adapter on the language model; the same seed gives the same weights."""
        if config.collaborative_dim is None and recommender is not None:
            config = replace(config, collaborative_dim=recommender.embedding_dim)
        if recommender is not None and config.collaborative_dim != recommender.embedding_dim:
            raise ConfigurationError(
                f"collaborative_dim must be the recommender's width {recommender.embedding_dim}, "
                f"got {config.collaborative_dim}"
            )
        torch.manual_seed(self.arguments.seed)
        model = get_peft_model(base.model, config)
        config.base_model_name_or_path, config.revision = base.name, base.revision
        return model, config

    def prompts(
        self,
        base: BaseModel,
        model: PeftModel,
        config: BiTuningConfig,
        data: Interactions,
        template: PromptTemplate | None,
    ) -> PromptEncoder:
        """Set up prompts that fit the context, and report what had to be cut and what cannot be told apart."""
        arguments = self.arguments
        length = arguments.max_length
        limit = max_positions(base.model)
        if limit is not None:
            length = min(length, limit - cast(BiTuningModel, model.base_model).prefix_encoder.num_tokens - 1)
            if length < 1:
                raise ConfigurationError(
                    f"num_virtual_tokens must leave room for text in max_position_embeddings ({limit}), "
                    f"got {config.num_virtual_tokens}"
                )
        prompts = PromptEncoder(
            template or read_template(arguments.template),
            base.tokenizer,
            data.items,
            length,
            arguments.max_history,
            arguments.max_item_tokens,
        )
        if prompts.twin_count and self.accelerator.is_main_process:
            logger.info("%d items share their text with another and cannot be told apart by it", prompts.twin_count)
        return prompts

    def train(
        self,
        base: BaseModel,
        model: PeftModel,
        encoder: HistoryEncoder,
        data: Interactions,
        split: LeaveOneOut,
        recommender: IDRecommender | None,
        prompts: PromptEncoder,
    ) -> LaserRecommender:
        """Measure the baselines, train, test, save."""
        rows, first_table = self._baselines(model, encoder, data, split, recommender)
        identity = {
            "data": data_hash(data),
            "base_model": {"name": base.name, **base.fingerprint()},
            "recommender": None if recommender is None else recommender.content_hash(),
            "adapter": to_json(model.peft_config[ADAPTER].to_dict()),
            "template": prompts.template.to_dict(),
        }
        training = TwoStageTraining(
            self.accelerator, model, encoder, split, len(data.items), self.arguments, self.store, to_json(identity)
        )
        start = time.perf_counter()
        stage1, stage2 = training.run(first_table)
        self.seconds["training"] = training.state.seconds
        self.seconds["training_this_run"] = time.perf_counter() - start
        start = time.perf_counter()
        measured, swapped = self._test(training, stage1, stage2, split)
        rows += measured
        self.seconds["test"] = time.perf_counter() - start
        self.seconds["total_this_run"] = time.perf_counter() - self.started
        results = {
            "rows": rows,
            "swapped_collaborative": swapped,
            "stage2_weight_change": weight_change(stage1.user_weights, stage2.user_weights),
            "epochs": training.state.epochs,
            "dataset": {**data.counts(), "users_not_evaluated": split.users_not_evaluated},
            "prompts": {"twins": prompts.twin_count, **prompt_cuts(prompts, split)},
            "base_model": base.name,
            "recommender": None if recommender is None else recommender.recommender_type,
            "settings": {**self.arguments.trajectory(), "processes": self.accelerator.num_processes},
            "adapter": to_json(model.peft_config[ADAPTER].to_dict()),
            "seconds": self.seconds,
            **provenance(model, self.accelerator.device),
            "log_history": training.state.log_history,
        }
        return self._finish(base, model, encoder, data, recommender, prompts, stage2, results)

    def _baselines(
        self,
        model: PeftModel,
        encoder: HistoryEncoder,
        data: Interactions,
        split: LeaveOneOut,
        recommender: IDRecommender | None,
    ) -> tuple[list[dict[str, Any]], Any]:
        path = self.folder / BASELINES_FILE
        if self.arguments.resume and path.is_file():
            return json.loads(path.read_text(encoding="utf-8")), None
        start = time.perf_counter()
        rows = counting_rows(split, len(data.items), recommender, self.accelerator.device)
        measured = language_model_rows(model, encoder, split, len(data.items), ADAPTER, self.progress)
        rows += measured.rows
        self.seconds["baselines"] = time.perf_counter() - start
        if self.accelerator.is_main_process:
            write_whole(path, json.dumps(rows))
        self.accelerator.wait_for_everyone()
        return rows, measured.first_table

    def _test(
        self, training: TwoStageTraining, stage1: StageResult, stage2: StageResult, split: LeaveOneOut
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Score what each stage kept on the test split, once it was chosen on validation."""
        rows = []
        for number, result in ((1, stage1), (2, stage2)):
            training.set_weights(result.user_weights)
            table = result.item_side.table
            reports = {
                name: rank_users(training.encoder, split.samples(name), table, self.progress, f"stage {number} {name}")
                for name in ("valid", "test")
            }
            rows.append(
                {"name": f"after stage {number}", **{name: report.metrics() for name, report in reports.items()}}
            )
        swapped = None
        if training.encoder.recommender is not None:
            table = stage2.item_side.table
            samples = split.samples("test")
            swapped = rank_users(training.encoder, samples, table, self.progress, "swapped", True).metrics()
        return rows, swapped

    def _finish(
        self,
        base: BaseModel,
        model: PeftModel,
        encoder: HistoryEncoder,
        data: Interactions,
        recommender: IDRecommender | None,
        prompts: PromptEncoder,
        kept: StageResult,
        results: dict[str, Any],
    ) -> LaserRecommender:
        from peft import set_peft_model_state_dict

        model.add_adapter(ITEM_ADAPTER, replace(model.peft_config[ADAPTER]))
        set_peft_model_state_dict(model, kept.item_side.weights, adapter_name=ITEM_ADAPTER)
        settings = LaserSettings(
            base_model={"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint()},
            max_length=prompts.max_length or self.arguments.max_length,
            max_history=prompts.max_items,
            max_item_tokens=prompts.max_item_tokens,
            max_collaborative_items=encoder.collator.max_items,
            recommender_hash=None if encoder.recommender is None else encoder.recommender.content_hash(),
            table_checksum=kept.item_side.table.checksum(),
            results={key: value for key, value in results.items() if key != "log_history"},
            version=version("peft_bituning"),
        )
        finished = LaserRecommender(
            base,
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False),
            data.items,
            kept.item_side.table,
            prompts.template,
            encoder.recommender,
            settings,
            self.accelerator.device,
        )
        if self.accelerator.is_main_process:
            finished.save_pretrained(self.folder)
            results["adapter_mb"] = (self.folder / "adapter_model.safetensors").stat().st_size / 1e6
            write_whole(self.folder / RESULTS_FILE, json.dumps(results, indent=1))
            plot_curves(self.folder / CURVES_FILE, results["epochs"], results["log_history"])
            self.store.clear()
            (self.folder / BASELINES_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return finished


def read_template(name: str) -> PromptTemplate:
    """Return a template by preset or JSON file.

    Args:
        name: a preset's name, or the path of a JSON file.

    Returns:
        The template.

    Raises:
        ConfigurationError: neither.
    """
    if name in PRESETS:
        return PromptTemplate.from_preset(name)
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"template must be one of {', '.join(PRESETS)}, or a JSON file, got {name!r}")
    return PromptTemplate.from_json(path.read_text(encoding="utf-8"))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
