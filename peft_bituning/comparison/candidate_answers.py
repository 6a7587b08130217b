"""A trial by another ruler: the target among random candidates, and the language model writes its title."""

from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel

from ..candidates import TITLES, AnswerReport, CandidatePrompts, CandidateTraining, TitleAnswers
from ..errors import ConfigurationError
from ..launch import launched_state
from ..matmul import fast_cpu_matmul
from ..recommenders import IDRecommender
from ..serving.recommender import pad_token_id
from ..training.checkpoint import CheckpointStore
from ..training.results import data_hash, to_json
from ..training.sharding import check_launcher
from ..tuners.bituning.backbone import max_positions
from ..tuners.pooling import PooledModel
from .frozen_recommenders import frozen_recommender, recommender_details
from .measuring import Meter
from .trial import Trial
from .tuned import TUNERS, adapter_bytes, adapter_config, build_tuned, num_trainable
from .tuned_methods import CHECKPOINTS

METHODS = ("ilora", "lora")


@dataclass(frozen=True)
class AnswerResult:
    """What a method gives.

    Args:
        report: every test user's answer.
        valid: validation metrics of the weights that were chosen.
        trainable_parameters: weights that are trained.
        adapter_bytes: what has to be kept of them beside the language model.
        phases: `training` and `answering`, each with `seconds` and `peak_memory_mb`, as `Meter` measures them.
        trained: `epochs`, `updates`, `rows` and `tokens` that training ran over.
        details: whatever else describes the run, as JSON values.
    """

    report: AnswerReport
    valid: dict[str, Any]
    trainable_parameters: int
    adapter_bytes: int
    phases: dict[str, dict[str, Any]]
    trained: dict[str, Any]
    details: dict[str, Any]


def run_answers(
    trial: Trial, num_candidates: int = 20, candidate_seed: int = 0, max_test_users: int | None = None
) -> AnswerResult:
    """Train from the last checkpoint on, if there is one, and let the model answer for the test users.

    Args:
        trial: its method is one of `METHODS`, its settings fields of the adapter's config; checkpoints go into its
            folder and stay until `forget_checkpoints`.
        num_candidates: candidates a prompt, the target among them.
        candidate_seed: decides the candidates of validation and test users.
        max_test_users: the first so many of the test users; None is all.

    Returns:
        The result.

    Raises:
        ConfigurationError: another method, settings that do not fit, or a tokenizer without an end-of-text token.
        CheckpointError: the folder holds a checkpoint of another trial.
        NonFiniteLossError: training diverged.
    """
    if trial.method not in METHODS:
        raise ConfigurationError(f"method must be one of {', '.join(METHODS)}, got {trial.method!r}")
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        return _run(trial, num_candidates, candidate_seed, max_test_users)


def _run(trial: Trial, num_candidates: int, candidate_seed: int, max_test_users: int | None) -> AnswerResult:
    arguments = trial.arguments
    launched_state()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    check_launcher(accelerator)
    device = accelerator.device
    meter = Meter(device)
    set_seed(arguments.seed)
    known: IDRecommender | None = None
    known_seconds = None
    if TUNERS[trial.method].reads_recommender:
        known, known_seconds = frozen_recommender(trial, arguments.recommender, accelerator)
        known = known.to(device).eval()
    base = trial.load_base()
    end = base.tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError(
            f"the tokenizer must have an end-of-text token, which ends an answer, got none from {base.name!r}"
        )
    set_seed(arguments.seed)
    built = build_tuned(trial.method, base, {**trial.settings, "task_type": "CAUSAL_LM"}, known, arguments)
    model = cast(PeftModel, built.model if isinstance(built, PooledModel) else built).to(device)
    limit = max_positions(base.model)
    prompts = CandidatePrompts(
        TITLES,
        base.tokenizer,
        trial.data.items,
        num_candidates,
        arguments.max_length if limit is None else min(arguments.max_length, limit),
        arguments.max_history,
        arguments.max_item_tokens,
    )
    pad = pad_token_id(base.tokenizer)
    task = TitleAnswers(
        model, prompts, trial.split, arguments, known, num_candidates, pad, int(end), device, candidate_seed
    )
    adapter = adapter_config(built)
    candidates = {"number": num_candidates, "seed": candidate_seed}
    identity: dict[str, Any] = {
        "method": trial.method,
        "data": data_hash(trial.data),
        "base_model": {"name": base.name, **base.fingerprint()},
        "recommender": None if known is None else known.content_hash(),
        "adapter": adapter,
        "candidates": candidates,
    }
    store = CheckpointStore(trial.folder / CHECKPOINTS, arguments.save_total_limit)
    training = CandidateTraining(accelerator, model, task, arguments, store, to_json(identity))
    training.read_checkpoint()
    resumed = training.is_resumed
    with meter.phase("training"):
        kept = training.run()
    state = training.state
    meter.phases["training"] |= {"seconds": state.seconds, "resumed": resumed}
    samples = trial.split.samples("test")[:max_test_users]
    with meter.phase("answering"):
        report = task.answer(task.candidates(samples), f"test, {trial.method}")
    return AnswerResult(
        report,
        kept.valid,
        num_trainable(model),
        adapter_bytes(built),
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
            "candidates": {**candidates, "titles_cut": prompts.titles_cut},
            "frozen_recommender": None if known is None else recommender_details(known, known_seconds),
        },
    )
