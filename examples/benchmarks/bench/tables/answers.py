"""The table of answers among candidates, from finished cells to Markdown."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from peft_bituning.data import Interactions
from peft_bituning.metrics.bootstrap import paired_bootstrap

from .layout import interval, markdown_table

BASELINE = "lora"
HEADS = (
    f"method | seeds | users | hit ratio@1 | valid ratio | product | right of valid | minus {BASELINE} | "
    "trained weights | rows trained | training, s | answering, s"
)


def summarise(
    found: dict[str, list[dict[str, Any]]], num_candidates: int, model: str, data: Interactions
) -> dict[str, Any]:
    """Make the table from what finished cells hold: means over seeds, and hits minus the baseline's, user by user."""
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
    name = Path(model).name if Path(model).is_dir() else model
    return {"dataset": data.counts(), "model": name, "num_candidates": num_candidates, "rows": rows}


def to_markdown(table: dict[str, Any]) -> str:
    """Lay out what `summarise` returned."""
    data, size = table["dataset"], table["num_candidates"]
    text = markdown_table(HEADS, [_row(method, row) for method, row in table["rows"].items()])
    return (
        f"Dataset `{data['source']}`: {data['users']:,} users, {data['items']:,} items, {data['events']:,} events. "
        f"Language model `{table['model']}`; {size} candidates a user, so that chance alone is {1 / size:.3f}. Means "
        "over seeds, in brackets the standard error over the users of a seed. The last column is the difference in "
        f"hit ratio@1 to `{BASELINE}` with its 95 % interval, a paired bootstrap over users.\n\n{text}\n"
    )


def _row(method: str, row: dict[str, Any]) -> list[str]:
    test, difference = row["test"], row.get("against_baseline")
    return [
        method,
        str(len(row["seeds"])),
        f"{test['users']:,.0f}",
        f"{test['hit_ratio@1']:.4f} ({test['hit_ratio@1_se']:.4f})",
        f"{test['valid_ratio']:.4f} ({test['valid_ratio_se']:.4f})",
        f"{test['hit_ratio@1_x_valid_ratio']:.4f}",
        f"{test['hit_ratio@1_of_valid']:.4f}",
        "-" if difference is None else f"{difference['difference']:+.4f} ({interval(difference)})",
        f"{row['trainable_parameters']:,}",
        f"{statistics.mean(each['rows'] for each in row['trained']):,.0f}",
        *(f"{row['seconds'][phase]:.1f}" for phase in ("training", "answering")),
    ]


def _hits(cells: list[dict[str, Any]]) -> np.ndarray:
    """Average each user's hits over seeds [U]."""
    return np.mean([[each["chosen"] == each["target"] for each in cell["answers"]] for cell in cells], axis=0)
