"""Costs of rows: seconds, memory, weights."""

import statistics
from collections.abc import Sequence
from typing import Any

from ..comparison import Finished
from .layout import markdown_table

HEADS = (
    "costs | trained weights | kept, MB | rows trained | text tokens trained | training, s | peak MB | "
    "1,000 items, s | peak MB | a user, ms | peak MB"
)
MARKS = {"frozen_recommender": "*", "resumed": "†", "source": "‡", "over": "§"}


def row_costs(cells: Sequence[Finished]) -> dict[str, Any]:
    """Take the mean of seconds and the largest peak over a row's seeds.

    Returns:
        Weights, bytes, rows and tokens trained, and by phase seconds and peak memory in MiB.
    """
    values = [each.values for each in cells]
    costs: dict[str, Any] = {name: values[0][name] for name in ("trainable_parameters", "adapter_bytes", "device")}
    for name in ("rows", "tokens", "epochs"):
        known = [each["trained"][name] for each in values if each["trained"][name] is not None]
        costs[f"trained_{name}"] = statistics.mean(known) if known else None
    for phase in ("training", "encoding", "user"):
        measured = [each["phases"][phase] for each in values if phase in each["phases"]]
        if not measured:
            continue
        memory = "peak_cuda_mb" if all("peak_cuda_mb" in each for each in measured) else "peak_memory_mb"
        costs[phase] = {
            "seconds": statistics.mean(each["seconds"] for each in measured),
            "peak_mb": max(each[memory] for each in measured),
            "own_peak": all(each["own_peak"] for each in measured),
        }
    if "encoding" in costs:
        costs["encoding"]["items"] = values[0]["phases"]["encoding"]["items"]
    costs["resumed"] = any(each["phases"]["training"].get("resumed", False) for each in values)
    costs["frozen_recommender"] = values[0]["details"].get("frozen_recommender")
    for place in ("source", "over"):
        first = [each[place] for each in values if place in each]
        costs[place] = None
        if first:
            costs[place] = {name: statistics.mean(each[name] for each in first) for name in ("rows", "seconds")}
            costs[place] |= {name: first[0].get(name) for name in ("dataset", "row")}
    return costs


def costs_markdown(rows: dict[str, Any]) -> str:
    """Lay out the costs of a table's rows, footnotes below."""
    costs = {label: row["costs"] for label, row in rows.items()}
    table = markdown_table(HEADS, [_row(label, each) for label, each in costs.items()])
    return "\n\n".join([table, *_notes(costs)])


def _row(label: str, costs: dict[str, Any]) -> list[str]:
    marks = "".join(mark for name, mark in MARKS.items() if costs[name])
    kept = f"{costs['adapter_bytes'] / 1e6:.3f}" if costs["trainable_parameters"] else "-"
    cells = [f"{label}{marks}", f"{costs['trainable_parameters']:,}", kept]
    cells += [
        "-" if number is None else f"{number:,.0f}" for number in (costs["trained_rows"], costs["trained_tokens"])
    ]
    for phase in ("training", "encoding", "user"):
        if phase not in costs:
            cells += ["-", "-"]
            continue
        scale = {"training": 1, "encoding": 1000 / costs[phase].get("items", 1), "user": 1000}[phase]
        cells += [f"{scale * costs[phase]['seconds']:.1f}", f"{costs[phase]['peak_mb']:,.0f}"]
    return cells


def _notes(costs: dict[str, dict[str, Any]]) -> list[str]:
    """Say what stands beside a row's own costs."""
    notes = []
    if known := {label: each["frozen_recommender"] for label, each in costs.items() if each["frozen_recommender"]}:
        told = [
            f"`{label}`: {each['kind']}, {each['parameters']:,} weights"
            + ("" if each["seconds"] is None else f", trained in {each['seconds']:.1f} s")
            for label, each in known.items()
        ]
        notes.append(f"\\* and a frozen recommender, not counted above: {'; '.join(told)}.")
    if any(each["resumed"] for each in costs.values()):
        notes.append("† a seed was stopped and resumed: its seconds are whole, its peak is the last process's.")
    if sources := {label: each["source"] for label, each in costs.items() if each["source"]}:
        data = next(iter(sources.values()))["dataset"]
        told = [f"`{label}`: {each['rows']:,.0f} rows in {each['seconds']:.1f} s" for label, each in sources.items()]
        notes.append(
            "‡ and training on the source, not counted above, once for all rows of the same settings: "
            f"`{data['source']}`, {data['users']:,} users, {data['items']:,} items, {data['events']:,} events; "
            f"{'; '.join(told)}."
        )
    if overs := {label: each["over"] for label, each in costs.items() if each["over"]}:
        told = [
            f"`{label}`: `{each['row']}`, {each['rows']:,.0f} rows in {each['seconds']:.1f} s"
            for label, each in overs.items()
        ]
        notes.append(f"§ and the LoRA below it, merged into the language model, not counted above: {'; '.join(told)}.")
    if not all(each.get("training", {}).get("own_peak", True) for each in costs.values()):
        notes.append("This system tells one peak a process: peaks are those of the process so far.")
    return notes
