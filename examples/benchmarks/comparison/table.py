"""From finished cells to one table: JSON and Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_bituning.evaluation import RankingReport, paired_bootstrap
from peft_bituning.metrics import user_gains

from .cells import Finished
from .plan import Plan
from .published import PUBLISHED, SPLIT

MODES = {"unfiltered": "seen items not filtered", "filtered": "seen items filtered"}
METRICS = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}
COMPARED = "ndcg@10"
RESAMPLES = 10_000


def summarise(plan: Plan, finished: Sequence[Finished], not_run: dict[str, str], dataset: dict[str, Any]) -> Any:
    """Make the table.

    Args:
        plan: the comparison.
        finished: its finished cells.
        not_run: why a cell has no result, by `label, seed k`.
        dataset: the data's counts.

    Returns:
        The document, as JSON can hold it: for every row and filter mode the mean over seeds, the standard error over
        seeds (None for one), the mean over seeds of the standard error over users, and the difference to the best
        baseline; and the costs.
    """
    rows: dict[str, Any] = {}
    by_label: dict[str, list[Finished]] = {}
    for each in finished:
        by_label.setdefault(each.cell.label, []).append(each)
    for label, cells in by_label.items():
        rows[label] = {
            "method": cells[0].cell.method,
            "is_ours": plan.registered(label).is_ours,
            "is_random": plan.registered(label).is_random,
            "seeds": [each.cell.seed for each in cells],
            **{mode: {name: _over_seeds(cells, mode, name) for name in METRICS} for mode in MODES},
            "costs": _costs(cells),
            "settings": cells[0].cell.identity,
        }
    baselines = {}
    for mode in MODES:
        name = plan.baseline if plan.baseline in rows else _best_baseline(rows, mode)
        baselines[mode] = name
        if name is None:
            continue
        against = _user_means(by_label[name], mode)
        for label, cells in by_label.items():
            if label != name:
                difference = paired_bootstrap(_user_means(cells, mode), against, resamples=RESAMPLES, seed=0)
                rows[label][mode]["against_baseline"] = difference.to_dict()
    return {
        "dataset": dataset,
        "users": len(finished[0].report.ranks_unfiltered) if finished else 0,
        "model": Path(plan.model).name if Path(plan.model).is_dir() else plan.model,
        "training": plan.training,
        "compared": COMPARED,
        "baseline": baselines,
        "rows": rows,
        "not_run": not_run,
        "published": [
            dict(zip(("name", *METRICS, "source", "reason"), row, strict=True)) for row in PUBLISHED if plan.published
        ],
        "published_split": SPLIT if plan.published else None,
    }


def to_markdown(table: dict[str, Any]) -> str:
    """Lay the table out; the best mean of a column is bold."""
    data, rows = table["dataset"], table["rows"]
    parts = [
        f"Dataset `{data['source']}`: {data['users']:,} users, {data['items']:,} items, {data['events']:,} events; "
        f"{table['users']:,} test users, full ranking, ties half. Language model `{table['model']}`.",
        "Mean over seeds ± standard error over seeds (standard error over users of one seed). The last column is the "
        "difference in NDCG@10 to the best baseline with its 95 % interval: paired bootstrap over users, "
        f"{RESAMPLES:,} resamples, each user's NDCG averaged over seeds; it says nothing of other seeds. The "
        "baseline was chosen on the same test users, which favours it.",
    ]
    for mode, title in MODES.items():
        baseline = table["baseline"][mode]
        best = {name: max((row[mode][name]["mean"] for row in rows.values()), default=0.0) for name in METRICS}
        lines = [
            f"| {title} | seeds | {' | '.join(METRICS.values())} | NDCG@10 minus {baseline or 'no baseline'} |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for label, row in rows.items():
            values = [_value(row[mode][name], best[name]) for name in METRICS]
            seeds = str(len(row["seeds"])) if row["is_random"] else "no chance"
            against = "(the baseline)" if label == baseline else _against(row[mode].get("against_baseline"))
            lines.append(f"| {label} | {seeds} | {' | '.join(values)} | {against} |")
        parts.append("\n".join(lines))
    parts.append(_cost_table(rows))
    if table["not_run"]:
        parts.append("Not run:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in table["not_run"].items()))
    if table["published"]:
        lines = [
            f"Published, **another split**: {table['published_split']}.",
            "",
            "| published | Recall@10 | NDCG@10 | MRR | source | here |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for each in table["published"]:
            numbers = " | ".join(f"{each[name]:.4f}" for name in METRICS)
            lines.append(f"| {each['name']} | {numbers} | {each['source']} | {each['reason']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _over_seeds(cells: Sequence[Finished], mode: str, name: str) -> dict[str, Any]:
    tests = [each.values["test"][mode] for each in cells]
    values = [test[name] for test in tests]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    users = statistics.mean(test[f"{name}_se"] for test in tests)
    return {"mean": statistics.mean(values), "se_seeds": error, "se_users": users, "by_seed": values}


def _user_means(cells: Sequence[Finished], mode: str) -> np.ndarray:
    """Average each user's value over seeds -> [U]."""
    return np.mean([user_gains(_ranks(each.report, mode))[COMPARED] for each in cells], axis=0)


def _ranks(report: RankingReport, mode: str) -> np.ndarray:
    return report.ranks_unfiltered if mode == "unfiltered" else report.ranks_filtered


def _best_baseline(rows: dict[str, Any], mode: str) -> str | None:
    others = {label: row[mode][COMPARED]["mean"] for label, row in rows.items() if not row["is_ours"]}
    return max(others, key=lambda label: others[label]) if others else None


def _costs(cells: Sequence[Finished]) -> dict[str, Any]:
    """Take the mean of seconds and the largest peak over seeds."""
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
    return costs


def _value(value: dict[str, Any], best: float) -> str:
    mean = f"{value['mean']:.4f}"
    mean = f"**{mean}**" if value["mean"] == best else mean
    seeds = "" if value["se_seeds"] is None else f" ± {value['se_seeds']:.4f}"
    return f"{mean}{seeds} ({value['se_users']:.4f})"


def _against(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "-"
    interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    floor = 2 / (difference["resamples"] + 1)
    p = f"p < {2 * floor:.4f}" if difference["p"] <= floor * 1.001 else f"p = {difference['p']:.4f}"
    return f"{difference['difference']:+.4f} ({interval}; {p})"


def _cost_table(rows: dict[str, Any]) -> str:
    lines = [
        "| costs | trained weights | kept, MB | rows trained | text tokens trained | training, s | peak MB | "
        "1,000 items, s | peak MB | a user, ms | peak MB |",
        "|" + " --- |" * 11,
    ]
    notes = []
    for label, row in rows.items():
        costs = row["costs"]
        training, user = costs.get("training"), costs.get("user")
        encoding = costs.get("encoding")
        marks = "*" if costs["frozen_recommender"] else ""
        marks += "†" if costs["resumed"] else ""
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
    text = "\n".join(lines)
    if notes:
        text += f"\n\n\\* and a frozen recommender, not counted above: {'; '.join(notes)}."
    if any(row["costs"]["resumed"] for row in rows.values()):
        text += "\n\n† a seed was stopped and resumed: its seconds are whole, its peak is the last process's."
    shared = [label for label, row in rows.items() if not row["costs"].get("training", {}).get("own_peak", True)]
    if shared:
        text += "\n\nThis system tells one peak a process: peaks are those of the process so far."
    return text


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"
