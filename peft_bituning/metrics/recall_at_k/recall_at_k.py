"""Recall@k over full rankings with one target a row, a thin `evaluate.Metric` over `peft_bituning.metrics`."""

from collections.abc import Collection, Sequence

import datasets
import evaluate

from peft_bituning.metrics.ranking import ranking_metrics, target_ranks

DESCRIPTION = "Recall@k: the share of rows whose target is among the first k items; ties count half."
INPUTS = """
Args:
    predictions: scores of all catalog items, one list a row.
    references: catalog index of the target, one a row.
    k: length of the list that counts (default 10).
    seen: for each row the catalog indices to leave out of the ranking (default: none).
Returns:
    {"recall@{k}": float}, with k in the name.
"""


class RecallAtK(evaluate.Metric):
    """Recall@k of score lists against target indices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        k: int = 10,
        seen: Sequence[Collection[int]] | None = None,
    ) -> dict[str, float]:
        name = f"recall@{k}"
        return {name: ranking_metrics(target_ranks(predictions, references, seen), k)[name]}
