"""The table of results, as Markdown."""

from collections.abc import Sequence
from typing import Any

METRICS = ("recall@10", "ndcg@10", "mrr")


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out methods and their test metrics.

    Args:
        rows: each with `name` and `test`, the metrics of `RankingReport.metrics`.

    Returns:
        A Markdown table: a line a method and filter mode.
    """
    lines = [
        "| method | seen | Recall@10 | NDCG@10 | MRR | users |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for mode, seen in (("unfiltered", "kept"), ("filtered", "left out")):
            metrics = row["test"][mode]
            cells = [f"{metrics[name]:.4f} ± {metrics[f'{name}_se']:.4f}" for name in METRICS]
            lines.append(f"| {row['name']} | {seen} | {' | '.join(cells)} | {row['test']['users']} |")
    return "\n".join(lines)
