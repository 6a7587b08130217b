"""Configuration files: read, built on another one, changed by the command line, cut down to a moment's work."""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from peft_bituning.errors import ConfigurationError

from .plan import Plan
from .transfer import OVER

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
    "recommender_epochs": 3,
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
    values = _read(path, ())
    known = [each.name for each in fields(Plan) if each.name != "name"]
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise ConfigurationError(f"{path.name} must hold {', '.join([BASED_ON, *known])}, got {', '.join(unknown)}")
    changes = dict(changes)
    chosen = changes.pop("methods", None)
    if chosen is not None:
        rows = values.get("methods") or {}
        missing = [name for name in chosen if name not in rows]
        if missing:
            raise ConfigurationError(f"--methods must be rows of {path.name}, got {', '.join(missing)}")
        below = [row[OVER] for row in (rows[name] for name in chosen) if row and row.get(OVER) in rows]
        values["methods"] = {name: rows[name] for name in (*chosen, *below)}
        values["paper"] = {name: row for name, row in (values.get("paper") or {}).items() if name in chosen}
        if values.get("baseline") in rows and values["baseline"] not in chosen:
            del values["baseline"]
    if "source" in changes:
        values["source"] = {**(values.get("source") or {}), "dataset": changes.pop("source")}
    if smoke:
        values = _for_a_moment(values)
    return Plan(**{"methods": {}, **values, **changes, "name": path.stem})


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
    training = {**(base.get("training") or {}), **(values.get("training") or {})}
    return {**base, **values, "training": training}


def _for_a_moment(values: dict[str, Any]) -> dict[str, Any]:
    """Cut a configuration down: few users, two short epochs, one seed, a folder of its own."""
    values = deepcopy(values)
    values["training"] = {**(values.get("training") or {}), **SMOKE}
    values["max_users"] = min(values.get("max_users") or SMOKE_USERS, SMOKE_USERS)
    if values.get("source"):
        values["source"]["max_users"] = min(values["source"].get("max_users") or SMOKE_USERS, SMOKE_USERS)
    values["seeds"] = list(values.get("seeds") or [0])[:1]
    values["output_dir"] = f"{values.get('output_dir', Plan.output_dir)}-smoke"
    for row in (values.get("methods") or {}).values():
        own = (row or {}).get("training") or {}
        own |= {name: min(own[name], SMOKE[name]) for name in ("stage1_epochs", "stage2_epochs") if name in own}
    return values
