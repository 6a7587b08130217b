"""`fit`: from purchase histories to a saved recommender; what the example script does, for notebooks too."""

import json
import logging
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from tqdm.contrib.logging import logging_redirect_tqdm

from ..artifacts import differences, to_json, write_whole
from ..assembly import assemble, attach_adapter, read_template, refuse_adapter
from ..base_models import BaseModel, load_base_model
from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..catalog.item_tables import TABLES
from ..data import Interactions, LeaveOneOut, PromptTemplate, interactions_from_tables
from ..errors import CheckpointError, ConfigurationError, DataError
from ..evaluation import rank_users
from ..launch import launched_state
from ..matmul import fast_cpu_matmul
from ..recommenders import IDRecommender
from ..serving.recommender import ITEM_ADAPTER, LaserRecommender, LaserSettings
from ..tuners.bituning import BiTuningConfig
from ..tuners.bituning.encoders import prefix_encoder_class
from .arguments import RENAMED, LaserArguments
from .baselines import counting_rows, language_model_rows
from .checkpoint import CheckpointStore
from .curves import plot_curves
from .forecast import say_what_is_ahead
from .id_recommender import provide_id_recommender
from .provenance import prompt_cuts, provenance, weight_change
from .sharding import check_launcher
from .stage_result import StageResult
from .stages import ADAPTER, TwoStageTraining

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
    id_recommender: IDRecommender | None = None,
    template: PromptTemplate | None = None,
) -> LaserRecommender:
    """Train Laser in two stages, evaluate it beside its baselines, and save everything into `output_dir`.

    With `arguments.resume` an unfinished run goes on, and a finished one of the same settings is loaded.

    Args:
        interactions: `Interactions`, or a table with `user_id`, `item_id` and `timestamp` or `order`.
        items: a table with `item_id`, `title` and other attributes, or a catalog; None with `Interactions`.
        base_model: Hub id, folder, alias, or a loaded `BaseModel`.
        config: the adapter; None is an M-Former that fits the language model. Its `collaborative_dim` is filled in.
        arguments: the run; None is the defaults.
        id_recommender: a trained ID recommender over the same catalog (`Precomputed`, say); None trains or loads the
            one that `arguments.id_recommender` names.
        template: the prompt; None takes `arguments.template`.

    Returns:
        The trained recommender; its folder holds `results.json` and the training curves too.

    Raises:
        ConfigurationError: settings that do not fit each other, or a folder that holds a run already.
        DataError: data that cannot be trained on.
        CheckpointError: a checkpoint, or a finished run to resume, of other settings or data.
        NonFiniteLossError: training diverged; the last checkpoint stays.
    """
    if config is not None and not isinstance(config, BiTuningConfig):
        raise ConfigurationError(
            f"config must be a BiTuningConfig, got {type(config).__name__}; examples/benchmarks/compare.py trains "
            "others, and peft_bituning.assembly.assemble serves a loop of your own"
        )
    arguments = arguments or LaserArguments()
    run = _Run(_accelerator(arguments), arguments)
    with logging_redirect_tqdm(), fast_cpu_matmul(arguments.fast_cpu_matmul):
        run.prepare_folder()
        set_seed(arguments.seed)
        data, split = run.read(interactions, items)
        base = load_base_model(base_model)
        if arguments.resume and run.is_finished:
            run.check_finished(data, base, config or BiTuningConfig())
            return LaserRecommender.from_pretrained(run.folder, base, run.accelerator.device)
        return run.train(run.gather(data, split, base, config or BiTuningConfig(), id_recommender, template))


