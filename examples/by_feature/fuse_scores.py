"""Add another recommender's scores to those of a trained Laser, and see on the test users what that gives.

    python examples/by_feature/fuse_scores.py --model FOLDER --dataset folder:PATH --with item-knn recommender

`score(j) = cos(h_u, h_j) / s + w * other(j) / t`, where s and t are the standard deviations of the scores over the
catalog, so that w says the same whatever is added. w is chosen by unfiltered NDCG@10 on the validation users; the test
users are ranked once. `recommender` is the frozen ID recommender of the folder.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from peft_bituning import LaserRecommender
from peft_bituning.artifacts import write_whole
from peft_bituning.catalog import ItemTable
from peft_bituning.data import LeaveOneOut, Sample, load_interactions
from peft_bituning.errors import BiTuningError, ConfigurationError
from peft_bituning.evaluation import SEEN_ITEMS, evaluate_ranking, history_scorer
from peft_bituning.recommenders import ItemKNN, Popularity

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
OTHERS = ("item-knn", "popularity", "recommender")

Scorer = Callable[[list[Sample]], Tensor]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved LaserRecommender, or its Hub repository")
    add("--dataset", required=True, help="what it was trained on, as examples/train_amazon.py takes it")
    add("--with", dest="others", nargs="+", choices=OTHERS, default=["item-knn"], help="what to add, one a row")
    add("--base_model", help="the language model, where its recorded name does not resolve here")
    add("--output", type=Path, help="a JSON file for the table")
    add("--batch_size", type=int, default=32, help="users a forward pass (%(default)s)")
    add("--disable_tqdm", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def laser_scorer(recommender: LaserRecommender, samples: list[Sample], batch_size: int, progress: bool) -> Scorer:
    """Encode users once; score them against the table as often as is asked."""
    encoder = recommender.encoder
    encoder.batch_size = batch_size
    users = encoder.encode([sample.history for sample in samples], progress=progress, description="encoding users")
    vectors = ItemTable.from_embeddings(users).embeddings
    rows = {(sample.user, sample.history): row for row, sample in enumerate(samples)}
    table = recommender.table.embeddings.float().cpu()

    def score(batch: list[Sample]) -> Tensor:
        return vectors[[rows[sample.user, sample.history] for sample in batch]] @ table.T

    return score


def other_scorer(name: str, recommender: LaserRecommender, known: list[list[int]]) -> Scorer:
    """Make the scores that are added; those that count are fit to `known`."""
    if name == "recommender":
        if recommender.id_recommender is None:
            raise ConfigurationError("--with must not be recommender here: the folder holds no ID recommender")
        return history_scorer(recommender.id_recommender, recommender.device)
    kind = ItemKNN if name == "item-knn" else Popularity
    return history_scorer(kind(len(recommender.items)).fit(known))


def fused(laser: Scorer, other: Scorer, spread: tuple[float, float], weight: float) -> Scorer:
    """Add the two, each over its own spread."""

    def score(batch: list[Sample]) -> Tensor:
        return laser(batch) / spread[0] + weight * other(batch).cpu() / spread[1]

    return score


def spread_of(score: Scorer, samples: list[Sample]) -> float:
    """Return the mean over users of the scores' standard deviation over the catalog."""
    found = [float(score(samples[start : start + 64]).std(dim=1).mean()) for start in range(0, len(samples), 64)]
    return max(float(np.mean(found)), 1e-12)


def main(argv: list[str]) -> None:
    """Choose on validation, show the test users."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    data = load_interactions(arguments.dataset)
    recommender = LaserRecommender.from_pretrained(arguments.model, base_model=arguments.base_model)
    if recommender.items.item_ids != data.items.item_ids:
        raise ConfigurationError(
            f"--dataset must be what {Path(arguments.model).name} was trained on, got another catalog; items that "
            "were added to the recommender are not in it either"
        )
    split = LeaveOneOut(data.histories)
    valid, test = split.samples("valid"), split.samples("test")
    laser = laser_scorer(recommender, valid + test, arguments.batch_size, not arguments.disable_tqdm)
    rows: dict[str, Any] = {"laser": evaluate_ranking(laser, test).metrics()}
    for name in arguments.others:
        other = other_scorer(name, recommender, split.train_sequences)
        spread = spread_of(laser, valid), spread_of(other, valid)
        ndcg = {
            weight: evaluate_ranking(fused(laser, other, spread, weight), valid).metrics()["unfiltered"]["ndcg@10"]
            for weight in WEIGHTS
        }
        best = max(WEIGHTS, key=lambda weight: ndcg[weight])
        other = other_scorer(name, recommender, split.known_sequences)
        rows[name] = evaluate_ranking(other, test).metrics()
        both = evaluate_ranking(fused(laser, other, spread, best), test).metrics()
        rows[f"laser + {best:g} x {name}"] = {**both, "weight": best, "validation_ndcg@10": ndcg}
    if arguments.output is not None:
        write_whole(arguments.output, json.dumps(rows, indent=1))
    print(to_markdown(rows))


def to_markdown(rows: dict[str, Any]) -> str:
    """Lay the table out."""
    names = ("recall@10", "ndcg@10", "mrr")
    titles = [f"{title}, {mode}" for mode in SEEN_ITEMS.values() for title in ("R@10", "N@10", "MRR")]
    lines = [f"| test users | {' | '.join(titles)} |", "|" + " --- |" * 7]
    for label, row in rows.items():
        cells = [
            f"{row[mode][name]:.4f} ± {row[mode][f'{name}_se']:.4f}"
            for mode in ("unfiltered", "filtered")
            for name in names
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
