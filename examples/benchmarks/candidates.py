"""Let LoRA and iLoRA write the title of the next item, out of twenty that the prompt shows.

    python examples/benchmarks/candidates.py --dataset ml-100k --methods ilora lora --seeds 0 1

iLoRA's own protocol: hit ratio@1 and valid ratio over 20 candidates per user, which are the same for every method and
seed. A method with a seed is kept in `output_dir` once it is finished: the same command goes on where it was stopped,
and a changed setting runs anew. `candidates.json` and `candidates.md` are written after each. Beside the options here,
every field of `LaserArguments` is one; docs/candidates.md says which of them count.
"""

from functools import partial
from pathlib import Path

from bench.answer_cells import Options, fill_answers, make_cells
from bench.cells import Cell
from bench.command_line import OneLineParser, run_main
from bench.processes import run_alone, run_missing
from bench.tables.answers import summarise, to_markdown
from bench.tables.layout import write_table
from transformers import HfArgumentParser

from peft_bituning.data import Interactions
from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments

TABLE = "candidates"
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
    "id_recommender": "sasrec",
    "id_recommender_epochs": 25,
    "save_steps": 10,
    "fast_cpu_matmul": True,
}


class Parser(OneLineParser, HfArgumentParser):
    """The fields of dataclasses as options."""


def parse(argv: list[str]) -> tuple[Options, LaserArguments]:
    """Read the command line."""
    parser = Parser([Options, LaserArguments], description=__doc__)  # type: ignore[list-item]
    parser.set_defaults(**SMALL)
    options, arguments = parser.parse_args_into_dataclasses(argv)
    if arguments.seed:
        raise ConfigurationError(f"seed must be left to --seeds, got {arguments.seed}")
    return options, arguments


def main(argv: list[str]) -> int:
    """Run what is missing, write the table; return 1 where a cell failed."""
    options, arguments = parse(argv)
    data = options.load_data()
    cells = make_cells(options, arguments, data)
    write = partial(write_tables, options, Path(arguments.output_dir), cells, data)

    def run(cell: Cell, where: str) -> str | None:
        return run_alone(cell, partial(fill_answers, cell, options, arguments))

    failed = run_missing(cells, run, write)
    print(write(failed))
    return 1 if failed else 0


def write_tables(options: Options, folder: Path, cells: list[Cell], data: Interactions, failed: dict[str, str]) -> str:
    """Write JSON and Markdown of what is finished; return the Markdown."""
    found: dict[str, list[dict[str, object]]] = {}
    for cell in cells:
        values = cell.read()
        if values is not None:
            found.setdefault(cell.method, []).append(values)
    table = summarise(found, options.num_candidates, options.model, data)
    return write_table(folder / TABLE, table, to_markdown(table))


if __name__ == "__main__":
    run_main(main)
