"""From finished cells to one table: JSON and Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.bootstrap import paired_bootstrap
from peft_bituning.data import Interactions
from peft_bituning.evaluation import RankingReport
from peft_bituning.metrics import user_gains

from .cells import Finished
from .costs import costs_markdown, row_costs
from .groups import cold_start_groups
from .plan import Plan
from .published import PUBLISHED, SPLIT
from .transfer import LINE

MODES = {"unfiltered": "seen items not filtered", "filtered": "seen items filtered"}
METRICS = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}
COMPARED = "ndcg@10"
GROUPED = ("recall@10", COMPARED)
RESAMPLES = 10_000


def summarise(plan: Plan, finished: Sequence[Finished], not_run: dict[str, str], data: Interactions) -> Any:
    """Make the table.

    Args:
        plan: the comparison.
        finished: its finished cells.
        not_run: why a cell has no result, by `label, seed k`.
        data: the histories.

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
            "line": plan.row(label).get(LINE),
            "train_fraction": cells[0].cell.share,
            **{mode: {name: _over_seeds(cells, mode, name) for name in METRICS} for mode in MODES},
            "valid": {name: _over_seeds(cells, "unfiltered", name, "valid") for name in METRICS}
            if all(each.values["valid"] for each in cells)
            else None,
            "costs": row_costs(cells),
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
        "name": plan.name,
        "question": plan.question,
        "dataset": data.counts(),
        "users": len(finished[0].report.ranks_unfiltered) if finished else 0,
        "model": Path(plan.model).name if Path(plan.model).is_dir() else plan.model,
        "training": plan.training,
        "compared": COMPARED,
        "baseline": baselines,
        "baseline_named": plan.baseline is not None and plan.baseline in rows,
        "show_validation": plan.validation,
        "groups": _by_group(by_label, cold_start_groups(data, plan.cold_start)) if plan.cold_start else None,
        "paper": {label: dict(zip(METRICS, numbers, strict=True)) for label, numbers in plan.paper.items()},
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
    chosen = "" if table["baseline_named"] else " The baseline was chosen on the same test users, which favours it."
    parts = [
        *([table["question"]] if table["question"] else []),
        f"Dataset `{data['source']}`: {data['users']:,} users, {data['items']:,} items, {data['events']:,} events; "
        f"{table['users']:,} test users, full ranking, ties half. Language model `{table['model']}`.",
        "Mean over seeds ± standard error over seeds (standard error over users of one seed). The last column is the "
        "difference in NDCG@10 to the baseline with its 95 % interval: paired bootstrap over users, "
        f"{RESAMPLES:,} resamples, each user's NDCG averaged over seeds; it says nothing of other seeds.{chosen}",
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
    if table["show_validation"]:
        parts.append(_validation(rows))
    if table["groups"]:
        parts.append(_groups(table["groups"]))
    if table["paper"]:
        parts.append(_paper(table["paper"]))
    parts.append(costs_markdown(rows))
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


def _validation(rows: dict[str, Any]) -> str:
    found = {label: row["valid"] for label, row in rows.items() if row["valid"]}
    best = {name: max((row[name]["mean"] for row in found.values()), default=0.0) for name in METRICS}
    lines = [f"| validation, seen items not filtered | {' | '.join(METRICS.values())} |", "| --- | --- | --- | --- |"]
    for label, row in found.items():
        lines.append(f"| {label} | {' | '.join(_value(row[name], best[name]) for name in METRICS)} |")
    return "\n".join(lines)


def _by_group(by_label: dict[str, list[Finished]], groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Average over the users of each group, and over seeds; the standard error is that over users."""
    found: dict[str, Any] = {}
    for group, mask in groups.items():
        if not mask.any():
            continue
        found[group] = {"users": int(mask.sum()), "rows": {}}
        for label, cells in by_label.items():
            gains = [user_gains(each.report.ranks_unfiltered[mask]) for each in cells]
            values = {name: np.mean([each[name] for each in gains], axis=0) for name in GROUPED}
            found[group]["rows"][label] = {
                name: {"mean": float(value.mean()), "se_users": float(value.std() / len(value) ** 0.5)}
                for name, value in values.items()
            }
    return found


def _groups(groups: dict[str, Any]) -> str:
    heads = [f"{group} ({values['users']:,})" for group, values in groups.items()]
    lines = [f"| seen items not filtered, {' / '.join(METRICS[name] for name in GROUPED)} | {' | '.join(heads)} |"]
    lines.append("|" + " --- |" * (len(heads) + 1))
    for label in next(iter(groups.values()))["rows"]:
        cells = [
            " / ".join(f"{each['rows'][label][name]['mean']:.4f}" for name in GROUPED)
            + f" ({each['rows'][label][COMPARED]['se_users']:.4f})"
            for each in groups.values()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"In brackets the standard error of {METRICS[COMPARED]} over the group's users."])


def _paper(paper: dict[str, Any]) -> str:
    lines = [
        f"The Laser paper's own numbers: {SPLIT}; ChatGLM2-6B.",
        "",
        f"| the paper's | {' | '.join(METRICS.values())} |",
        "| --- | --- | --- | --- |",
    ]
    for label, row in paper.items():
        lines.append(f"| {label} | {' | '.join(f'{row[name]:.4f}' for name in METRICS)} |")
    return "\n".join(lines)


def _over_seeds(cells: Sequence[Finished], mode: str, name: str, part: str = "test") -> dict[str, Any]:
    tests = [each.values[part][mode] for each in cells]
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
