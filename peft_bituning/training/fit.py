"""`fit`: from purchase histories to a saved recommender; what the example script does, for notebooks too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate.utils import set_seed
from peft import PeftModel, set_peft_model_state_dict
from tqdm.contrib.logging import logging_redirect_tqdm

from ..artifacts import write_whole
from ..assembly import assemble, attach_adapter, read_template, refuse_adapter
from ..base_models import BaseModel, load_base_model
from ..catalog.encoder import HistoryEncoder
from ..data import Interactions, LeaveOneOut, PromptTemplate, as_interactions
from ..errors import ConfigurationError
from ..matmul import fast_cpu_matmul
from ..recommenders import Hybrid, IDRecommender
from ..serving.recommender import ITEM_ADAPTER, LaserRecommender, LaserSettings
from ..tuners.bituning import BiTuningConfig
from ..tuners.bituning.encoders import prefix_encoder_class
from .arguments import LaserArguments
from .curves import plot_curves
from .forecast import say_what_is_ahead
from .hybrids import check_text_model
from .id_recommender import provide_id_recommender
from .report import Report
from .run_folder import RESULTS_FILE, RunFolder, identity_of
from .sharding import launched_accelerator
from .stage_result import StageResult
from .stages import ADAPTER, TwoStageTraining

CURVES_FILE = "training_curves.png"


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
    config, arguments = BiTuningConfig() if config is None else config, arguments or LaserArguments()
    if not isinstance(config, BiTuningConfig):
        raise ConfigurationError(
            f"config must be a BiTuningConfig, got {type(config).__name__}; examples/benchmarks/compare.py trains "
            "others, and peft_bituning.assembly.assemble serves a loop of your own"
        )
    folder = RunFolder(launched_accelerator(arguments), arguments)
    accelerator = folder.accelerator
    with logging_redirect_tqdm(), fast_cpu_matmul(arguments.fast_cpu_matmul):
        folder.prepare()
        set_seed(arguments.seed)
        data = as_interactions(interactions, items, folder.rejects)
        split = LeaveOneOut.of(data, arguments.hold_out_items, arguments.seed)
        base = load_base_model(base_model)
        if arguments.resume and folder.is_finished:
            folder.check_finished(data, base, config, id_recommender, template)
            accelerator.end_training()
            return LaserRecommender.from_pretrained(folder.path, base, accelerator.device)
        # what can be refused is, before a recommender is trained
        template = template or read_template(arguments.template, arguments.attributes, data.items)
        prefix_encoder_class(config.prefix_encoder)
        refuse_adapter(base)
        check_text_model(arguments.text_model, base)
        with folder.timed("recommender"):
            place = folder.store.folder / "recommender"
            known = provide_id_recommender(accelerator, arguments, place, data, split, id_recommender)
        encoder = _encoder(folder, data, base, config, known, template)
        return _train(folder, data, split, base, known, encoder)


def _train(
    folder: RunFolder,
    data: Interactions,
    split: LeaveOneOut,
    base: BaseModel,
    known: IDRecommender | None,
    encoder: HistoryEncoder,
) -> LaserRecommender:
    """Measure the baselines, train, test, save."""
    accelerator, arguments, num_items = folder.accelerator, folder.arguments, len(data.items)
    identity = identity_of(data, base, known, encoder)
    training = TwoStageTraining(accelerator, encoder, split, num_items, arguments, folder.store, identity)
    training.read_checkpoint()
    if not training.is_resumed:  # or it would say what is behind
        say_what_is_ahead(training)
    report = Report(folder, training, data, base, known)
    first_table = report.baselines()
    with folder.timed("training_this_run"):
        stage1, stage2 = training.run(first_table)
    report.stages(stage1, stage2)
    hybrid = report.with_language_model(stage2)
    return _finish(folder, base, encoder, stage2, hybrid, report.results(stage1, stage2))


def _encoder(
    folder: RunFolder,
    data: Interactions,
    base: BaseModel,
    config: BiTuningConfig,
    known: IDRecommender | None,
    template: PromptTemplate,
) -> HistoryEncoder:
    arguments = folder.arguments
    return assemble(
        base,
        attach_adapter(base, config, known, arguments.seed, arguments.prefix_text, arguments.suffix_text),
        data.items,
        known,
        template,
        arguments.history,
        batch_size=arguments.per_device_eval_batch_size,
        device=folder.accelerator.device,
    )


def _finish(
    folder: RunFolder,
    base: BaseModel,
    encoder: HistoryEncoder,
    kept: StageResult,
    hybrid: Hybrid,
    results: dict[str, Any],
) -> LaserRecommender:
    """Put the parts together and save them; checkpoints go last."""
    accelerator, model = folder.accelerator, cast(PeftModel, encoder.model)
    model.add_adapter(ITEM_ADAPTER, replace(model.peft_config[ADAPTER]))
    set_peft_model_state_dict(model, kept.item_side.weights, adapter_name=ITEM_ADAPTER)
    finished = LaserRecommender(
        base,
        accelerator.unwrap_model(model, keep_fp32_wrapper=False),
        encoder.collator.prompts.items,
        kept.item_side.table,
        encoder.collator.prompts.template,
        encoder.id_recommender,
        LaserSettings.of(base, encoder, kept.item_side.table, results),
        accelerator.device,
        hybrid,
    )
    if accelerator.is_main_process:
        finished.save_pretrained(folder.path)
        results["adapter_mb"] = (folder.path / "adapter_model.safetensors").stat().st_size / 1e6
        write_whole(folder.path / RESULTS_FILE, json.dumps(results, indent=1))
        plot_curves(folder.path / CURVES_FILE, results["epochs"], results["log_history"])
        folder.store.clear()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return finished
