"""The training curves as a picture."""

import logging
from pathlib import Path
from typing import Any

from ..evaluation import SEEN_ITEMS

logger = logging.getLogger(__name__)


def plot_curves(path: Path, epochs: list[dict[str, Any]], log_history: list[dict[str, Any]]) -> bool:
    """Draw loss, validation NDCG@10 and expert load over the updates of both stages.

    Args:
        path: the PNG file.
        epochs: one record per epoch, as in `results.json`.
        log_history: one record per logging step.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        logger.warning("matplotlib is not installed, so %s is not drawn; run: pip install matplotlib", path.name)
        return False
    loads = [record for record in epochs if record["expert_load"]]
    figure, axes = pyplot.subplots(1, 3 if loads else 2, figsize=(15 if loads else 10, 4), constrained_layout=True)
    for stage, colour in ((1, "tab:blue"), (2, "tab:orange")):
        logs = [record for record in log_history if record["stage"] == stage]
        axes[0].plot(
            [record["step"] for record in logs],
            [record["contrastive_loss"] for record in logs],
            color=colour,
            alpha=0.4,
        )
        records = [record for record in epochs if record["stage"] == stage]
        steps = [record["global_step"] for record in records]
        axes[0].plot(
            steps,
            [record["train_contrastive_loss"] for record in records],
            "o-",
            color=colour,
            label=f"stage {stage}, epoch mean",
        )
        for mode, style in (("unfiltered", "o-"), ("filtered", "o--")):
            values = [record["valid"][mode]["ndcg@10"] for record in records]
            axes[1].plot(steps, values, style, color=colour, label=f"stage {stage}, seen items {SEEN_ITEMS[mode]}")
    axes[0].set(title="Contrastive loss", xlabel="updates", ylabel="nats")
    axes[1].set(title="Validation NDCG@10", xlabel="updates", ylim=(0, None))
    for axis in axes[:2]:
        axis.legend()
    if loads:
        steps = [record["global_step"] for record in loads]
        shares = list(zip(*(record["expert_load"] for record in loads), strict=True))
        for number, share in enumerate(shares):
            axes[2].plot(steps, share, "o-", label=f"expert {number}")
        axes[2].axhline(1 / len(shares), color="grey", linestyle=":", label="even load")
        axes[2].set(title="Expert load", xlabel="updates", ylabel="share of rows", ylim=(0, 1))
        axes[2].legend(fontsize="small", ncols=2)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
