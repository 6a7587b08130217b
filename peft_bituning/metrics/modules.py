"""Where the `evaluate` modules of this package lie, and how to load them offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from evaluate import Metric

MODULE_NAMES = ("recall_at_k", "ndcg_at_k", "mrr")


def path(name: str) -> str:
    """Return the folder of an `evaluate` module of this package, as `evaluate.load` takes it.

    Args:
        name: `"recall_at_k"`, `"ndcg_at_k"` or `"mrr"`.

    Returns:
        The absolute path of the folder that holds `<name>.py`.

    Raises:
        ConfigurationError: There is no such module.
    """
    if name not in MODULE_NAMES:
        raise ConfigurationError(f"name must be one of {', '.join(MODULE_NAMES)}, got {name!r}")
    return str(Path(__file__).resolve().parent / name)


def load(name: str, **arguments: Any) -> "Metric":
    """Load one of this package's `evaluate` modules from its installed folder; no network is used.

    Args:
        name: `"recall_at_k"`, `"ndcg_at_k"` or `"mrr"`.
        arguments: Passed to `evaluate.load`, for instance `num_process` and `experiment_id`.

    Returns:
        The module: `load("recall_at_k").compute(predictions=scores, references=targets, k=10)`.

    Raises:
        ConfigurationError: There is no such module.
    """
    import evaluate

    return evaluate.load(path(name), **arguments)
