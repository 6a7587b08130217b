"""Recall@k, NDCG@k and MRR over full rankings, as one `evaluate.Metric`; `evaluate.load` takes this file's path."""

from collections.abc import Collection, Sequence

import datasets
import evaluate

from peft_bituning.metrics.ranking import ranking_metrics, target_ranks

DESCRIPTION = """
Ranks of one target a row among the whole catalog; ties count half. Recall@k: the share of rows whose target is among
the first k items. NDCG@k: the mean of 1 / log2(rank + 1) where it is, else 0. MRR: the mean of 1 / rank, of all ranks.
"""
INPUTS = """
Args:
    predictions: scores of all catalog items, one list a row.
    references: catalog index of the target, one a row.
    k: length of the list that counts for recall and NDCG (default 10).
    seen: for each row the catalog indices to leave out of the ranking (default: none).
Returns:
    {"recall@{k}": float, "ndcg@{k}": float, "mrr": float}, with k in the names.
"""


class FullRanking(evaluate.Metric):
    """Recall@k, NDCG@k and MRR of score lists against target indices."""

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": scores, "references": datasets.Value("int64")}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        k: int = 10,
        seen: Sequence[Collection[int]] | None = None,
    ) -> dict[str, float]:
        return ranking_metrics(target_ranks(predictions, references, seen), k)
