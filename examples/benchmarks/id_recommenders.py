"""Train and rank the ID-based recommenders on one dataset, over several seeds.

    python examples/benchmarks/id_recommenders.py --dataset folder:PATH --seeds 0 1 2 --output id_recommenders.json

Leave-one-out, full ranking over the catalog, ties half. SASRec and BERT4Rec are trained on the training part with the
validation part for early stopping; popularity and item-kNN, which have nothing to stop, count both for the test rows.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import peft_bituning
from peft_bituning.data import LeaveOneOut, load_interactions
from peft_bituning.data.samples import Split
from peft_bituning.evaluation import SEEN_ITEMS, evaluate_ranking, history_scorer
from peft_bituning.recommenders import ItemKNN, Popularity, build_recommender, default_fit_arguments, fit_recommender

COUNTING = {"popularity": Popularity, "item-knn": ItemKNN}
TRAINED = ("sasrec", "bert4rec")
METRICS = ("recall@10", "ndcg@10", "mrr")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="ml-100k, folder:PATH, atomic:PATH, amazon2018:..., ...")
    parser.add_argument("--users", type=int, help="a seeded cut of so many users, all items stay candidates")
    parser.add_argument("--models", nargs="+", default=[*COUNTING, *TRAINED], choices=[*COUNTING, *TRAINED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="most epochs, in place of the defaults")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; the default is torch's own")
    parser.add_argument("--output", type=Path, help="JSON file with every run")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    return parser.parse_args()


def run_counting(name: str, num_items: int, split: LeaveOneOut) -> dict[str, Any]:
    """Count, then rank both splits."""
    report: dict[str, Any] = {}
    known: dict[Split, list[list[int]]] = {"valid": split.train_sequences, "test": split.known_sequences}
    for part, sequences in known.items():
        model = COUNTING[name](num_items).fit(sequences)
        report[part] = evaluate_ranking(history_scorer(model), split.samples(part)).metrics()
    return report


def run_trained(
    name: str, num_items: int, split: LeaveOneOut, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train with one seed, then rank both splits."""
    settings = default_fit_arguments(name)
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    model = build_recommender(name, num_items, seed=seed).to(options.device)
    fitted = fit_recommender(
        model, split.train_sequences, split.samples("valid"), seed=seed, progress=options.progress, **settings
    )
    report: dict[str, Any] = {
        "seed": seed,
        "settings": settings,
        "config": model.essentials(),
        "epochs": len(fitted.losses),
        "best_epoch": fitted.best_epoch,
        "seconds": round(fitted.seconds, 1),
    }
    for part in ("valid", "test"):
        scorer = history_scorer(model, options.device)
        report[part] = evaluate_ranking(scorer, split.samples(part)).metrics()
    return report


def average(runs: list[dict[str, Any]], mode: str, metric: str) -> float:
    """Mean of one test number over the runs of a model."""
    return statistics.mean(run["test"][mode][metric] for run in runs)


def format_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Lay out the test metrics: mean over seeds, in brackets the standard error over users."""
    lines = []
    for mode, seen in SEEN_ITEMS.items():
        title = f"seen items {seen}"
        lines.append(f"{title:24}" + "".join(f"{metric:>18}" for metric in METRICS))
        for name, runs in results.items():
            cells = "".join(
                f"{average(runs, mode, metric):>9.4f} ({average(runs, mode, metric + '_se'):.4f})" for metric in METRICS
            )
            lines.append(f"{name + f' x{len(runs)}':24}" + cells)
    return "\n".join(lines)


def main() -> None:
    """Run every model and seed, print the table, write the file."""
    options = parse_arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    interactions = load_interactions(options.dataset)
    if options.users is not None:
        interactions = interactions.sample_users(options.users, seed=0)
    num_items = len(interactions.items)
    split = LeaveOneOut(interactions.histories)
    results: dict[str, list[dict[str, Any]]] = {}
    started = time.monotonic()
    for name in options.models:
        if name in COUNTING:
            results[name] = [run_counting(name, num_items, split)]
        else:
            results[name] = [run_trained(name, num_items, split, seed, options) for seed in options.seeds]
    print(format_table(results))
    if options.output is not None:
        document = {
            "dataset": interactions.counts(),
            "device": options.device,
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - started, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft_bituning": peft_bituning.__version__,
            },
            "mean": {
                name: {
                    mode: {metric: average(runs, mode, metric) for metric in METRICS}
                    for mode in ("unfiltered", "filtered")
                }
                for name, runs in results.items()
            },
            "runs": results,
        }
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