@dataclass(frozen=True)
class _Parts:
    """What a run works with.

    Args:
        data: the histories.
        split: who is trained, validated and tested on what.
        id_recommender: the frozen ID recommender, or None.
        base: the language model.
        model: the PEFT model around it.
        encoder: encodes histories with the PEFT model.
    """

    data: Interactions
    split: LeaveOneOut
    id_recommender: IDRecommender | None
    base: BaseModel
    model: PeftModel
    encoder: HistoryEncoder

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share, as JSON values."""
        return to_json(
            {
                "data": self.data.content_hash,
                "base_model": {"name": self.base.name, **self.base.fingerprint()},
                "id_recommender": None if self.id_recommender is None else self.id_recommender.content_hash(),
                "adapter": self.model.peft_config[ADAPTER].to_dict(),
                "template": self.encoder.collator.prompts.template.to_dict(),
            }
        )


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

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds a run that came to its end."""
        return (self.folder / RESULTS_FILE).is_file() and not self.store.complete()

    def prepare_folder(self) -> None:
        """Refuse to run over another run; make the folder."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        found = "an unfinished" if self.store.complete() else "a finished" if self.is_finished else None
        self.accelerator.wait_for_everyone()
        if found and not self.arguments.resume:
            if not self.arguments.overwrite_output_dir:
                raise ConfigurationError(
                    f"output_dir {self.folder} holds {found} run; {'go on with' if 'un' in found else 'load'} it by "
                    "--resume, drop it by --overwrite_output_dir, or choose another folder"
                )
            if self.accelerator.is_main_process:
                (self.folder / RESULTS_FILE).unlink(
                    missing_ok=True
                )  # or a kill would leave it to be taken for this one
                self.store.clear()
        if self.arguments.log_with:
            self.accelerator.init_trackers("peft_bituning", config=_flat(self.arguments.trajectory()))
        self.accelerator.wait_for_everyone()

    def check_finished(self, data: Interactions, base: BaseModel, config: BiTuningConfig) -> None:
        """Refuse to pass off a finished run of other settings or data as this one; what it did not know yet is free."""
        try:
            results = dict(json.loads((self.folder / RESULTS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{RESULTS_FILE} of the finished run in {self.folder} cannot be read ({error}); choose another folder, "
                "or train anew there with --overwrite_output_dir"
            ) from error
        inherited = {each.name for each in fields(PeftConfig)}
        asked = to_json(
            {
                "settings": _settings_of(self.arguments),
                "adapter": {
                    name: value
                    for name, value in config.to_dict().items()
                    if value is not None and name not in inherited
                },
                "base_model": base.name,
                "data": data.content_hash,
            }
        )
        found = {name: results.get(name) for name in asked}
        for part in ("settings", "adapter"):
            known = {RENAMED.get(name, name): value for name, value in (found[part] or {}).items()}
            asked[part] = {name: value for name, value in asked[part].items() if name in known}
            found[part] = {name: known[name] for name in asked[part]}
        if different := differences(found, asked):
            raise CheckpointError(
                f"the finished run in {self.folder} is another one: {'; '.join(different)}; choose another folder, or "
                "train anew there with --overwrite_output_dir"
            )
        logger.info("the run in %s is finished: nothing is trained", self.folder)
        self.accelerator.end_training()

    def read(self, interactions: Any, items: Any) -> tuple[Interactions, LeaveOneOut]:
        """Read and split the histories; the arguments are those of `fit`."""
        is_main = self.accelerator.is_main_process
        data = _read_interactions(interactions, items, self.folder / "rejects.jsonl" if is_main else None)
        split = _split_histories(data)
        if split.users_not_evaluated and is_main:
            logger.info("%d users with fewer than three events train only", split.users_not_evaluated)
        return data, split

    def gather(
        self,
        data: Interactions,
        split: LeaveOneOut,
        base: BaseModel,
        config: BiTuningConfig,
        id_recommender: IDRecommender | None,
        template: PromptTemplate | None,
    ) -> _Parts:
        """Build everything that training starts from; the other arguments are those of `fit`."""
        arguments = self.arguments
        # what can be refused is, before a recommender is trained
        template = template or read_template(arguments.template, arguments.attributes, data.items)
        prefix_encoder_class(config.prefix_encoder)
        refuse_adapter(base)
        known = self._id_recommender(id_recommender, data, split)
        model = attach_adapter(base, config, known, arguments.seed, arguments.prefix_text, arguments.suffix_text)
        encoder = assemble(
            base,
            model,
            data.items,
            known,
            template,
            arguments.history,
            batch_size=arguments.per_device_eval_batch_size,
            device=self.accelerator.device,
        )
        if self.accelerator.is_main_process:
            if encoder.collator.prompts.twin_count:
                logger.info(
                    "%d items share their text with another and cannot be told apart by it",
                    encoder.collator.prompts.twin_count,
                )
            say_what_is_ahead(encoder, split, len(data.items), arguments, self.accelerator.num_processes)
        return _Parts(data, split, known, base, cast(PeftModel, model), encoder)

    def _id_recommender(
        self, given: IDRecommender | None, data: Interactions, split: LeaveOneOut
    ) -> IDRecommender | None:
        """Take, load or train the frozen ID recommender."""
        start = time.perf_counter()
        folder = self.store.folder / "recommender"
        found = given or provide_id_recommender(self.accelerator, self.arguments, folder, data, split)
        if found is not None and found.num_items != len(data.items):
            raise ConfigurationError(
                f"the ID recommender must know the catalog's {len(data.items)} items, got one of {found.num_items}; "
                "train it on the same catalog, in the same order"
            )
        self.seconds["recommender"] = time.perf_counter() - start
        return None if found is None else found.to(self.accelerator.device).eval()

    def train(self, parts: _Parts) -> LaserRecommender:
        """Measure the baselines, train, test, save."""
        training = TwoStageTraining(
            self.accelerator,
            parts.encoder,
            parts.split,
            len(parts.data.items),
            self.arguments,
            self.store,
            parts.identity(),
        )
        training.read_checkpoint()
        rows, first_table = self._baselines(parts, training.identity)
        start = time.perf_counter()
        stage1, stage2 = training.run(first_table)
        self.seconds["training"] = training.state.seconds
        self.seconds["training_this_run"] = time.perf_counter() - start
        start = time.perf_counter()
        measured, swapped = self._test(training, stage1, stage2, parts.split)
        self.seconds["test"] = time.perf_counter() - start
        self.seconds["total_this_run"] = time.perf_counter() - self.started
        prompts, known = parts.encoder.collator.prompts, parts.id_recommender
        results = {
            "rows": rows + measured,
            "swapped_collaborative": swapped,
            "stage2_weight_change": weight_change(stage1.user_weights, stage2.user_weights),
            "epochs": training.state.epochs,
            "dataset": {**parts.data.counts(), "users_not_evaluated": parts.split.users_not_evaluated},
            "prompts": {"twins": prompts.twin_count, **prompt_cuts(prompts, parts.split)},
            "base_model": parts.base.name,
            "id_recommender": None if known is None else known.recommender_type,
            "data": parts.data.content_hash,
            "settings": {**_settings_of(self.arguments), "processes": self.accelerator.num_processes},
            "adapter": to_json(parts.model.peft_config[ADAPTER].to_dict()),
            "seconds": self.seconds,
            **provenance(parts.encoder.model, self.accelerator.device),
            "log_history": training.state.log_history,
        }
        return self._finish(parts, stage2, results)

    def _baselines(self, parts: _Parts, identity: dict[str, Any]) -> tuple[list[dict[str, Any]], ItemTable | None]:
        """Measure the baselines, or read them where this very run has measured them before."""
        path = self.store.folder / BASELINES_FILE
        saved = json.loads(path.read_text(encoding="utf-8")) if self.arguments.resume and path.is_file() else {}
        self.accelerator.wait_for_everyone()
        if saved.get("identity") == identity:
            return saved["rows"], None
        start = time.perf_counter()
        num_items = len(parts.data.items)
        rows = counting_rows(parts.split, num_items, parts.id_recommender, self.accelerator.device)
        tables = self.store.folder / TABLES
        measured = language_model_rows(
            parts.model, parts.encoder, parts.split, num_items, ADAPTER, tables, identity, self.progress
        )
        rows += measured.rows
        self.seconds["baselines"] = time.perf_counter() - start
        if self.accelerator.is_main_process:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"identity": identity, "rows": rows}))
        self.accelerator.wait_for_everyone()
        return rows, measured.first_table

    def _test(
        self, training: TwoStageTraining, stage1: StageResult, stage2: StageResult, split: LeaveOneOut
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Score what each stage kept on the test split, once it was chosen on validation."""
        samples, encoder = split.samples("test"), training.encoder
        rows = []
        for number, result in ((1, stage1), (2, stage2)):
            training.model.weights_in(result.user_weights)
            report = rank_users(encoder, samples, result.item_side.table, self.progress, f"test, stage {number}")
            name = f"after stage {number}"
            rows.append({"name": name, "epoch": result.epoch, "valid": result.valid, "test": report.metrics()})
        swapped = None
        if encoder.id_recommender is not None:
            table = stage2.item_side.table
            swapped = rank_users(encoder, samples, table, self.progress, "swapped", True).metrics()
        return rows, swapped

    def _finish(self, parts: _Parts, kept: StageResult, results: dict[str, Any]) -> LaserRecommender:
        """Put the parts together and save them; checkpoints go last."""
        model, encoder = parts.model, parts.encoder
        model.add_adapter(ITEM_ADAPTER, replace(model.peft_config[ADAPTER]))
        set_peft_model_state_dict(model, kept.item_side.weights, adapter_name=ITEM_ADAPTER)
        finished = LaserRecommender(
            parts.base,
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False),
            parts.data.items,
            kept.item_side.table,
            encoder.collator.prompts.template,
            encoder.id_recommender,
            LaserSettings.of(parts.base, encoder, kept.item_side.table, results),
            self.accelerator.device,
        )
        if self.accelerator.is_main_process:
            finished.save_pretrained(self.folder)
            results["adapter_mb"] = (self.folder / "adapter_model.safetensors").stat().st_size / 1e6
            write_whole(self.folder / RESULTS_FILE, json.dumps(results, indent=1))
            plot_curves(self.folder / CURVES_FILE, results["epochs"], results["log_history"])
            self.store.clear()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return finished


