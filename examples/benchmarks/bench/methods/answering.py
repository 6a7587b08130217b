"""A trial by another ruler: the target among random candidates, and the language model writes its title."""

from typing import cast

from peft import PeftModel

from peft_bituning.errors import ConfigurationError
from peft_bituning.matmul import fast_cpu_matmul

from ..candidates import TITLES, AnswerReport, TitleAnswers
from ..pooling import PooledModel
from .candidate_run import CandidateRun
from .trial import Trial, TrialResult
from .tuners import TUNERS, build_tuned

ANSWERING = ("ilora", "lora")


def run_answers(
    trial: Trial, num_candidates: int = 20, candidate_seed: int = 0, max_test_users: int | None = None
) -> TrialResult[AnswerReport]:
    """Train from the last checkpoint on, if there is one, and let the model answer for the test users.

    Args:
        trial: its method is one of `ANSWERING`, its settings fields of the adapter's config.
        num_candidates: candidates per prompt, the target among them.
        candidate_seed: decides the candidates of validation and test users.
        max_test_users: the first so many of the test users; None is all.

    Raises:
        ConfigurationError: another method, settings that do not fit, or a tokenizer without an end-of-text token.
    """
    if trial.method not in ANSWERING:
        raise ConfigurationError(f"method must be one of {', '.join(ANSWERING)}, got {trial.method!r}")
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        return _run(trial, num_candidates, candidate_seed, max_test_users)


def _run(
    trial: Trial, num_candidates: int, candidate_seed: int, max_test_users: int | None
) -> TrialResult[AnswerReport]:
    run = CandidateRun(trial, TUNERS[trial.method].reads_recommender)
    end = run.base.tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError(
            f"the tokenizer must have an end-of-text token, which ends an answer, got none from {run.base.name!r}"
        )
    settings = {**trial.settings, "task_type": "CAUSAL_LM"}
    built = build_tuned(trial.method, run.base, settings, run.known, trial.arguments)
    model = cast(PeftModel, built.model if isinstance(built, PooledModel) else built).to(run.device)
    prompts = run.prompts(TITLES, num_candidates)
    task = TitleAnswers(
        model,
        *run.common(prompts),
        eos_token_id=int(end),
        num_candidates=num_candidates,
        recommender=None if run.known is None else run.known.to(run.device).eval(),
        candidate_seed=candidate_seed,
    )
    run.train_on(task, built, {"number": num_candidates, "seed": candidate_seed})
    samples = trial.split.samples("test")[:max_test_users]
    with run.meter.phase("answering"):
        report = task.answer(task.candidates(samples), f"test, {trial.method}")
    return run.result(report, titles_cut=prompts.titles_cut)
