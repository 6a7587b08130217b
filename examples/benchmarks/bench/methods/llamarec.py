"""LlamaRec-style, a method of a comparison: retrieved candidates are ranked again by their letters."""

from typing import cast

from peft_bituning.evaluation import RankingReport, history_scorer
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.recommenders import IDRecommender

from ..candidates import LETTERS, LetterModel, Reranker, Retriever, letter_tokens
from ..pooling import PooledModel
from .candidate_run import CandidateRun
from .meter import time_users
from .trial import Trial, TrialResult, register_method
from .tuners import build_tuned

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
    "id_recommender",
    "id_recommender_epochs",
    "mixed_precision",
    "fast_cpu_matmul",
)


@register_method("llamarec", uses_language_model=True, arguments=ARGUMENTS, takes_share=True)
def run_llamarec(trial: Trial) -> TrialResult[RankingReport]:
    """Retrieve with the frozen recommender of the seed, and rank the best again by a LoRA-tuned language model.

    The trial's settings are `num_candidates`, `trained_on`, and fields of LoRA's config.
    """
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        return _run(trial)


def _run(trial: Trial) -> TrialResult[RankingReport]:
    settings = dict(trial.settings)
    size = settings.pop("num_candidates", NUM_CANDIDATES)
    trained_on = settings.pop("trained_on", "retrieved")
    run = CandidateRun(trial, reads_recommender=True)
    pooled = cast(PooledModel, build_tuned("lora", run.base, settings, None, trial.arguments))
    prompts = run.prompts(LETTERS, size)
    model = LetterModel(pooled, letter_tokens(prompts, size)).to(run.device)
    known = cast(IDRecommender, run.known).to(run.device).eval()
    scorer = history_scorer(known, run.device)
    retriever = Retriever(scorer, size, f"evaluated/{trial.arguments.seed}")
    reranker = Reranker(model, *run.common(prompts), retriever=retriever, trained_on=trained_on)
    run.train_on(reranker, pooled, {"number": size, "trained_on": trained_on})
    samples = trial.split.samples("test")
    report = reranker.rank(samples, f"test, {trial.method}")
    time_users(run.meter, lambda sample: reranker.scores([sample]), samples)
    retrieved = len(retriever.retrieved(samples)) / len(samples)
    return run.result(report, test_targets_retrieved=retrieved, titles_cut=prompts.titles_cut)
