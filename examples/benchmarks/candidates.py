"""Let LoRA and iLoRA write the title of the next item, out of twenty that the prompt shows.

    python examples/benchmarks/candidates.py --dataset ml-100k --methods ilora lora --seeds 0 1

iLoRA's own protocol: hit ratio@1 and valid ratio over 20 candidates a user, which are the same for every method and
seed. A method with a seed is kept in `output_dir` once it is finished: the same command goes on where it was stopped,
and a changed setting runs anew. `candidates.json` and `candidates.md` are written after each. Beside the options here,
every field of `LaserArguments` is one; docs/candidates.md says which of them count.
"""

import hashlib
import json
import logging
import statistics
import sys
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from bench.bootstrap import paired_bootstrap
from bench.candidates import AnswerReport
from bench.comparison.cells import alone_in
from bench.methods import Trial, forget_checkpoints
from bench.methods.candidate_answers import METHODS, run_answers
from bench.methods.candidate_methods import ARGUMENTS
from peft_bituning.training.results import data_hash
from transformers import HfArgumentParser

from peft_bituning.artifacts import write_whole
from peft_bituning.base_models import load_base_model
from peft_bituning.data import Interactions, LeaveOneOut, load_interactions
from peft_bituning.errors import BiTuningError, CheckpointError, ConfigurationError
from peft_bituning.launch import use_all_cores
from peft_bituning.training import LaserArguments

TABLE, CELL_FILE, SHARED = "candidates", "cell.json", "shared"
DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("peft_bituning", "torch", "transformers", "peft")
BASELINE = "lora"
#: in place of the defaults of LaserArguments, for two cores
SMALL = {
    "output_dir": "output/candidates",
    "stage1_epochs": 2,
    "stage2_epochs": 0,
    "max_samples_per_epoch": 128,
    "max_validation_users": 32,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_history": 10,
    "max_item_tokens": 24,
    "learning_rate": 3e-4,
    "recommender": "sasrec",
    "recommender_epochs": 25,
    "save_steps": 10,
    "fast_cpu_matmul": True,
}

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """What is asked of which methods."""

    dataset: str = field(default="ml-100k", metadata={"help": "ml-100k, folder:PATH, atomic:PATH, amazon2018:..."})
    max_users: int | None = field(default=None, metadata={"help": "A seeded cut of so many users; None is all."})
    max_test_users: int | None = field(default=100, metadata={"help": "The first so many are asked; 0 is all."})
    model: str = field(default="smollm2-135m", metadata={"help": "Hub id, local folder, or alias."})
    model_dtype: str = field(default="float32", metadata={"help": f"Type of the frozen weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": ", ".join(METHODS)})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run a method and seed."})
    num_candidates: int = field(default=20, metadata={"help": "Candidates a prompt, the target among them."})
    candidate_seed: int = field(default=0, metadata={"help": "Decides the candidates of the users asked."})

    def __post_init__(self) -> None:
        """Check what argparse does not."""
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            raise ConfigurationError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigurationError(f"seeds must be different numbers, at least one, got {self.seeds!r}")
        if self.model_dtype not in DTYPES:
            raise ConfigurationError(f"model_dtype must be one of {', '.join(DTYPES)}, got {self.model_dtype!r}")


class Parser(HfArgumentParser):
    """Says what is wrong in one line, without the pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error for `main` to print."""
        raise ConfigurationError(f"{message}; --help lists all arguments")


def parse(argv: list[str]) -> tuple[Options, LaserArguments]:
    """Read the command line."""
    parser = Parser([Options, LaserArguments], description=__doc__)  # type: ignore[list-item]
    parser.set_defaults(**SMALL)
    options, arguments = parser.parse_args_into_dataclasses(argv)
    if arguments.seed:
        raise ConfigurationError(f"seed must be left to --seeds, got {arguments.seed}")
    return options, arguments


@dataclass(frozen=True)
class Cell:
    """A method with a seed.

    Args:
        method: its name.
        identity: everything that decides its result.
        folder: where its result is.
    """

    method: str
    identity: dict[str, Any]
    folder: Path

    def read(self) -> dict[str, Any] | None:
        """Return the result, or None where it is missing, damaged, or of other settings."""
        try:
            values = json.loads((self.folder / CELL_FILE).read_text(encoding="utf-8"))
            AnswerReport.from_list(values["answers"])
            return values if values["identity"] == self.identity else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def make_cell(method: str, seed: int, options: Options, arguments: LaserArguments, data: Interactions) -> Cell:
    """Name a method with a seed by what decides its result."""
    known = {each.name for each in fields(LaserArguments)} & set(ARGUMENTS)
    if method == "lora":  # reads no recommender
        known -= {"recommender", "recommender_epochs"}
    model = Path(options.model)
    identity = {
        "method": method,
        "seed": seed,
        "training": {name: getattr(arguments, name) for name in sorted(known)},
        "candidates": [options.num_candidates, options.candidate_seed, options.max_test_users],
        "data": data_hash(data),
        "model": [model.name if model.is_dir() else options.model, options.model_dtype, options.attn_implementation],
        "versions": {name: version(name) for name in PACKAGES},
    }
    text = json.dumps(identity, sort_keys=True)
    name = f"seed-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Cell(method, json.loads(text), Path(arguments.output_dir) / "cells" / method / name)


