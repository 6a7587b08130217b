"""Rows that train on a share of the users, start from weights of another data set, or train over another row's."""

from dataclasses import replace
from typing import Any

from bench.methods import TUNERS, Method
from peft_bituning.data import Interactions, ItemCatalog, load_interactions
from peft_bituning.errors import ConfigurationError
from peft_bituning.training.arguments import RECOMMENDERS

SHARE, SOURCE, OVER, LINE = "train_fraction", "source", "over", "line"
KEEPS = "keeps_weights"  # in the identity of a cell that others start from
SOURCE_FIELDS = ("dataset", "max_users")


def check_source(source: Any) -> None:
    """Refuse what is not `{dataset: NAME, max_users: N}`, where N may be left out.

    Args:
        source: what a configuration says under `source`.

    Raises:
        ConfigurationError: no data set, another name, or no count.
    """
    if not isinstance(source, dict) or "dataset" not in source or set(source) - set(SOURCE_FIELDS):
        raise ConfigurationError(f"source must be {{dataset: NAME, max_users: N}}, got {source!r}")
    users = source.get("max_users")
    if users is not None and (isinstance(users, bool) or not isinstance(users, int) or users < 1):
        raise ConfigurationError(f"max_users of source must be an integer >= 1, got {users!r}")


def check_row(label: str, row: dict[str, Any], method: Method, source: Any, recommender: str) -> None:
    """Refuse a share or a source that the row's method can do nothing with.

    Args:
        label: the row.
        row: what the file says of it.
        method: the row's.
        source: what the file says of the source.
        recommender: what its run calls the frozen recommender.

    Raises:
        ConfigurationError: a value out of range, or one that does not fit the method or the file.
    """
    share, starts = row.get(SHARE, 1), row.get(SOURCE, False)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigurationError(f"{SHARE} of {label} must be a number from 0 to 1, got {share!r}")
    if not isinstance(starts, bool):
        raise ConfigurationError(f"{SOURCE} of {label} must be true or false, got {starts!r}; the file says which")
    if share < 1 and not method.takes_share:
        raise ConfigurationError(f"{SHARE} of {label} must be 1 for its method, got {share!r}; leave it out")
    if starts and not method.takes_start:
        raise ConfigurationError(f"{SOURCE} of {label} must be left out for its method, which takes on no weights")
    if starts and source is None:
        raise ConfigurationError(
            f"{SOURCE} must be {{dataset: NAME, max_users: N}} for {label}, which starts from it, got None; say it in "
            "the file, or --source"
        )
    if share == 0 and not starts:
        raise ConfigurationError(
            f"{SHARE} of {label} must be > 0 without `{SOURCE}: true`, got {share!r}; nothing would be trained at all"
        )
    if starts and recommender not in (*RECOMMENDERS, "none"):
        raise ConfigurationError(
            f"recommender of {label} must be {' or '.join(RECOMMENDERS)}, trained on each of the two catalogs, got "
            f"{recommender!r}"
        )


def check_over(label: str, row: dict[str, Any], below: Any, method: str | None) -> None:
    """Refuse a row that trains over another one where it cannot.

    Args:
        label: the row.
        row: what the file says of it.
        below: the row that it trains over.
        method: that row's method; None where the file has no such row.

    Raises:
        ConfigurationError: the row below trains no LoRA, or the row above does not tune the language model, or takes a
            share or a source as well.
    """
    if method != "lora":
        raise ConfigurationError(f"{OVER} of {label} must be a row of the file whose method is lora, got {below!r}")
    if row.get("method", label) not in TUNERS:
        raise ConfigurationError(f"{OVER} of {label} must be left out for its method, which tunes no language model")
    if row.get(SOURCE) or row.get(SHARE, 1) != 1:
        raise ConfigurationError(f"{OVER} of {label} must stand without {SOURCE} and {SHARE}; leave them out")


def load_source(source: dict[str, Any]) -> Interactions:
    """Read the source.

    Args:
        source: as `check_source` takes it; with `max_users` a seeded cut of so many users, whose items alone are its
            catalog, as nobody is ranked on the rest.

    Returns:
        Its histories.
    """
    data = load_interactions(source["dataset"])
    return data if source.get("max_users") is None else _with_their_items(data.sample_users(source["max_users"], 0))


def _with_their_items(data: Interactions) -> Interactions:
    kept = sorted({item for history in data.histories for item in history})
    place = {item: number for number, item in enumerate(kept)}
    return replace(
        data,
        items=ItemCatalog(
            tuple(data.items.item_ids[item] for item in kept), tuple(data.items.attributes[item] for item in kept)
        ),
        histories=tuple(tuple(place[item] for item in history) for history in data.histories),
    )
