"""What rows cost: seconds, memory, weights."""

import statistics
from collections.abc import Sequence
from typing import Any

from .cells import Finished


def row_costs(cells: Sequence[Finished]) -> dict[str, Any]:
    """Take the mean of seconds and the largest peak over seeds.

    Args:
        cells: one row's, a seed each.

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
    recommenders = [each["details"].get("frozen_recommender") for each in values]
    costs["frozen_recommender"] = recommenders[0]
    for place in ("source", "over"):
        first = [each[place] for each in values if place in each]
        costs[place] = None
        if first:
            costs[place] = {name: statistics.mean(each[name] for each in first) for name in ("rows", "seconds")}
            costs[place] |= {name: first[0].get(name) for name in ("dataset", "row")}
    return costs


def costs_markdown(rows: dict[str, Any]) -> str:
    """Lay the costs out.

    Args:
        rows: the table's rows, each with what `row_costs` returned under `costs`.

    Returns:
        A Markdown table and its footnotes.
    """
    lines = [
        "| costs | trained weights | kept, MB | rows trained | text tokens trained | training, s | peak MB | "
        "1,000 items, s | peak MB | a user, ms | peak MB |",
        "|" + " --- |" * 11,
    ]
    notes, sources, overs = [], [], []
    for label, row in rows.items():
        costs = row["costs"]
        training, user = costs.get("training"), costs.get("user")
        encoding = costs.get("encoding")
        marks = "*" if costs["frozen_recommender"] else ""
        marks += "†" if costs["resumed"] else ""
        marks += "‡" if costs["source"] else ""
        marks += "§" if costs["over"] else ""
        cells = [
            f"{label}{marks}",
            f"{costs['trainable_parameters']:,}",
            f"{costs['adapter_bytes'] / 1e6:.3f}" if costs["trainable_parameters"] else "-",
            _count(costs["trained_rows"]),
            _count(costs["trained_tokens"]),
            *([f"{training['seconds']:.1f}", f"{training['peak_mb']:,.0f}"] if training else ["-", "-"]),
            *(
                [f"{1000 * encoding['seconds'] / encoding['items']:.1f}", f"{encoding['peak_mb']:,.0f}"]
                if encoding
                else ["-", "-"]
            ),
            *([f"{1000 * user['seconds']:.1f}", f"{user['peak_mb']:,.0f}"] if user else ["-", "-"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if costs["frozen_recommender"]:
            known = costs["frozen_recommender"]
            seconds = "" if known["seconds"] is None else f", trained in {known['seconds']:.1f} s"
            notes.append(f"`{label}`: {known['kind']}, {known['parameters']:,} weights{seconds}")
        if costs["source"]:
            sources.append(f"`{label}`: {costs['source']['rows']:,.0f} rows in {costs['source']['seconds']:.1f} s")
        if costs["over"]:
            over = costs["over"]
            overs.append(f"`{label}`: `{over['row']}`, {over['rows']:,.0f} rows in {over['seconds']:.1f} s")
    text = "\n".join(lines)
    if notes:
        text += f"\n\n\\* and a frozen recommender, not counted above: {'; '.join(notes)}."
    if any(row["costs"]["resumed"] for row in rows.values()):
        text += "\n\n† a seed was stopped and resumed: its seconds are whole, its peak is the last process's."
    if sources:
        data = next(row["costs"]["source"]["dataset"] for row in rows.values() if row["costs"]["source"])
        text += (
            f"\n\n‡ and training on the source, not counted above, once for all rows of the same settings: "
            f"`{data['source']}`, {data['users']:,} users, {data['items']:,} items, {data['events']:,} events; "
            f"{'; '.join(sources)}."
        )
    if overs:
        text += f"\n\n§ and the LoRA below it, merged into the language model, not counted above: {'; '.join(overs)}."
    shared = [label for label, row in rows.items() if not row["costs"].get("training", {}).get("own_peak", True)]
    if shared:
        text += "\n\nThis system tells one peak a process: peaks are those of the process so far."
    return text


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"