def run_cell(cell: Cell, options: Options, arguments: LaserArguments, data: Interactions) -> None:
    """Train and ask one method with one seed, from its checkpoint on, and write its result."""
    shared = Path(arguments.output_dir) / SHARED
    shared.mkdir(parents=True, exist_ok=True)
    trial = Trial(
        cell.method,
        {},
        data,
        LeaveOneOut(data.histories),
        lambda: load_base_model(
            options.model, getattr(torch, options.model_dtype), attn_implementation=options.attn_implementation
        ),
        replace(arguments, output_dir=str(cell.folder), seed=cell.identity["seed"], resume=True),
        shared,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    with alone_in(cell.folder):
        if cell.read() is None:
            _run(cell, trial, options)


def _run(cell: Cell, trial: Trial, options: Options) -> None:
    asked = (options.num_candidates, options.candidate_seed, options.max_test_users or None)
    try:
        result = run_answers(trial, *asked)
    except CheckpointError as error:
        logger.warning("%s starts again: %s", cell.method, error)
        forget_checkpoints(cell.folder)
        result = run_answers(trial, *asked)
    values = {
        "identity": cell.identity,
        "test": result.report.metrics(),
        "valid": result.valid,
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": result.adapter_bytes,
        "phases": result.phases,
        "trained": result.trained,
        "details": result.details,
        "answers": result.report.to_list(),
    }
    write_whole(cell.folder / CELL_FILE, json.dumps(values, indent=1))
    forget_checkpoints(cell.folder)


def summarise(found: dict[str, list[dict[str, Any]]], options: Options, data: Interactions) -> dict[str, Any]:
    """Make the table: means over seeds, and each method's hits minus the baseline's, user by user."""
    rows: dict[str, Any] = {}
    for method, cells in found.items():
        tests = [cell["test"] for cell in cells]
        rows[method] = {
            "seeds": [cell["identity"]["seed"] for cell in cells],
            "test": {name: statistics.mean(test[name] for test in tests) for name in tests[0]},
            "by_seed": tests,
            "trainable_parameters": cells[0]["trainable_parameters"],
            "trained": [cell["trained"] for cell in cells],
            "seconds": {
                phase: statistics.mean(cell["phases"][phase]["seconds"] for cell in cells)
                for phase in ("training", "answering")
            },
            "settings": cells[0]["identity"],
        }
        if method != BASELINE and BASELINE in found:
            difference = paired_bootstrap(_hits(cells), _hits(found[BASELINE]), resamples=10_000, seed=0)
            rows[method]["against_baseline"] = difference.to_dict()
    return {
        "dataset": data.counts(),
        "model": Path(options.model).name if Path(options.model).is_dir() else options.model,
        "num_candidates": options.num_candidates,
        "rows": rows,
    }


def _hits(cells: list[dict[str, Any]]) -> np.ndarray:
    """Average each user's hits over seeds [U]."""
    return np.mean([[each["chosen"] == each["target"] for each in cell["answers"]] for cell in cells], axis=0)


def to_markdown(table: dict[str, Any]) -> str:
    """Lay the table out."""
    data, size = table["dataset"], table["num_candidates"]
    lines = [
        f"Dataset `{data['source']}`: {data['users']:,} users, {data['items']:,} items, {data['events']:,} events. "
        f"Language model `{table['model']}`; {size} candidates a user, so that chance alone is {1 / size:.3f}. Means "
        "over seeds, in brackets the standard error over the users of a seed. The last column is the difference in "
        f"hit ratio@1 to `{BASELINE}` with its 95 % interval, a paired bootstrap over users.",
        "",
        f"| method | seeds | users | hit ratio@1 | valid ratio | product | right of valid | minus {BASELINE} | "
        "trained weights | rows trained | training, s | answering, s |",
        "|" + " --- |" * 12,
    ]
    for method, row in table["rows"].items():
        test, difference = row["test"], row.get("against_baseline")
        against = "-"
        if difference is not None:
            against = f"{difference['difference']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
        cells = [
            method,
            str(len(row["seeds"])),
            f"{test['users']:,.0f}",
            f"{test['hit_ratio@1']:.4f} ({test['hit_ratio@1_se']:.4f})",
            f"{test['valid_ratio']:.4f} ({test['valid_ratio_se']:.4f})",
            f"{test['hit_ratio@1_x_valid_ratio']:.4f}",
            f"{test['hit_ratio@1_of_valid']:.4f}",
            against,
            f"{row['trainable_parameters']:,}",
            f"{statistics.mean(each['rows'] for each in row['trained']):,.0f}",
            f"{row['seconds']['training']:.1f}",
            f"{row['seconds']['answering']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(cells: list[Cell], options: Options, arguments: LaserArguments, data: Interactions) -> str:
    """Write JSON and Markdown of what is finished; return the Markdown."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        values = cell.read()
        if values is not None:
            found.setdefault(cell.method, []).append(values)
    table = summarise(found, options, data)
    text, folder = to_markdown(table), Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{TABLE}.json", json.dumps(table, indent=1))
    write_whole(folder / f"{TABLE}.md", text)
    return text


def main(argv: list[str]) -> int:
    """Run what is missing, write the table; return 1 where a cell failed."""
    options, arguments = parse(argv)
    use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    data = load_interactions(options.dataset)
    if options.max_users is not None:
        data = data.sample_users(options.max_users, 0)
    cells = [make_cell(method, seed, options, arguments, data) for seed in options.seeds for method in options.methods]
    failed = False
    for number, cell in enumerate(cells, start=1):
        where = f"[{number}/{len(cells)}] {cell.method}, seed {cell.identity['seed']}"
        if cell.read() is not None:
            continue
        print(where, flush=True)
        try:
            run_cell(cell, options, arguments, data)
        except Exception as error:  # one that fails is no reason to lose the others
            logger.exception(where)
            print(f"{where} failed: {type(error).__name__}: {error}", flush=True)
            failed = True
        write_table(cells, options, arguments, data)
    print(write_table(cells, options, arguments, data))
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
