"""The table as a picture."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import METRICS, MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

SHOWN = ("ndcg@10", "recall@10")
COLOURS = {True: ("#1f4e79", "#8fb4d9"), False: ("#5a5a5a", "#bdbdbd")}  # ours, others; unfiltered, filtered


def plot_table(path: Path, table: dict[str, Any]) -> bool:
    """Draw Recall@10 and NDCG@10 of every row in both filter modes, the best at the top.

    Where rows name a `line`, they are drawn over the shares of the users that they trained on, seen items kept,
    and rows without one are levels. Whiskers are two standard errors, over seeds and over users added in squares.

    Returns:
        False where matplotlib is not installed, or there is no row.
    """
    rows = table["rows"]
    if not rows:
        return False
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        logger.warning("matplotlib is not installed, so %s is not drawn; run: pip install matplotlib", path.name)
        return False
    figure = _lines(rows) if any(row["line"] for row in rows.values()) else _bars(rows)
    data = table["dataset"]
    figure.suptitle(
        f"{data['source']}: {table['users']:,} test users, {data['items']:,} items; whiskers: two standard errors "
        "over seeds and users",
        fontsize="medium",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _lines(rows: dict[str, Any]) -> "Figure":
    from matplotlib import pyplot

    shares = sorted({row["train_fraction"] for row in rows.values() if row["line"]})
    names = list(dict.fromkeys(row["line"] for row in rows.values() if row["line"]))
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(11, 4.6), constrained_layout=True)
    for axis, name in zip(axes, SHOWN, strict=True):
        for number, line in enumerate(names):
            points = [(row["train_fraction"], row["unfiltered"][name]) for row in rows.values() if row["line"] == line]
            points.sort(key=lambda point: point[0])
            axis.errorbar(
                [shares.index(share) + 0.04 * (number - len(names) / 2) for share, _ in points],
                [value["mean"] for _, value in points],
                yerr=[_whisker(value) for _, value in points],
                marker="o",
                capsize=3,
                label=line,
            )
        for label, row in rows.items():
            if not row["line"]:
                axis.axhline(row["unfiltered"][name]["mean"], color="#777777", linestyle="--", linewidth=1, label=label)
        axis.set(title=METRICS[name], xlabel="training users; seen items kept", ylim=(0, None))
        axis.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def _bars(rows: dict[str, Any]) -> "Figure":
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    order = sorted(rows, key=lambda label: rows[label]["unfiltered"]["ndcg@10"]["mean"])
    figure, axes = pyplot.subplots(
        1, len(SHOWN), figsize=(11, 1.6 + 0.55 * len(order)), sharey=True, constrained_layout=True
    )
    for axis, name in zip(axes, SHOWN, strict=True):
        for number, mode in enumerate(MODES):
            places = [place + (0.2 if number == 0 else -0.2) for place in range(len(order))]
            values = [rows[label][mode][name] for label in order]
            axis.barh(
                places,
                [value["mean"] for value in values],
                xerr=[_whisker(value) for value in values],
                height=0.38,
                color=[COLOURS[rows[label]["is_ours"]][number] for label in order],
                error_kw={"linewidth": 1, "capsize": 2, "ecolor": "#222222"},
            )
        axis.set(title=METRICS[name], xlim=(0, None))
        axis.set_yticks(range(len(order)), order)
        axis.margins(y=0.01)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    handles = [
        Patch(color=COLOURS[ours][number], label=f"{'ours' if ours else 'others'}, {title}")
        for ours in (True, False)
        for number, title in enumerate(MODES.values())
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def _whisker(value: dict[str, Any]) -> float:
    return 2 * float((value["se_seeds"] or 0.0) ** 2 + value["se_users"] ** 2) ** 0.5
