"""The hybrid without a language model: which texts, which parts, and how sure its weights are.

    python examples/benchmarks/hybrid.py --dataset folder:PATH --texts tf-idf minilm language-model --folder FOLDER

A SASRec of each seed is trained and kept in the folder; the hybrids' weights are fitted on the validation users, and
the test users are ranked once for each row. `--leave_out` fits again without each part, `--resamples` fits again on
validation users drawn with replacement.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_bituning.artifacts import whole_folder, write_whole
from peft_bituning.base_models import load_base_model
from peft_bituning.data import LeaveOneOut, load_interactions
from peft_bituning.data.interactions import Interactions
from peft_bituning.evaluation import SEEN_ITEMS, evaluate_ranking, history_scorer, user_groups
from peft_bituning.recommenders import (
    Hybrid,
    IDRecommender,
    ItemKNN,
    build_recommender,
    default_fit_arguments,
    fit_recommender,
    load_recommender,
)
from peft_bituning.recommenders.hybrid.choices import draw_choices
from peft_bituning.recommenders.hybrid.hybrid import counts_of
from peft_bituning.recommenders.hybrid.part import PARTS
from peft_bituning.recommenders.hybrid.weights import fit_weights
from peft_bituning.serving.card import groups_table, results_table
from peft_bituning.training.hybrids import read_text


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="ml-100k", help="ml-100k, folder:PATH, atomic:PATH, amazon2018:..., ...")
    add("--texts", nargs="+", default=["tf-idf"], help="tf-idf, minilm, language-model[:LAYER], none, ...")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the SASRec")
    add("--epochs", type=int, help="of the SASRec at most, in place of its own")
    add("--hold_out_items", type=float, default=0.0, help="as train_amazon.py")
    add("--base_model", default="smollm2-135m", help="read for language-model alone")
    add("--folder", type=Path, required=True, help="where SASRecs and text vectors are kept")
    add("--shrinkage", nargs="+", type=float, default=[3.0], help="of the whitening; several are several rows")
    add("--leave_out", action="store_true", help="rows without each part")
    add("--resamples", type=int, default=0, help="fits on validation users drawn with replacement")
    add("--threads", type=int, help="CPU threads; the default is torch's own")
    add("--output", type=Path, help="JSON file with every row")
    return parser.parse_args()


def trained(options: argparse.Namespace, split: LeaveOneOut, num_items: int, seed: int) -> IDRecommender:
    """Load the SASRec of a seed, or train it."""
    folder = options.folder / f"sasrec-{num_items}-{options.hold_out_items:g}-{seed}"
    if not folder.is_dir():
        settings = default_fit_arguments("sasrec")
        settings["epochs"] = options.epochs or settings["epochs"]
        untrained = sorted(split.held_out_items) or None
        model = build_recommender("sasrec", num_items, seed=seed, untrained_items=untrained)
        fit_recommender(model, split.train_sequences, split.samples("valid"), seed=seed, **settings)
        with whole_folder(folder) as temporary:
            model.save_pretrained(temporary)
    return load_recommender(folder)


class Rows:
    """The rows of a table, by name, one report per seed."""

    def __init__(self, split: LeaveOneOut) -> None:
        self.samples = split.samples("test")
        self.groups = user_groups(split, self.samples)
        self.found: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, recommender: Any, **more: Any) -> None:
        """Rank the test users."""
        started = time.perf_counter()
        metrics = evaluate_ranking(history_scorer(recommender), self.samples).metrics(self.groups)
        seconds = time.perf_counter() - started
        self.found.setdefault(name, []).append({**more, "test": metrics, "ranking_seconds": round(seconds, 2)})
        values = "  ".join(
            "/".join(f"{metrics[mode][each]:.4f}" for each in ("recall@10", "ndcg@10", "mrr")) for mode in SEEN_ITEMS
        )
        print(f"{name}: {values}", flush=True)

    def table(self) -> list[dict[str, Any]]:
        """Average each row over its seeds, as `results_table` takes them; the standard error is that over users."""
        return [{"name": name, "test": _averaged([run["test"] for run in runs])} for name, runs in self.found.items()]


def _averaged(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _averaged([value[key] for value in values]) for key in values[0]}
    return float(np.mean(values)) if isinstance(values[0], float) else values[0]


def weight_spread(hybrid: Hybrid, split: LeaveOneOut, resamples: int) -> dict[str, dict[str, float]]:
    """Fit the weights that are left on validation users drawn with replacement; return mean and deviation of each."""
    known = split.train_sequences  # the hybrid's own parts have counted the validation events by now
    sources = replace(hybrid.sources, counts=counts_of(known, hybrid.num_items), sequences=known)
    parts = [part for part in (PARTS[part.name].fit(sources) for part in hybrid.parts) if part is not None]
    choices = draw_choices(parts, split.samples("valid"), sources.counts)
    names = [name for part in parts for name in part.features]
    generator = torch.Generator().manual_seed(0)
    fits = []
    for _ in range(resamples):
        users = torch.randint(len(choices.chosen), (len(choices.chosen),), generator=generator)
        fits.append(list(fit_weights(choices.of_users(users), names, hybrid.weights).weights.values()))
    values = np.array(fits)
    return {
        name: {"mean": float(column.mean()), "sd": float(column.std())}
        for name, column in zip(names, values.T, strict=True)
    }


def measure(options: argparse.Namespace, data: Interactions, split: LeaveOneOut, seed: int, rows: Rows) -> None:
    """Add the rows of one seed."""
    known = trained(options, split, len(data.items), seed)
    rows.add("SASRec", known, seed=seed)
    needs_base = any(text.startswith("language-model") for text in options.texts)
    base = load_base_model(options.base_model) if needs_base else None
    fits = [(text, shrinkage) for text in options.texts for shrinkage in options.shrinkage]
    for text, shrinkage in fits:
        vectors = None if text == "none" else read_text(text, data, base, options.folder, progress=True)
        label = f"hybrid, {text}" + (f", shrinkage {shrinkage:g}" if len(options.shrinkage) > 1 else "")
        for left_out in [None, *(PARTS if options.leave_out else [])]:
            parts = [name for name in PARTS if name not in (left_out, "laser")]
            if len(parts) == len(PARTS) - 1 and left_out is not None:
                continue  # `laser`, which is not there
            started = time.perf_counter()
            hybrid = Hybrid.fit(split, data.items, known, None, vectors, parts, shrinkage, seed)
            more: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "weights": hybrid.weights}
            if options.resamples and left_out is None:
                more["spread"] = weight_spread(hybrid, split, options.resamples)
            rows.add(label if left_out is None else f"{label}, without {left_out}", hybrid, seed=seed, **more)


def main() -> None:
    """Measure every seed, print the tables, write the file."""
    options = parse_arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load_interactions(options.dataset)
    split = LeaveOneOut.of(data, options.hold_out_items)
    rows = Rows(split)
    rows.add("item-kNN", ItemKNN(len(data.items)).fit(split.known_sequences))
    for seed in options.seeds:
        measure(options, data, split, seed, rows)
    table = rows.table()
    print(f"\n{results_table(table)}\n\n{groups_table(table)}")
    if options.output is not None:
        write_whole(options.output, json.dumps({"dataset": data.counts(), "rows": rows.found}, indent=1))


if __name__ == "__main__":
    main()
