"""The methods that tune a language model, from a trial to its result."""

import shutil
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from peft_bituning.training.inputs import make_prompts_beside, read_template
from peft_bituning.training.ranking import rank_users
from peft_bituning.training.results import data_hash
from torch import Tensor

from peft_bituning.artifacts import to_json
from peft_bituning.catalog.encoder import HistoryEncoder
from peft_bituning.catalog.item_table import ItemTable
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.data.samples import Sample
from peft_bituning.errors import ConfigurationError
from peft_bituning.evaluation import catalog_ranks
from peft_bituning.launch import launched_state
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.recommenders import IDRecommender, Precomputed, build_recommender
from peft_bituning.serving.recommender import pad_token_id
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.training.checkpoint import CheckpointStore
from peft_bituning.training.sharding import check_launcher
from peft_bituning.tuners.bituning import BiTuningConfig

from .frozen_recommenders import frozen_recommender, recommender_details
from .kept_weights import KeptWeights
from .measuring import Meter, time_users
from .trial import METHODS, Method, Trial, TrialResult
from .tuned import TUNERS, TunedTraining, adapter_bytes, adapter_config, build_tuned, num_trainable, num_virtual_tokens

CHECKPOINTS = "checkpoints"
ENCODED_ITEMS = 256


class NothingKnown(Precomputed):
    """The recommender of a catalog that nobody was trained on: it knows no item, so that every row is cold.

    Args:
        embedding_dim: C, as the adapter reads it.
    """

    recommender_type = "nothing-known"

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(torch.zeros(1, embedding_dim))

    def encoded_mask(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        """Give no position a state [B, N]."""
        return torch.zeros_like(super().encoded_mask(item_indices, mask))


def run_tuned(trial: Trial) -> TrialResult:
    """Train in both stages from the last checkpoint on, if there is one, and rank the test users.

    A trial with a `start` starts from A'; one without anybody to train on ranks with it as it is.

    Args:
        trial: its method is one of `TUNERS`; checkpoints go into its folder.

    Returns:
        The result; the checkpoints stay until `forget_checkpoints`.

    Raises:
        ConfigurationError: settings that do not fit, or neither anybody to train on nor a start.
        CheckpointError: the folder holds a checkpoint of another trial.
        NonFiniteLossError: training diverged.
    """
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        return _run(trial)


def forget_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a trial whose result is written down."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _run(trial: Trial) -> TrialResult:
    arguments = trial.arguments
    launched_state()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    check_launcher(accelerator)
    device = accelerator.device
    meter = Meter(device)
    set_seed(arguments.seed)
    known: IDRecommender | None = None
    known_seconds = None
    if not trial.is_trained and trial.start is None:
        raise ConfigurationError(f"{trial.method} must have users to train on, or weights to start from, got neither")
    if TUNERS[trial.method].reads_recommender:
        if trial.is_trained:
            known, known_seconds = frozen_recommender(trial, arguments.recommender, accelerator)
        else:
            known = NothingKnown(build_recommender(arguments.recommender, 1).embedding_dim)
        known = known.to(device).eval()
    base = trial.load_base()
    set_seed(arguments.seed)
    model = build_tuned(trial.method, base, trial.settings, known, arguments)
    template = read_template(arguments.template, arguments.attributes)
    prompts = make_prompts_beside(num_virtual_tokens(model), base, trial.data, template, arguments)
    collator = HistoryCollator(prompts, pad_token_id(base.tokenizer), known.max_length if known else 1)
    encoder = HistoryEncoder(
        model.to(device),
        collator,
        known,
        device,
        arguments.per_device_eval_batch_size,
        arguments.max_collaborative_states,
        arguments.item_collaborative,
    )
    adapter = adapter_config(model)
    identity = {
        "method": trial.method,
        "data": data_hash(trial.data),
        "base_model": {"name": base.name, **base.fingerprint()},
        "recommender": None if known is None else known.content_hash(),
        "adapter": adapter,
        "template": template.to_dict(),
    }
    if trial.drawn is not None:
        identity["training_users"] = trial.drawn
    if trial.start is not None:
        identity["start"] = trial.start.content_hash()
    store = CheckpointStore(trial.folder / CHECKPOINTS, arguments.save_total_limit)
    training = TunedTraining(
        accelerator, cast(PeftModel, model), encoder, trial.split, trial.num_items, arguments, store, to_json(identity)
    )
    training.keeps_item_weights = trial.keeps_weights
    if trial.start is not None:
        training.set_weights(trial.start.users)
    if trial.is_trained:
        training.read_checkpoint()
    resumed = training.is_resumed
    with meter.phase("training"):
        if trial.start is None or trial.is_trained:
            _, kept = training.run()
        else:
            kept = training.without_training(trial.start)
    meter.phases["training"] |= {"seconds": training.state.seconds, "resumed": resumed}
    training.set_weights(kept.user_weights)
    samples = trial.split.samples("test")
    report = rank_users(encoder, samples, kept.item_side.table, not arguments.disable_tqdm, f"test, {trial.method}")
    _time_serving(meter, encoder, kept.item_side.table, trial, samples)
    epochs = training.state.epochs
    steps = [0, *(int(epoch["global_step"]) for epoch in epochs)]
    updates = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    return TrialResult(
        report,
        kept.valid,
        num_trainable(model),
        adapter_bytes(model),
        meter.phases,
        {
            "epochs": len(epochs),
            "updates": sum(updates),
            "rows": training.rows_an_epoch * len(epochs),
            "tokens": round(sum(epoch["train_tokens"] * n for epoch, n in zip(epochs, updates, strict=True))),
        },
        {
            "best_epoch": kept.epoch,
            "epochs": epochs,
            "adapter": adapter,
            "prompts": {"twins": prompts.twin_count},
            "frozen_recommender": None
            if known is None or isinstance(known, NothingKnown)
            else recommender_details(known, known_seconds),
        },
        KeptWeights(kept.user_weights, kept.item_side.weights) if trial.keeps_weights else None,
    )


def _time_serving(meter: Meter, encoder: HistoryEncoder, table: ItemTable, trial: Trial, samples: list[Sample]) -> None:
    """Measure what it takes to encode items, and one user at a time."""
    items = min(ENCODED_ITEMS, trial.num_items)
    encoder.encode([[0]], "item")  # nothing of the first pass's own work is counted
    with meter.phase("encoding"):
        encoder.encode_items(items)
    meter.phases["encoding"]["items"] = items
    table = table.to(encoder.device)

    def rank(sample: Sample) -> None:
        user = encoder.encode([sample.history])
        catalog_ranks(user.to(encoder.device), table, [sample.target], [sample.history])

    time_users(meter, rank, samples)


def _method(name: str) -> Method:
    # by name, not all of them: what only the recommender's readers read is no reason to train the others again
    deciding = set(LaserArguments().trajectory()) - {"seed"}
    if not TUNERS[name].reads_recommender:
        deciding -= {"recommender", "recommender_epochs", "max_collaborative_states", "item_collaborative"}
    is_ours = TUNERS[name].config_class is BiTuningConfig
    if not is_ours:
        deciding -= {"prefix_lr_ratio", "suffix_lr_ratio"}
    return Method(
        run_tuned,
        is_ours,
        uses_language_model=True,
        arguments=tuple(sorted(deciding)),
        takes_share=True,
        takes_start=True,
    )


METHODS.update({name: _method(name) for name in TUNERS})
