"""Plans from files: read, built on another file, changed by the command line, cut down to a moment's work."""

from pathlib import Path
from typing import Any

import yaml

from peft_bituning.errors import ConfigurationError

from .plan import Plan

BASED_ON = "based_on"
INHERITED = (
    "dataset",
    "max_users",
    "source",
    "model",
    "model_dtype",
    "attn_implementation",
    "output_dir",
    "seeds",
    "training",
)
SMOKE_USERS = 60
SMOKE: dict[str, Any] = {
    "stage1_epochs": 1,
    "stage2_epochs": 1,
    "max_samples_per_epoch": 16,
    "max_validation_users": 16,
    "per_device_train_batch_size": 8,
    "max_item_tokens": 16,
    "id_recommender_epochs": 3,
    "save_steps": 1,
}


def read_plan(path: Path, changes: dict[str, Any], smoke: bool = False) -> Plan:
    """Read a configuration file.

    Args:
        path: the YAML file; with `based_on: FILE`, one beside it, it takes data, model, seeds, folder and training
            from there where it does not say them itself.
        changes: fields to set otherwise; a list of `methods` keeps those rows of the file and those that they are
            trained over, and its baseline where it is among them; `source` is the name of its data set alone.
        smoke: run every row for a moment, on few users, to see that all of them run.

    Returns:
        The plan.

    Raises:
        ConfigurationError: a file cannot be read, or a field is unknown or out of range.
    """
    values = {"methods": None, **_read(path, ())}
    changes = dict(changes)
    chosen = changes.pop("methods", None)
    if chosen is not None:
        values = _with_rows(values, chosen, path.name)
    if "source" in changes:
        changes["source"] = {**_mapping(values, "source", path.name), "dataset": changes["source"]}
    plan = Plan.of({**values, **changes}, path)
    return _for_a_moment(plan) if smoke else plan


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--config must be a readable YAML file, got {str(path)!r}: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path.name} must hold lines of `name: value`, got {type(values).__name__}")
    if BASED_ON not in values:
        return values
    below = path.parent / str(values.pop(BASED_ON))
    if below.resolve() in (each.resolve() for each in (*above, path)):
        raise ConfigurationError(f"{BASED_ON} must not lead back to the file itself, got {below.name!r} in {path.name}")
    base = {name: value for name, value in _read(below, (*above, path)).items() if name in INHERITED}
    training = {**_mapping(base, "training", below.name), **_mapping(values, "training", path.name)}
    return {**base, **values, "training": training}


def _mapping(values: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    """Return a part of a file that is to hold names and values."""
    part = values.get(name) or {}
    if not isinstance(part, dict):
        raise ConfigurationError(f"{name} of {file} must hold lines of `name: value`, got {part!r}")
    return part


def _with_rows(values: dict[str, Any], chosen: list[str], file: str) -> dict[str, Any]:
    """Keep the chosen rows, those that they are trained over, and what the file says of them."""
    rows = _mapping(values, "methods", file)
    if missing := [name for name in chosen if name not in rows]:
        raise ConfigurationError(f"--methods must be rows of {file}, got {', '.join(missing)}")
    overs = [row.get("over") for row in map(rows.get, chosen) if isinstance(row, dict)]
    below = [over for over in overs if isinstance(over, str) and over in rows]
    paper = {name: row for name, row in _mapping(values, "paper", file).items() if name in chosen}
    kept = {**values, "methods": {name: rows[name] for name in (*chosen, *below)}, "paper": paper}
    baseline = kept.get("baseline")
    if isinstance(baseline, str) and baseline in rows and baseline not in chosen:
        del kept["baseline"]
    return kept


def _for_a_moment(plan: Plan) -> Plan:
    """Cut a plan down: few users, two short epochs, one seed, a folder of its own."""

    def cut(users: int | None) -> int:
        return min(users or SMOKE_USERS, SMOKE_USERS)

    rows = {}
    for label, row in plan.methods.items():
        epochs = row.training.keys() & {"stage1_epochs", "stage2_epochs"}
        shorter = {name: min(row.training[name], SMOKE[name]) for name in epochs}
        rows[label] = row.model_copy(update={"training": {**row.training, **shorter}})
    source = plan.source and plan.source.model_copy(update={"max_users": cut(plan.source.max_users)})
    return plan.model_copy(
        update={
            "methods": rows,
            "training": {**plan.training, **SMOKE},
            "max_users": cut(plan.max_users),
            "source": source,
            "seeds": plan.seeds[:1],
            "output_dir": f"{plan.output_dir}-smoke",
        }
    )
