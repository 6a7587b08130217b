"""Train and evaluate methods on one split with several seeds, and write one table.

    python examples/benchmarks/compare.py --config examples/benchmarks/compare/ml100k.yaml --smoke

Every cell, a method with a seed, runs in a process of its own and is kept once it is finished: the same command goes on
where it was stopped, and a changed setting runs only the cells that it changes. JSON, Markdown and a picture, named
after the configuration, are written into `output_dir` anew after each cell. docs/compare.md says what is equal between
the methods.
"""

import argparse
from functools import partial
from pathlib import Path

from bench.command_line import OneLineParser, run_main
from bench.comparison import RowCell, cells_of, read_finished, run_row
from bench.plan import Plan
from bench.plan_file import read_plan
from bench.processes import run_missing
from bench.tables.comparison import summarise
from bench.tables.layout import write_table
from bench.tables.markdown import to_markdown
from bench.tables.picture import plot_table

from peft_bituning.data import Interactions, LeaveOneOut

CHANGES = ("dataset", "max_users", "source", "model", "output_dir", "seeds", "methods")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; examples/benchmarks/compare has some")
    parser.add_argument("--source", help="data set of rows with `source: true`, in place of the file's")
    for name in ("dataset", "model", "output_dir"):
        parser.add_argument(f"--{name}", help="in place of the file's")
    parser.add_argument("--max_users", type=int, help="in place of the file's")
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
    cells = cells_of(plan, data)
    print(budget(plan, data))
    write = partial(write_tables, plan, cells, data)
    failed = {} if options.table_only else run_missing(cells, partial(run_row, plan), write)
    print(write(failed))
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


def write_tables(plan: Plan, cells: list[RowCell], data: Interactions, failed: dict[str, str]) -> str:
    """Write JSON, Markdown and picture of what is finished; return the Markdown."""
    found = {cell.name: read_finished(cell) for cell in cells}
    not_run = {name: failed.get(name, "not run yet") for name, result in found.items() if result is None}
    table = summarise(plan, [result for result in found.values() if result is not None], not_run, data)
    text = write_table(Path(plan.output_dir) / plan.name, table, to_markdown(table))
    plot_table(Path(plan.output_dir) / f"{plan.name}.png", table)
    return text


if __name__ == "__main__":
    run_main(main)
