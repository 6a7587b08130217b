"""A trial by another ruler: the target among random candidates, and the language model writes its title."""

from dataclasses import dataclass
from typing import Any, cast

from peft import PeftModel

from peft_bituning.errors import ConfigurationError
from peft_bituning.matmul import fast_cpu_matmul

from ..candidates import TITLES, AnswerReport, TitleAnswers
from ..pooling import PooledModel
from .candidate_run import CandidateRun
from .trial import Trial
from .tuned import TUNERS, adapter_bytes, adapter_config, build_tuned, num_trainable

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
    run = CandidateRun(trial, TUNERS[trial.method].reads_recommender)
    end = run.base.tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError(
            f"the tokenizer must have an end-of-text token, which ends an answer, got none from {run.base.name!r}"
        )
    built = build_tuned(
        trial.method, run.base, {**trial.settings, "task_type": "CAUSAL_LM"}, run.known, trial.arguments
    )
    model = cast(PeftModel, built.model if isinstance(built, PooledModel) else built).to(run.device)
    prompts = run.prompts(TITLES, num_candidates)
    task = TitleAnswers(
        model,
        prompts,
        trial.split,
        trial.arguments,
        run.known,
        num_candidates,
        run.pad,
        int(end),
        run.device,
        candidate_seed,
    )
    adapter = adapter_config(built)
    candidates = {"number": num_candidates, "seed": candidate_seed}
    kept, trained = run.train(model, task, adapter, candidates)
    samples = trial.split.samples("test")[:max_test_users]
    with run.meter.phase("answering"):
        report = task.answer(task.candidates(samples), f"test, {trial.method}")
    return AnswerResult(
        report,
        kept.valid,
        num_trainable(model),
        adapter_bytes(built),
        run.meter.phases,
        trained,
        run.details(kept, adapter, {**candidates, "titles_cut": prompts.titles_cut}),
    )
