"""What is compared: the configuration, and the cells, method x seed, that it asks for."""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.methods import METHODS, Method
from peft_bituning.base_models import BaseModel, load_base_model
from peft_bituning.data import Interactions, load_interactions
from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments
from peft_bituning.training.results import data_hash

from .groups import check_bounds
from .transfer import KEEPS, LINE, OVER, SHARE, SOURCE, check_over, check_row, check_source, load_source

# What a method may set for itself; everything else of `training` is the same for all of them.
OWN_TRAINING = (
    "learning_rate",
    "stage2_learning_rate",
    "prefix_lr_ratio",
    "suffix_lr_ratio",
    "weight_decay",
    "warmup_ratio",
    "max_collaborative_states",
    "item_collaborative",
    "prefix_text",
    "suffix_text",
)
RESERVED = {"seed", "output_dir", "resume", "overwrite_output_dir"}
PACKAGES = ("peft_bituning", "torch", "transformers", "peft")
DTYPES = ("float32", "bfloat16", "float16")
OF_THE_ROW = ("method", "training", SHARE, SOURCE, OVER, LINE)  # everything else is the method's own


@dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Args:
        label: the method's row of the table.
        method: its name among `METHODS`.
        settings: its own settings.
        arguments: its run; `output_dir` is the cell's folder.
        identity: everything that decides its result; another identity is another folder.
        source: the cell on the source data whose weights it starts from.
        over: the cell whose LoRA is merged into its language model.
        on_source: whether it is itself one on the source data.
    """

    label: str
    method: str
    settings: dict[str, Any]
    arguments: LaserArguments
    identity: dict[str, Any]
    source: "Cell | None" = None
    over: "Cell | None" = None
    on_source: bool = False

    @property
    def first(self) -> "Cell | None":
        """The cell that has to run before it."""
        return self.source or self.over

    @property
    def share(self) -> float:
        """The share of the users that it trains on."""
        return float(self.identity.get(SHARE, 1))

    @property
    def keeps_weights(self) -> bool:
        """Whether its weights are kept for others."""
        return KEEPS in self.identity

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
        methods: rows of the table; each None or `{method, training: {...}, and the method's own settings}`, and
            `train_fraction`, the share of the users to train on; `source: true`, to start from the source's weights;
            `over: ROW`, to train over that row's LoRA; `line`, the row's line in a picture over the shares.
        name: of the table's files; the configuration file's own.
        question: what the table is to answer, printed above it.
        varies: fields of `training` that the question is about, so that rows may set them for themselves.
        paper: what the Laser paper prints for rows of this table, Recall@10, NDCG@10 and MRR by row.
        validation: show what the kept weights reached on validation as well.
        cold_start: `{user_events: n, item_events: m}` shows users with at most n training events, and targets that
            occur in at most m, apart from the others.
        dataset: as `load_interactions` takes it.
        max_users: a seeded cut of so many users; None is all.
        source: `{dataset: NAME, max_users: N}`, what rows with `source: true` are trained on first.
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
    name: str = "compare"
    question: str | None = None
    varies: list[str] = field(default_factory=list)
    paper: dict[str, list[float]] = field(default_factory=dict)
    validation: bool = False
    cold_start: dict[str, int] | None = None
    dataset: str = "ml-100k"
    max_users: int | None = None
    source: dict[str, Any] | None = None
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
        for place, names in (("training", set(self.training)), ("varies", set(self.varies))):
            if reserved := RESERVED & names:
                raise ConfigurationError(f"{place} must leave {', '.join(sorted(reserved))} to the comparison")
        if foreign := sorted(set(self.varies) - {each.name for each in fields(LaserArguments)}):
            raise ConfigurationError(f"varies must be fields of LaserArguments, got {', '.join(foreign)}")
        if self.cold_start is not None:
            check_bounds(self.cold_start)
        if self.source is not None:
            check_source(self.source)
        for label, numbers in self.paper.items():
            if label not in self.methods or len(numbers) != 3:
                raise ConfigurationError(
                    f"paper must hold Recall@10, NDCG@10 and MRR of rows of the file, got {label}: {numbers!r}"
                )
        for label in self.methods:
            if self.method_of(label) not in METHODS:
                raise ConfigurationError(
                    f"methods must be among {', '.join(METHODS)}, got {self.method_of(label)!r}; a row of another name "
                    "says `method: NAME`"
                )
            arguments = self.arguments(label, self.seeds[0], Path("."))
            check_row(label, self.row(label), self.registered(label), self.source, arguments.recommender)
            if (below := self.row(label).get(OVER)) is not None:
                check_over(label, self.row(label), below, None if below not in self.methods else self.method_of(below))

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
        allowed = [*OWN_TRAINING, *self.varies]
        foreign = sorted(set(own) - set(allowed))
        if foreign:
            raise ConfigurationError(
                f"training of {label} must be among {', '.join(allowed)}, got {', '.join(foreign)}; everything else "
                "is the same for all methods, but for what the file says under `varies`"
            )
        # A user's rows together or not: the same for all, whatever a method's own default is.
        values = {"group_cuts": False, "save_total_limit": 1, **self.training, **own}
        unknown = sorted(set(values) - {each.name for each in fields(LaserArguments)})
        if unknown:
            raise ConfigurationError(f"training must be fields of LaserArguments, got {', '.join(unknown)}")
        return LaserArguments(output_dir=str(folder), seed=seed, resume=True, **values)

    def load_data(self, of_source: bool = False) -> Interactions:
        """Read the histories, those of the source on demand."""
        if of_source and self.source is not None:
            return load_source(self.source)
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
        starts = any(self.row(label).get(SOURCE) for label in self.methods)
        source = data_hash(self.load_data(of_source=True)) if starts else None
        return [
            self._cell(label, seed, digest, source)
            for label in self.methods
            for seed in (self.seeds if self.registered(label).is_random else self.seeds[:1])
        ]

    def _cell(self, label: str, seed: int, digest: str, source_digest: str | None) -> Cell:
        """Make a row's cell, and the cell that it starts from; a row that says nothing of either has no key for it."""
        row = self.row(label)
        share = float(row.get(SHARE, 1))
        more: dict[str, Any] = {} if share == 1 else {SHARE: share}
        if any(self.row(each).get(OVER) == label for each in self.methods):
            more[KEEPS] = True
        if row.get(OVER):
            below = self._cell(str(row[OVER]), seed, digest, None)
            return replace(self._cell_on(label, seed, digest, {**more, OVER: below.identity}), over=below)
        if not row.get(SOURCE) or source_digest is None:
            return self._cell_on(label, seed, digest, more)
        source = replace(self._cell_on(label, seed, source_digest, {KEEPS: True}), on_source=True)
        return replace(self._cell_on(label, seed, digest, {**more, SOURCE: source.identity}), source=source)

    def _cell_on(self, label: str, seed: int, digest: str, more: dict[str, Any]) -> Cell:
        method = self.registered(label)
        settings = {name: value for name, value in self.row(label).items() if name not in OF_THE_ROW}
        arguments = self.arguments(label, seed, Path("."))
        identity: dict[str, Any] = {
            "method": self.method_of(label),
            "settings": settings,
            "training": {name: getattr(arguments, name) for name in method.arguments},
            "seed": seed if method.is_random else None,
            "data": digest,
            "versions": {name: version(name) for name in PACKAGES},
            **more,
        }
        if method.uses_language_model:
            identity["model"] = {**_model_identity(self.model), "dtype": self.model_dtype}
            identity["model"]["attn_implementation"] = self.attn_implementation
        text = json.dumps(identity, sort_keys=True)
        identity = json.loads(text)
        name = f"seed-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = Path(self.output_dir) / "cells" / self.method_of(label) / name  # rows of the same settings share it
        return Cell(label, self.method_of(label), settings, self.arguments(label, seed, folder), identity)


def _model_identity(model: str) -> dict[str, Any]:
    """Name a model; of a local folder also what its files look like, as its name says little."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    return {"name": folder.resolve().name, "files": files, "config": digest}
