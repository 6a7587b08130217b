"""The method of a comparison that ranks retrieved candidates again."""

from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..candidates import LETTERS, CandidatePrompts, CandidateTraining, LetterModel, Reranker, Retriever, letter_tokens
from ..evaluation import history_scorer
from ..launch import launched_state
from ..matmul import fast_cpu_matmul
from ..serving.recommender import pad_token_id
from ..training.checkpoint import CheckpointStore
from ..training.results import data_hash, to_json
from ..training.sharding import check_launcher
from ..tuners.bituning.backbone import max_positions
from ..tuners.pooling import PooledModel
from .frozen_recommenders import frozen_recommender, recommender_details
from .measuring import Meter, time_users
from .trial import Trial, TrialResult, register_method
from .tuned import adapter_bytes, adapter_config, build_tuned, num_trainable
from .tuned_methods import CHECKPOINTS

NUM_CANDIDATES = 20
ARGUMENTS = (
    "stage1_epochs",
    "stage2_epochs",
    "early_stopping_patience",
    "per_device_train_batch_size",
    "max_tokens_per_pass",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_ratio",
    "cuts",
    "max_samples_per_epoch",
    "max_validation_users",
    "max_history",
    "max_item_tokens",
    "max_length",
    "recommender",
    "recommender_epochs",
    "mixed_precision",
    "fast_cpu_matmul",
)


@register_method("llamarec", uses_language_model=True, arguments=ARGUMENTS, takes_share=True)
def run_llamarec(trial: Trial) -> TrialResult:
    """Retrieve with the frozen recommender of the seed, and rank the best again by a LoRA-tuned language model.

    Args:
        trial: its settings are `num_candidates`, `trained_on`, and fields of LoRA's config.

    Returns:
        The result; the checkpoints stay until `forget_checkpoints`.

    Raises:
        ConfigurationError: settings that do not fit.
        CheckpointError: the folder holds a checkpoint of another trial.
        NonFiniteLossError: training diverged.
    """
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        return _run(trial)


def _run(trial: Trial) -> TrialResult:
    arguments, settings = trial.arguments, dict(trial.settings)
    size = settings.pop("num_candidates", NUM_CANDIDATES)
    trained_on = settings.pop("trained_on", "retrieved")
    launched_state()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    check_launcher(accelerator)
    device = accelerator.device
    meter = Meter(device)
    set_seed(arguments.seed)
    known, known_seconds = frozen_recommender(trial, arguments.recommender, accelerator)
    known = known.to(device).eval()
    base = trial.load_base()
    set_seed(arguments.seed)
    pooled = cast(PooledModel, build_tuned("lora", base, settings, None, arguments))
    limit = max_positions(base.model)
    prompts = CandidatePrompts(
        LETTERS,
        base.tokenizer,
        trial.data.items,
        size,
        arguments.max_length if limit is None else min(arguments.max_length, limit),
        arguments.max_history,
        arguments.max_item_tokens,
    )
    model = LetterModel(pooled, letter_tokens(prompts, size)).to(device)
    retriever = Retriever(history_scorer(known, device), size, f"evaluated/{arguments.seed}")
    pad = pad_token_id(base.tokenizer)
    reranker = Reranker(model, prompts, retriever, trial.split, arguments, pad, device, trained_on)
    adapter = adapter_config(pooled)
    identity: dict[str, Any] = {
        "method": trial.method,
        "data": data_hash(trial.data),
        "base_model": {"name": base.name, **base.fingerprint()},
        "recommender": known.content_hash(),
        "adapter": adapter,
        "candidates": {"number": size, "trained_on": trained_on},
    }
    if trial.drawn is not None:
        identity["training_users"] = trial.drawn
    store = CheckpointStore(trial.folder / CHECKPOINTS, arguments.save_total_limit)
    training = CandidateTraining(accelerator, model, reranker, arguments, store, to_json(identity))
    training.read_checkpoint()
    resumed = training.is_resumed
    with meter.phase("training"):
        kept = training.run()
    state = training.state
    meter.phases["training"] |= {"seconds": state.seconds, "resumed": resumed}
    samples = trial.split.samples("test")
    report = reranker.rank(samples, f"test, {trial.method}")
    time_users(meter, lambda sample: reranker.scores([sample]), samples)
    retrieved = retriever.retrieved(samples)
    return TrialResult(
        report,
        kept.valid,
        num_trainable(model),
        adapter_bytes(pooled),
        meter.phases,
        {
            "epochs": len(state.epochs),
            "updates": state.global_step,
            "rows": sum(epoch["rows"] for epoch in state.epochs),
            "tokens": sum(epoch["tokens"] for epoch in state.epochs),
        },
        {
            "best_epoch": kept.epoch,
            "epochs": state.epochs,
            "adapter": adapter,
            "candidates": {
                "number": size,
                "trained_on": trained_on,
                "test_targets_retrieved": len(retrieved) / len(samples),
                "titles_cut": prompts.titles_cut,
            },
            "frozen_recommender": recommender_details(known, known_seconds),
        },
    )
