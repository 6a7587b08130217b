"""The table of a comparison in Markdown."""

from typing import Any

from .comparison import COMPARED, GROUPED, METRICS, MODES, PUBLISHED, RESAMPLES
from .costs import costs_markdown
from .layout import interval, markdown_table

NAMES = " | ".join(METRICS.values())


def to_markdown(table: dict[str, Any]) -> str:
    """Lay out what `summarise` returned; the best mean of a column is bold."""
    data = table["dataset"]
    chosen = "" if table["baseline_named"] else " The baseline was chosen on the same test users, which favours it."
    parts = [
        table["question"],
        f"Dataset `{data['source']}`: {data['users']:,} users, {data['items']:,} items, {data['events']:,} events; "
        f"{table['users']:,} test users, full ranking, ties half. Language model `{table['model']}`.",
        "Mean over seeds ± standard error over seeds (standard error over users of one seed). The last column is the "
        "difference in NDCG@10 to the baseline with its 95 % interval: paired bootstrap over users, "
        f"{RESAMPLES:,} resamples, each user's NDCG averaged over seeds; it says nothing of other seeds.{chosen}",
        *(_ranking(table["rows"], mode, table["baseline"][mode]) for mode in MODES),
        table["show_validation"] and _validation(table["rows"]),
        table["groups"] and _groups(table["groups"]),
        table["paper"] and _paper(table["paper"]),
        costs_markdown(table["rows"]),
        table["not_run"] and "Not run:\n\n" + "\n".join(f"- {name}: {why}" for name, why in table["not_run"].items()),
        table["published"] and _published(table["published"], table["published_split"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ranking(rows: dict[str, Any], mode: str, baseline: str | None) -> str:
    best = {name: max((row[mode][name]["mean"] for row in rows.values()), default=0.0) for name in METRICS}
    lines = []
    for label, row in rows.items():
        values = [_value(row[mode][name], best[name]) for name in METRICS]
        seeds = str(len(row["seeds"])) if row["is_random"] else "no chance"
        against = "(the baseline)" if label == baseline else _against(row[mode].get("against_baseline"))
        lines.append([label, seeds, *values, against])
    return markdown_table(f"{MODES[mode]} | seeds | {NAMES} | NDCG@10 minus {baseline or 'no baseline'}", lines)


def _validation(rows: dict[str, Any]) -> str:
    found = {label: row["valid"] for label, row in rows.items() if row["valid"]}
    best = {name: max((row[name]["mean"] for row in found.values()), default=0.0) for name in METRICS}
    lines = [[label, *(_value(row[name], best[name]) for name in METRICS)] for label, row in found.items()]
    return markdown_table(f"validation, seen items kept | {NAMES}", lines)


def _groups(groups: dict[str, Any]) -> str:
    def cell(row: dict[str, Any]) -> str:
        return " / ".join(f"{row[name]['mean']:.4f}" for name in GROUPED) + f" ({row[COMPARED]['se_users']:.4f})"

    heads = [f"{group} ({values['users']:,})" for group, values in groups.items()]
    shown = " / ".join(METRICS[name] for name in GROUPED)
    labels = next(iter(groups.values()))["rows"]
    lines = [[label, *(cell(each["rows"][label]) for each in groups.values())] for label in labels]
    text = markdown_table(" | ".join([f"seen items kept, {shown}", *heads]), lines)
    return f"{text}\n\nIn brackets the standard error of {METRICS[COMPARED]} over the group's users."


def _paper(paper: dict[str, Any]) -> str:
    lines = [[label, *(f"{row[name]:.4f}" for name in METRICS)] for label, row in paper.items()]
    text = markdown_table(f"the paper's | {NAMES}", lines)
    return f"The Laser paper's own numbers: {PUBLISHED['split']}; ChatGLM2-6B.\n\n{text}"


def _published(published: list[dict[str, Any]], split: str) -> str:
    lines = [
        [row["name"], *(f"{row[name]:.4f}" for name in METRICS), row["source"], row["reason"]] for row in published
    ]
    return f"Published, **another split**: {split}.\n\n" + markdown_table(f"published | {NAMES} | source | here", lines)


def _value(value: dict[str, Any], best: float) -> str:
    mean = f"{value['mean']:.4f}"
    mean = f"**{mean}**" if value["mean"] == best else mean
    seeds = "" if value["se_seeds"] is None else f" ± {value['se_seeds']:.4f}"
    return f"{mean}{seeds} ({value['se_users']:.4f})"


def _against(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "-"
    floor = 2 / (difference["resamples"] + 1)
    p = f"p < {2 * floor:.4f}" if difference["p"] <= floor * 1.001 else f"p = {difference['p']:.4f}"
    return f"{difference['difference']:+.4f} ({interval(difference)}; {p})"
