"""The layout that all tables share: Markdown, and files beside each other."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_bituning.artifacts import write_whole


def markdown_table(heads: str, rows: Iterable[Sequence[str]]) -> str:
    """Lay rows out in Markdown under heads, which stand between ` | `."""
    lines = [heads, " | ".join("---" for _ in heads.split(" | ")), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines)


def interval(difference: dict[str, Any]) -> str:
    """Return the 95 % interval of a difference, as `PairedDifference.to_dict` gives it."""
    return f"{difference['low']:+.4f} to {difference['high']:+.4f}"


def write_table(path: Path, table: Any, text: str) -> str:
    """Write a table as JSON and Markdown, files that differ in their endings; return the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_name(f"{path.name}.json"), json.dumps(table, indent=1))
    write_whole(path.with_name(f"{path.name}.md"), text)
    return text
