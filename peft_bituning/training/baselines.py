"""What the trained model is held against, on the same users and the same catalog."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..catalog.item_tables import encode_table
from ..data.samples import LeaveOneOut
from ..evaluation import evaluate_ranking, history_scorer
from ..recommenders import IDRecommender, ItemKNN, Popularity
from ..tuners.bituning import BiTuningConfig, BiTuningModel
from .ranking import rank_users

logger = logging.getLogger(__name__)

UNTRAINED_MEAN = "untrained_mean"


@dataclass
class Baselines:
    """Rows of the results table, and the table that the untrained suffix gives.

    Args:
        rows: each with `name` and `test` metrics.
        first_table: the item table of the untrained adapter.
    """

    rows: list[dict[str, Any]]
    first_table: ItemTable


def counting_rows(
    split: LeaveOneOut, num_items: int, recommender: IDRecommender | None, device: Any
) -> list[dict[str, Any]]:
    """Measure popularity, item-kNN and the frozen ID recommender on the test split.

    The counting ones are fit on training and validation events, as they have nothing to choose on validation; the
    ID recommender was trained on training events with early stopping on validation.

    Args:
        split: the users.
        num_items: I.
        recommender: the frozen ID recommender, or None.
        device: where it is.

    Returns:
        Rows with `name` and `test`.
    """
    samples = split.samples("test")
    known = {sample.user: list(sample.history) for sample in samples}
    sequences = [known.get(user, sequence) for user, sequence in enumerate(split.train_sequences)]
    methods: list[tuple[str, Any, Any]] = [
        ("popularity", Popularity(num_items).fit(sequences), "cpu"),
        ("item-kNN", ItemKNN(num_items).fit(sequences), "cpu"),
    ]
    if recommender is not None:
        kind = recommender.recommender_type
        methods.append((f"frozen ID recommender ({kind})", recommender, device))
    return [
        {"name": name, "test": evaluate_ranking(history_scorer(method, place), samples).metrics()}
        for name, method, place in methods
    ]


def language_model_rows(
    model: PeftModel,
    encoder: HistoryEncoder,
    split: LeaveOneOut,
    num_items: int,
    adapter: str,
    tables: Path,
    identity: Mapping[str, Any],
    progress: bool,
) -> Baselines:
    """Measure the untrained language model on the test split, by two poolings.

    Args:
        model: the PEFT model with the untrained adapter active.
        encoder: encodes with it.
        split: the users.
        num_items: I.
        adapter: name of the untrained adapter.
        tables: where shards of large item tables go.
        identity: of the run.
        progress: show progress bars.

    Returns:
        The rows "untrained LLM (mean)", the masked mean of the prompt's text states without virtual tokens, and
        "untrained suffix", and the latter's item table, by whose mean the model is centered from now on.
    """
    samples = split.samples("test")
    model.add_adapter(UNTRAINED_MEAN, BiTuningConfig(prefix_encoder="none", pooling="mean"))
    model.set_adapter(UNTRAINED_MEAN)
    table = encode_table(encoder, num_items, tables, {**identity, "adapter": UNTRAINED_MEAN}, progress)
    mean = rank_users(encoder, samples, table, progress, "untrained LLM")
    model.set_adapter(adapter)
    model.delete_adapter(UNTRAINED_MEAN)
    center = cast(BiTuningModel, model.base_model).embedding_center
    table = encode_table(encoder, num_items, tables, {**identity, "adapter": adapter}, progress, center)
    suffix = rank_users(encoder, samples, table, progress, "untrained suffix")
    return Baselines(
        [
            {"name": "untrained LLM (mean of text states)", "test": mean.metrics()},
            {"name": "untrained suffix", "test": suffix.metrics()},
        ],
        table,
    )
