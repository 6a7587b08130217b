"""What is compared: the configuration, and the cells, method x seed, that it asks for."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from peft_bituning.base_models import BaseModel, load_base_model
from peft_bituning.comparison import METHODS, Method
from peft_bituning.data import Interactions, load_interactions
from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments
from peft_bituning.training.results import data_hash

# What a method may set for itself; everything else of `training` is the same for all of them.
OWN_TRAINING = (
    "learning_rate",
    "stage2_learning_rate",
    "weight_decay",
    "warmup_ratio",
    "max_collaborative_states",
    "prefix_text",
    "suffix_text",
)
PACKAGES = ("peft_bituning", "torch", "transformers", "peft")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Args:
        label: the method's row of the table.
        method: its name among `METHODS`.
        settings: its own settings.
        arguments: its run; `output_dir` is the cell's folder.
        identity: everything that decides its result; another identity is another folder.
    """

    label: str
    method: str
    settings: dict[str, Any]
    arguments: LaserArguments
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its result is."""
        return Path(self.arguments.output_dir)

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.arguments.seed


@dataclass(frozen=True)
class Plan:
    """A configuration file; its fields are the file's names.

    Args:
        methods: rows of the table; each None or `{method, training: {...}, and the method's own settings}`.
        dataset: as `load_interactions` takes it.
        max_users: a seeded cut of so many users; None is all.
        model: the language model of all methods that use one: Hub id, folder or alias.
        model_dtype: type of its weights.
        attn_implementation: passed to transformers.
        output_dir: folder of cells and table.
        seeds: one cell a method and seed; methods without chance take the first.
        training: fields of `LaserArguments`, the same for all methods.
        baseline: the row that others are compared with; None is the best by NDCG@10 that is not ours.
        published: show published results of rivals that are not run, from another split.
    """

    methods: dict[str, Any]
    dataset: str = "ml-100k"
    max_users: int | None = None
    model: str = "smollm2-135m"
    model_dtype: str = "float32"
    attn_implementation: str | None = None
    output_dir: str = "output/compare"
    seeds: list[int] = field(default_factory=lambda: [0])
    training: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    published: bool = False

    def __post_init__(self) -> None:
        """Check everything that can be checked before any work is done."""
        if not isinstance(self.methods, dict) or not self.methods:
            raise ConfigurationError(f"methods must be rows by name, got {self.methods!r}; known: {', '.join(METHODS)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigurationError(f"seeds must be different numbers, at least one, got {self.seeds!r}")
        if self.model_dtype not in DTYPES:
            raise ConfigurationError(f"model_dtype must be one of {', '.join(DTYPES)}, got {self.model_dtype!r}")
        if self.baseline is not None and self.baseline not in self.methods:
            raise ConfigurationError(f"baseline must be one of the methods, got {self.baseline!r}")
        reserved = {"seed", "output_dir", "resume", "overwrite_output_dir"} & set(self.training)
        if reserved:
            raise ConfigurationError(f"training must leave {', '.join(sorted(reserved))} to the comparison")
        for label in self.methods:
            if self.method_of(label) not in METHODS:
                raise ConfigurationError(
                    f"methods must be among {', '.join(METHODS)}, got {self.method_of(label)!r}; a row of another name "
                    "says `method: NAME`"
                )
            self.arguments(label, self.seeds[0], Path("."))

    def row(self, label: str) -> dict[str, Any]:
        """Return what the file says of a row."""
        return dict(self.methods[label] or {})

    def method_of(self, label: str) -> str:
        """Return the name of a row's method."""
        return str(self.row(label).get("method", label))

    def registered(self, label: str) -> Method:
        """Return a row's method."""
        return METHODS[self.method_of(label)]

    def arguments(self, label: str, seed: int, folder: Path) -> LaserArguments:
        """Return the settings of a row's run."""
        own = dict(self.row(label).get("training") or {})
        foreign = sorted(set(own) - set(OWN_TRAINING))
        if foreign:
            raise ConfigurationError(
                f"training of {label} must be among {', '.join(OWN_TRAINING)}, got {', '.join(foreign)}; everything "
                "else is the same for all methods"
            )
        # A user's rows together or not: the same for all, whatever a method's own default is.
        values = {"group_cuts": False, "save_total_limit": 1, **self.training, **own}
        unknown = sorted(set(values) - {each.name for each in fields(LaserArguments)})
        if unknown:
            raise ConfigurationError(f"training must be fields of LaserArguments, got {', '.join(unknown)}")
        return LaserArguments(output_dir=str(folder), seed=seed, resume=True, **values)

    def load_data(self) -> Interactions:
        """Read the histories."""
        data = load_interactions(self.dataset)
        return data if self.max_users is None else data.sample_users(self.max_users, 0)

    def load_base(self) -> BaseModel:
        """Load the language model."""
        dtype: torch.dtype = getattr(torch, self.model_dtype)
        return load_base_model(self.model, dtype, attn_implementation=self.attn_implementation)

    def cells(self, data: Interactions) -> list[Cell]:
        """Return every cell, rows in the file's order.

        Args:
            data: what `load_data` returned; its hash is part of every cell.
        """
        digest = data_hash(data)
        return [
            self._cell(label, seed, digest)
            for label in self.methods
            for seed in (self.seeds if self.registered(label).is_random else self.seeds[:1])
        ]

    def _cell(self, label: str, seed: int, digest: str) -> Cell:
        method = self.registered(label)
        settings = {name: value for name, value in self.row(label).items() if name not in ("method", "training")}
        arguments = self.arguments(label, seed, Path("."))
        identity: dict[str, Any] = {
            "method": self.method_of(label),
            "settings": settings,
            "training": {name: getattr(arguments, name) for name in method.arguments},
            "seed": seed if method.is_random else None,
            "data": digest,
            "versions": {name: version(name) for name in PACKAGES},
        }
        if method.uses_language_model:
            identity["model"] = {**_model_identity(self.model), "dtype": self.model_dtype}
            identity["model"]["attn_implementation"] = self.attn_implementation
        text = json.dumps(identity, sort_keys=True)
        identity = json.loads(text)
        name = f"seed-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = Path(self.output_dir) / "cells" / label / name
        return Cell(label, self.method_of(label), settings, self.arguments(label, seed, folder), identity)


def read_plan(path: Path, changes: dict[str, Any]) -> Plan:
    """Read a configuration file.

    Args:
        path: the YAML file.
        changes: fields to set otherwise; a list of `methods` keeps those rows of the file.

    Returns:
        The plan.

    Raises:
        ConfigurationError: the file cannot be read, or a field is unknown or out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--config must be a readable YAML file, got {str(path)!r}: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path.name} must hold lines of `name: value`, got {type(values).__name__}")
    known = [each.name for each in fields(Plan)]
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise ConfigurationError(f"{path.name} must hold {', '.join(known)}, got {', '.join(unknown)}")
    chosen = changes.pop("methods", None)
    if chosen is not None:
        rows = values.get("methods") or {}
        missing = [name for name in chosen if name not in rows]
        if missing:
            raise ConfigurationError(f"--methods must be rows of {path.name}, got {', '.join(missing)}")
        values["methods"] = {name: rows[name] for name in chosen}
    return Plan(**{"methods": {}, **values, **changes})


def _model_identity(model: str) -> dict[str, Any]:
    """Name a model; of a local folder also what its files look like, as its name says little."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    return {"name": folder.resolve().name, "files": files, "config": digest}
