"""Train and evaluate methods on one split with several seeds, and write one table.

    python examples/benchmarks/compare.py --config examples/benchmarks/compare/ml100k.yaml --smoke

Every cell, a method with a seed, runs in a process of its own and is kept once it is finished: the same command goes on
where it was stopped, and a changed setting runs only the cells that it changes. JSON, Markdown and a picture, named
after the configuration, are written into `output_dir` anew after each cell. docs/compare.md says what is equal between
the methods.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from bench.comparison.cells import Finished, read_cell, run_in_child
from bench.comparison.configuration import read_plan
from bench.comparison.picture import plot_table
from bench.comparison.plan import Cell, Plan
from bench.comparison.table import summarise, to_markdown

from peft_bituning.artifacts import write_whole
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import BiTuningError, ConfigurationError

CHANGES = ("dataset", "max_users", "source", "model", "output_dir", "seeds", "methods")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error for `main` to print."""
        raise ConfigurationError(f"{message}; --help lists all arguments")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; examples/benchmarks/compare has some")
    parser.add_argument("--dataset", help="in place of the file's")
    parser.add_argument("--max_users", type=int, help="in place of the file's")
    parser.add_argument("--source", help="data set of rows with `source: true`, in place of the file's")
    parser.add_argument("--model", help="in place of the file's")
    parser.add_argument("--output_dir", help="in place of the file's")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the file's")
    parser.add_argument("--methods", nargs="+", help="only these rows of the file")
    parser.add_argument("--smoke", action="store_true", help="run every row for a moment, to see that all of them run")
    parser.add_argument("--table_only", action="store_true", help="train nothing; write the table of what is there")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run what is missing, write the table; return 1 where a cell failed."""
    options = parse(argv)
    changes = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    plan = read_plan(options.config, changes, options.smoke)
    data = plan.load_data()
    cells = plan.cells(data)
    print(budget(plan, data))
    failed: dict[str, str] = {}
    for number, cell in enumerate(cells, start=1):
        where = f"{cell.label}, seed {cell.seed}"
        if read_cell(cell) is not None or options.table_only:
            continue
        print(f"[{number}/{len(cells)}] {where}", flush=True)
        reason = None
        if cell.first is not None and read_cell(cell.first) is None:
            first = "on the source" if cell.source is not None else cell.first.label
            print(f"[{number}/{len(cells)}] {where}: first {first}", flush=True)
            reason = run_in_child(plan, cell.first)
            reason = reason and f"{first}: {reason}"
        reason = reason or run_in_child(plan, cell)
        if reason is not None:
            failed[where] = reason
            print(f"[{number}/{len(cells)}] {where} failed: {reason}", flush=True)
        write_table(plan, cells, data, failed)
    text = write_table(plan, cells, data, failed)
    print(text)
    return 1 if failed else 0


def budget(plan: Plan, data: Interactions) -> str:
    """Say how much every method that tunes the language model is trained at most."""
    arguments = plan.arguments(next(iter(plan.methods)), plan.seeds[0], Path("."))
    rows = len(LeaveOneOut(data.histories).training_samples(arguments.cuts))  # type: ignore[arg-type]
    epoch = min(rows, arguments.max_samples_per_epoch or rows)
    epochs = arguments.stage1_epochs + arguments.stage2_epochs
    return (
        f"budget of a method that tunes the language model: {epoch:,} of {rows:,} training rows an epoch x at most "
        f"{epochs} epochs ({arguments.stage1_epochs} + {arguments.stage2_epochs}) = {epoch * epochs:,} rows, "
        f"seeds {', '.join(map(str, plan.seeds))}"
    )


def write_table(plan: Plan, cells: list[Cell], data: Interactions, failed: dict[str, str]) -> str:
    """Write JSON, Markdown and picture of what is finished; return the Markdown."""
    finished: list[Finished] = []
    not_run: dict[str, str] = {}
    for cell in cells:
        found, where = read_cell(cell), f"{cell.label}, seed {cell.seed}"
        if found is None:
            not_run[where] = failed.get(where, "not run yet")
        else:
            finished.append(found)
    table: Any = summarise(plan, finished, not_run, data)
    text = to_markdown(table)
    folder = Path(plan.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{plan.name}.json", json.dumps(table, indent=1))
    write_whole(folder / f"{plan.name}.md", text)
    plot_table(folder / f"{plan.name}.png", table)
    return text


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
