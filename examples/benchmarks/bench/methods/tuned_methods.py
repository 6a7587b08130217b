"""The methods that tune a language model, from a trial to its result."""

from collections.abc import Callable
from typing import Any

from peft_bituning.assembly import assemble, read_template
from peft_bituning.catalog.encoder import HistoryEncoder
from peft_bituning.catalog.item_table import ItemTable
from peft_bituning.data.samples import Sample
from peft_bituning.evaluation import EncodedUsers, RankingReport, catalog_ranks, rank_users
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.training.stage_result import StageResult
from peft_bituning.tuners.bituning import BiTuningConfig
from peft_bituning.tuners.rows.embedding_model import EmbeddingModel

from ..cells import RETIRED
from .meter import time_users
from .trial import METHODS, KeptWeights, Method, Trial, TrialResult
from .trial_run import TrialRun
from .tuned_training import TunedTraining
from .tuners import TUNERS, adapter_bytes, adapter_config, build_tuned, num_trainable

ENCODED_ITEMS = 256


def run_tuned(
    trial: Trial, keep: Callable[[HistoryEncoder, ItemTable], EncodedUsers] | None = None
) -> TrialResult[RankingReport]:
    """Train in both stages from the last checkpoint on, if there is one, and rank the test users.

    A trial with a `start` starts from A'; one without anybody to train on ranks with it as it is. `keep` makes what
    keeps the test users' embeddings.
    """
    with fast_cpu_matmul(trial.arguments.fast_cpu_matmul):
        run = TrialRun(trial, TUNERS[trial.method].reads_recommender)
        model = build_tuned(trial.method, run.base, trial.settings, run.known, trial.arguments)
        training = _prepare(run, model)
        kept = run.train(training, lambda: _train(training, trial))
        model.weights_in(kept.user_weights)
        samples, table = trial.split.samples("test"), kept.item_side.table
        progress = not trial.arguments.disable_tqdm
        encoded = None if keep is None else keep(training.encoder, table)
        report = rank_users(training.encoder, samples, table, progress, f"test, {trial.method}", encoded=encoded)
        _time_serving(run, training.encoder, table, samples)
        return _result(run, training, model, kept, report)


def _prepare(run: TrialRun, model: EmbeddingModel) -> TunedTraining:
    """Put the encoder around the model, and the training around the encoder."""
    trial, arguments = run.trial, run.trial.arguments
    template = read_template(arguments.template, arguments.attributes)
    encoder = assemble(
        run.base,
        model,
        trial.data.items,
        run.known,
        template,
        arguments.history,
        batch_size=arguments.per_device_eval_batch_size,
        device=run.device,
    )
    training = TunedTraining(
        run.accelerator,
        encoder,
        trial.split,
        trial.num_items,
        arguments,
        run.store,
        run.identity(adapter_config(model), template=template.to_dict()),
    )
    training.keeps_item_weights = trial.keeps_weights
    if trial.start is not None:
        model.weights_in(trial.start.users)
    if trial.is_trained:
        training.read_checkpoint()
    return training


def _train(training: TunedTraining, trial: Trial) -> StageResult:
    if trial.start is not None and not trial.is_trained:
        return training.without_training(trial.start)
    return training.run()[1]


def _time_serving(run: TrialRun, encoder: HistoryEncoder, table: ItemTable, samples: list[Sample]) -> None:
    """Measure what it takes to encode items, and one user at a time."""
    items = min(ENCODED_ITEMS, run.trial.num_items)
    encoder.encode([[0]], "item")  # nothing of the first pass's own work is counted
    with run.meter.phase("encoding"):
        encoder.encode_items(items)
    run.meter.phases["encoding"]["items"] = items
    table = table.to(encoder.device)

    def rank(sample: Sample) -> None:
        user = encoder.encode([sample.history])
        catalog_ranks(user.to(encoder.device), table, [sample.target], [sample.history])

    time_users(run.meter, rank, samples)


def _result(
    run: TrialRun, training: TunedTraining, model: EmbeddingModel, kept: StageResult, report: RankingReport
) -> TrialResult[RankingReport]:
    epochs = training.state.epochs
    steps = [0, *(int(epoch["global_step"]) for epoch in epochs)]
    updates = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    trained: dict[str, Any] = {
        "epochs": len(epochs),
        "updates": sum(updates),
        "rows": training.rows_an_epoch * len(epochs),
        "tokens": round(sum(epoch["train_tokens"] * n for epoch, n in zip(epochs, updates, strict=True))),
    }
    prompts = {"twins": training.encoder.collator.prompts.twin_count}
    return TrialResult(
        report,
        kept.valid,
        num_trainable(model),
        adapter_bytes(model),
        run.meter.phases,
        trained,
        run.details(kept.epoch, epochs, adapter_config(model), prompts=prompts),
        KeptWeights(kept.user_weights, kept.item_side.weights) if run.trial.keeps_weights else None,
    )


def _method(name: str) -> Method:
    # by name, not all of them: what only the recommender's readers read is no reason to train the others again
    deciding = {*LaserArguments().trajectory(), *RETIRED} - {"seed", "text_model", "hold_out_items"}
    if not TUNERS[name].reads_recommender:
        deciding -= {"id_recommender", "id_recommender_epochs", "max_collaborative_states", "item_collaborative"}
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
