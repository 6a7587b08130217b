"""The cells of a comparison, row x seed: named by what decides them, run in processes of their own, read."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from peft_bituning.artifacts import sha256_of_file
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError
from peft_bituning.evaluation import RankingReport
from peft_bituning.training import LaserArguments

from .cells import Cell, Result, Values, deciding, place_cell
from .methods import METHODS, KeptWeights, Trial, merge_lora
from .plan import Plan
from .processes import run_alone

RANKS, WEIGHTS = "ranks", "weights"
SHARED = "shared"
SHARE, SOURCE, OVER, KEEPS = "train_fraction", "source", "over", "keeps_weights"  # in the identities that have them


@dataclass(frozen=True)
class RowCell(Cell):
    """A row of the table with one seed."""

    label: str  # the row
    settings: dict[str, Any]  # the method's own
    arguments: LaserArguments  # its run; `output_dir` is the folder
    source: "RowCell | None" = None  # the cell on the source data whose weights it starts from
    over: "RowCell | None" = None  # the cell whose LoRA is merged into its language model
    on_source: bool = False  # whether it is itself one on the source data

    @property
    def name(self) -> str:
        """What it is called in print."""
        return f"{self.label}, seed {self.seed}"

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """Every test user's ranks, and the weights that others start from."""
        return (RANKS, WEIGHTS) if self.keeps_weights else (RANKS,)

    @property
    def first(self) -> "RowCell | None":
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


@dataclass(frozen=True)
class Finished:
    """The result of a cell."""

    cell: RowCell
    report: RankingReport  # every test user's rank
    values: Values  # the rest of it, as `cell.json` holds it


def read_finished(cell: RowCell) -> Finished | None:
    """Return a cell's result, or None where it is missing, damaged, or of other settings."""
    values = cell.read()
    if values is None:
        return None
    ranks = load_file(cell.path(RANKS))
    return Finished(cell, RankingReport(ranks["unfiltered"], ranks["filtered"]), values)


def cells_of(plan: Plan, data: Interactions) -> list[RowCell]:
    """Return every cell of a plan, rows in the file's order; the hash of its data is part of each."""
    digest = data.content_hash
    starts = any(row.source for row in plan.methods.values())
    source = plan.load_data(of_source=True).content_hash if starts else ""
    return [
        _cell(plan, label, seed, digest, source)
        for label in plan.methods
        for seed in (plan.seeds if plan.registered(label).is_random else plan.seeds[:1])
    ]


def _cell(plan: Plan, label: str, seed: int, data: str, source_data: str) -> RowCell:
    """Make a row's cell, and the cell that it starts from; a row that says nothing of either has no key for it."""
    row = plan.methods[label]
    more: Values = {} if row.train_fraction == 1 else {SHARE: row.train_fraction}
    if any(each.over == label for each in plan.methods.values()):
        more[KEEPS] = True
    if row.over is not None:
        below = _cell(plan, row.over, seed, data, "")
        return replace(_cell_on(plan, label, seed, data, {**more, OVER: below.identity}), over=below)
    if row.source and source_data:
        source = replace(_cell_on(plan, label, seed, source_data, {KEEPS: True}), on_source=True)
        return replace(_cell_on(plan, label, seed, data, {**more, SOURCE: source.identity}), source=source)
    return _cell_on(plan, label, seed, data, more)


def _cell_on(plan: Plan, label: str, seed: int, data: str, more: Values) -> RowCell:
    row, method = plan.methods[label], plan.registered(label)
    identity: Values = {
        "method": row.method,
        "settings": row.settings,
        "training": deciding(plan.arguments(label, seed, Path(".")), method.arguments),
        "seed": seed if method.is_random else None,
        "data": data,
        **more,
    }
    if method.uses_language_model:
        model = {"dtype": plan.model_dtype, "attn_implementation": plan.attn_implementation}
        identity["model"] = {**_model_identity(plan.model), **model}
    cell = place_cell(plan.output_dir, row.method, seed, identity)  # rows of the same settings share it
    return RowCell(**vars(cell), label=label, settings=row.settings, arguments=plan.arguments(label, seed, cell.folder))


def _model_identity(model: str) -> Values:
    """Name a model; of a local folder also what its files look like, as its name says little."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    config = folder / "config.json"
    digest = sha256_of_file(config) if config.is_file() else None
    return {"name": folder.resolve().name, "files": files, "config": digest}


def run_row(plan: Plan, cell: RowCell, where: str) -> str | None:
    """Run a cell, and before it the one that it starts from, each in a process of its own.

    Returns:
        Why it failed, or None.
    """
    first = cell.first
    if first is not None and first.read() is None:
        called = "on the source" if first.on_source else first.label
        print(f"{where}: first {called}", flush=True)
        reason = run_alone(first, partial(fill_row, plan, first))
        if reason is not None:
            return f"{called}: {reason}"
    return run_alone(cell, partial(fill_row, plan, cell))


def fill_row(plan: Plan, cell: RowCell) -> None:
    """Train and evaluate one cell in this process, from its checkpoint on, and write its result.

    Raises:
        CheckpointError: what it starts from is not there.
    """
    data = plan.load_data(cell.on_source)
    shared = Path(plan.output_dir) / SHARED
    shared.mkdir(parents=True, exist_ok=True)
    trial = Trial(
        cell.method,
        cell.settings,
        data,
        LeaveOneOut(data.histories).drawn(cell.share, cell.seed),
        partial(_load_base, plan, cell),
        cell.arguments,
        shared,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        None if cell.source is None else _kept_weights(cell.source),
        cell.keeps_weights,
    )
    cell.fill(partial(_run, cell, trial, time.perf_counter()))


def _run(cell: RowCell, trial: Trial, started: float) -> Result:
    result = METHODS[cell.method].run(trial)
    values = {
        "label": cell.label,
        "dataset": trial.data.counts(),
        "test": result.report.metrics(),
        **result.to_values(),
        "seconds_this_run": time.perf_counter() - started,
        "device": trial.device.type,
        "threads": torch.get_num_threads(),
    }
    ranks = {"unfiltered": result.report.ranks_unfiltered, "filtered": result.report.ranks_filtered}
    tensors = {RANKS: {name: torch.from_numpy(each) for name, each in ranks.items()}}
    if result.weights is not None:
        tensors[WEIGHTS] = result.weights.to_tensors()
    if cell.first is not None and (first := cell.first.read()) is not None:
        values["over" if cell.source is None else "source"] = {
            "dataset": first["dataset"],
            "row": cell.first.label,
            "rows": first["trained"]["rows"],
            "seconds": first["phases"]["training"]["seconds"],
        }
    return values, tensors


def _load_base(plan: Plan, cell: RowCell) -> BaseModel:
    """Load the language model, with the LoRA merged into it that the cell trains over."""
    base = plan.load_base()
    if cell.over is None:
        return base
    return merge_lora(base, cell.over.settings, _kept_weights(cell.over).users, cell.over.arguments)


def _kept_weights(first: RowCell) -> KeptWeights:
    if first.read() is None:
        raise CheckpointError(f"the weights of {first.label} to start from are not there; run the comparison again")
    return KeptWeights.from_tensors(load_tensors(first.path(WEIGHTS)))
