"""Requests: what callers give, checked and turned into catalog indices."""

from collections.abc import Sequence
from numbers import Integral

from ..data import ItemCatalog
from ..errors import ConfigurationError, UnknownItemError


def positive(name: str, value: object) -> int:
    """Return an integer >= 1, else raise a ConfigurationError of that name."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ConfigurationError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def history_indices(items: ItemCatalog, histories: Sequence[Sequence[str]], on_unknown: str) -> list[list[int]]:
    """Return the catalog indices of histories of item ids.

    Args:
        items: the catalog.
        histories: item ids in time order, one sequence a user.
        on_unknown: `error` names ids that are not in the catalog, `ignore` leaves them out.

    Raises:
        UnknownItemError: an id is not in the catalog.
        ConfigurationError: not a list of lists, or another `on_unknown`.
    """
    if on_unknown not in ("error", "ignore"):
        raise ConfigurationError(f"on_unknown must be 'error' or 'ignore', got {on_unknown!r}")
    if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
        raise ConfigurationError(
            f"histories must be a list of lists of item ids, got {short(histories)}; for one user write [[...]]"
        )
    index = items.index
    unknown = sorted({str(item) for history in histories for item in history if str(item) not in index})
    if unknown and on_unknown == "error":
        raise UnknownItemError(
            f"{len(unknown)} item ids are not in the catalog: {', '.join(unknown[:10])}; add them with add_items, "
            "or leave them out with on_unknown='ignore'"
        )
    return [[index[str(item)] for item in history if str(item) in index] for history in histories]


def strings(values: Sequence[str], name: str) -> list[str]:
    """Return a list of item ids; a ConfigurationError says that one id alone was given."""
    if isinstance(values, str):
        raise ConfigurationError(f"{name} must be a list of item ids, got {values!r}; for one item write [{values!r}]")
    return [str(value) for value in values]


def short(value: object) -> str:
    """Show a value in at most 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