def _accelerator(arguments: LaserArguments) -> Accelerator:
    tracker = arguments.log_with
    installed = [str(name) for name in get_available_trackers()]
    if isinstance(tracker, str) and tracker not in installed:
        raise ConfigurationError(
            f"log_with must be an installed tracker ({', '.join(installed) or 'there is none'}), got {tracker!r}; "
            "install it, or leave log_with out: results.json holds the curves too"
        )
    launched_state()
    precision, folder = arguments.mixed_precision, arguments.output_dir
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=folder)
    check_launcher(accelerator)
    return accelerator


def _read_interactions(interactions: Any, items: Any, rejects_path: Path | None) -> Interactions:
    """Bring the data into histories over a catalog."""
    if isinstance(interactions, Interactions):
        if items is not None:
            raise ConfigurationError("items must be None where interactions bring their own catalog, got both")
        return interactions
    if items is None:
        raise ConfigurationError("items must be given with a table of interactions, got None")
    return interactions_from_tables(interactions, items, rejects_path=rejects_path)


def _split_histories(data: Interactions) -> LeaveOneOut:
    """Split by leave-one-out and check that there is something to train and to choose on."""
    if len(data.items) < 2:
        raise DataError(
            f"the catalog must have at least 2 items to rank, got {len(data.items)}; there is nothing to recommend"
        )
    split = LeaveOneOut(data.histories)
    if not split.samples("valid"):
        raise DataError("no user has the three events that training, validation and test need; give longer histories")
    if not split.training_samples("last_cut"):
        raise DataError(
            "no user has the four events that a training row beside validation and test needs; give longer histories"
        )
    return split


def _settings_of(arguments: LaserArguments) -> dict[str, Any]:
    """Return what decided a run, with names instead of paths: nothing of this machine goes into what is shared."""
    names = {name: Path(getattr(arguments, name)).name for name in ("id_recommender", "template")}
    return {**arguments.trajectory(), **names}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
