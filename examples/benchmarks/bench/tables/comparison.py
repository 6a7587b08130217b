"""The table of a comparison, from finished cells to JSON values."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.evaluation import SEEN_ITEMS, RankingReport
from peft_bituning.metrics import user_gains
from peft_bituning.metrics.bootstrap import paired_bootstrap

from ..comparison import Finished
from ..plan import ColdStart, Plan
from .costs import row_costs

MODES = {mode: f"seen items {seen}" for mode, seen in SEEN_ITEMS.items()}
METRICS = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}
COMPARED = "ndcg@10"
GROUPED = ("recall@10", COMPARED)
RESAMPLES = 10_000
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def summarise(plan: Plan, finished: Sequence[Finished], not_run: dict[str, str], data: Interactions) -> dict[str, Any]:
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
    by_label: dict[str, list[Finished]] = {}
    for each in finished:
        by_label.setdefault(each.cell.label, []).append(each)
    rows = {label: _row(plan, label, cells) for label, cells in by_label.items()}
    return {
        "name": plan.name,
        "question": plan.question,
        "dataset": data.counts(),
        "users": len(finished[0].report.ranks_unfiltered) if finished else 0,
        "model": Path(plan.model).name if Path(plan.model).is_dir() else plan.model,
        "training": plan.training,
        "compared": COMPARED,
        "baseline": {mode: _compare(plan, rows, by_label, mode) for mode in MODES},
        "baseline_named": plan.baseline is not None and plan.baseline in rows,
        "show_validation": plan.validation,
        "groups": _by_group(by_label, _cold_start_groups(data, plan.cold_start)) if plan.cold_start else None,
        "paper": {label: dict(zip(METRICS, numbers, strict=True)) for label, numbers in plan.paper.items()},
        "rows": rows,
        "not_run": not_run,
        "published": [
            dict(zip(("name", *METRICS, "source", "reason"), row, strict=True))
            for row in PUBLISHED["rows"]
            if plan.published
        ],
        "published_split": PUBLISHED["split"] if plan.published else None,
    }


def _row(plan: Plan, label: str, cells: Sequence[Finished]) -> dict[str, Any]:
    cell, method = cells[0].cell, plan.registered(label)
    validated = all(each.values["valid"] for each in cells)
    return {
        "method": cell.method,
        "is_ours": method.is_ours,
        "is_random": method.is_random,
        "seeds": [each.cell.seed for each in cells],
        "line": plan.methods[label].line,
        "train_fraction": cell.share,
        **{mode: {name: _over_seeds(cells, mode, name) for name in METRICS} for mode in MODES},
        "valid": {name: _over_seeds(cells, "unfiltered", name, "valid") for name in METRICS} if validated else None,
        "costs": row_costs(cells),
        "settings": cell.identity,
    }


def _compare(plan: Plan, rows: dict[str, Any], by_label: dict[str, list[Finished]], mode: str) -> str | None:
    """Write into every row its difference to the baseline, and return which that is."""
    others = {label: row[mode][COMPARED]["mean"] for label, row in rows.items() if not row["is_ours"]}
    name = plan.baseline if plan.baseline in rows else max(others, key=lambda label: others[label], default=None)
    if name is None:
        return None
    against = _user_means(by_label[name], mode)
    for label, cells in by_label.items():
        if label != name:
            difference = paired_bootstrap(_user_means(cells, mode), against, resamples=RESAMPLES, seed=0)
            rows[label][mode]["against_baseline"] = difference.to_dict()
    return name


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


def _cold_start_groups(data: Interactions, bounds: ColdStart) -> dict[str, np.ndarray]:
    """Tell test users by how much training saw of them and of their targets: by group a mask over test users [U]."""
    split = LeaveOneOut(data.histories)
    samples = split.samples("test")
    sequences = split.train_sequences
    events = np.array([len(sequences[sample.user]) for sample in samples], dtype=np.int64)
    trained = np.array([item for sequence in sequences for item in sequence], dtype=np.int64)
    counts = np.bincount(trained, minlength=len(data.items))
    of_target = counts[np.array([sample.target for sample in samples], dtype=np.int64)]
    few_events, few_counts = bounds.user_events, bounds.item_events
    return {
        f"users with up to {few_events} training events": events <= few_events,
        f"users with more than {few_events}": events > few_events,
        "targets never seen in training": of_target == 0,
        f"targets seen 1 to {few_counts} times": (of_target >= 1) & (of_target <= few_counts),
        f"targets seen more than {few_counts} times": of_target > few_counts,
    }


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
