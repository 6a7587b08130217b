"""The layout that all tables share: Markdown, and files beside each other."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_bituning.training.results import write_whole


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay rows out in Markdown.

    Args:
        heads: one a column.
        rows: as many cells each.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(difference: dict[str, Any]) -> str:
    """Return the 95 % interval of a difference, as `PairedDifference.to_dict` gives it."""
    return f"{difference['low']:+.4f} to {difference['high']:+.4f}"


def write_table(path: Path, table: Any, text: str) -> str:
    """Write a table as JSON and Markdown.

    Args:
        path: both files' without their endings.
        table: JSON values.
        text: its Markdown.

    Returns:
        The Markdown.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_name(f"{path.name}.json"), json.dumps(table, indent=1))
    write_whole(path.with_name(f"{path.name}.md"), text)
    return text
