"""Mean reciprocal rank over full rankings, a thin `evaluate.Metric` over `peft_bituning.metrics`."""

from collections.abc import Collection, Sequence

import datasets
import evaluate

from peft_bituning.metrics.ranking import ranking_metrics, target_ranks

DESCRIPTION = "MRR: the mean of 1 / rank of the target over the full list; ties count half."
INPUTS = """
Args:
    predictions: scores of all catalog items, one list a row.
    references: catalog index of the target, one a row.
    seen: for each row the catalog indices to leave out of the ranking (default: none).
Returns:
    {"mrr": float}.
"""


class MRR(evaluate.Metric):
    """Mean reciprocal rank of target indices in score lists."""

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
        seen: Sequence[Collection[int]] | None = None,
    ) -> dict[str, float]:
        return {"mrr": ranking_metrics(target_ranks(predictions, references, seen))["mrr"]}
