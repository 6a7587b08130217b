"""What the trained model is held against, on the same users and the same catalog."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..catalog.encoder import HistoryEncoder
from ..catalog.item_table import ItemTable
from ..catalog.item_tables import encode_table
from ..data.samples import LeaveOneOut
from ..evaluation import evaluate_ranking, history_scorer, rank_users
from ..recommenders import IDRecommender, ItemKNN, Popularity
from ..tuners.bituning import BiTuningConfig

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
    split: LeaveOneOut, num_items: int, id_recommender: IDRecommender | None, device: Any
) -> list[dict[str, Any]]:
    """Measure popularity, item-kNN and the frozen ID recommender on the test split.

    The counting ones are fit on training and validation events, as they have nothing to choose on validation; the ID
    recommender was trained on training events with early stopping on validation.
    """
    methods: list[tuple[str, Any, Any]] = [
        ("popularity", Popularity(num_items).fit(split.known_sequences), "cpu"),
        ("item-kNN", ItemKNN(num_items).fit(split.known_sequences), "cpu"),
    ]
    if id_recommender is not None:
        methods.append((f"frozen ID recommender ({id_recommender.recommender_type})", id_recommender, device))
    samples = split.samples("test")
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
    """Measure the untrained language model on the test split, by two poolings; the model stays as it is.

    Args:
        model: the PEFT model with the untrained adapter active.
        encoder: encodes with it.
        split: the users.
        num_items: I.
        adapter: name of the untrained adapter.
        tables: where the item tables of large catalogs go.
        identity: of the run.
        progress: show progress bars.

    Returns:
        The masked mean of the prompt's text states without virtual tokens, the untrained suffix, and its item table.
    """
    samples = split.samples("test")
    model.add_adapter(UNTRAINED_MEAN, BiTuningConfig(prefix_encoder="none", pooling="mean"))
    model.set_adapter(UNTRAINED_MEAN)
    table = encode_table(encoder, num_items, tables, {**identity, "adapter": UNTRAINED_MEAN}, progress)
    mean = rank_users(encoder, samples, table, progress, "untrained LLM")
    model.set_adapter(adapter)
    model.delete_adapter(UNTRAINED_MEAN)
    table = encode_table(encoder, num_items, tables, {**identity, "adapter": adapter}, progress)
    suffix = rank_users(encoder, samples, table, progress, "untrained suffix")
    return Baselines(
        [
            {"name": "untrained LLM (mean of text states)", "test": mean.metrics()},
            {"name": "untrained suffix", "test": suffix.metrics()},
        ],
        table,
    )
