"""The hybrids of a run: without the language model before it is trained, with it afterwards, and what it added.

Shapes: `I` catalog items, `U` test users.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..artifacts import sha256_of_json, whole_file
from ..base_models import BaseModel
from ..catalog.text_encoder import TFIDF, open_text_encoder
from ..data import Interactions, LeaveOneOut
from ..data.samples import Sample
from ..evaluation import SEEN_ITEMS, EncodedUsers, RankingReport, evaluate_ranking, history_scorer
from ..metrics import user_gains
from ..metrics.bootstrap import paired_bootstrap
from ..recommenders import Hybrid, IDRecommender, TextVectors
from ..recommenders.hybrid.tfidf import texts_of

logger = logging.getLogger(__name__)

WITHOUT, WITH = "hybrid without the language model", "hybrid with Laser"
SURE = 0.05


class RunHybrids:
    """Fits and ranks the hybrids of a run; every process does the same, by itself.

    Args:
        data: the histories.
        split: whom the weights are fitted on, and who is ranked.
        validation: the users of the fit.
        sequence: the frozen ID recommender, or None.
        text: what the part `text` reads.
        seed: of what is drawn.
    """

    def __init__(
        self,
        data: Interactions,
        split: LeaveOneOut,
        validation: list[Sample],
        sequence: IDRecommender | None,
        text: str | TextVectors | None,
        seed: int,
    ) -> None:
        self.data = data
        self.split = split
        self.validation = validation
        self.sequence = sequence
        self.text = text
        self.seed = seed
        self.samples = split.samples("test")

    def fit(self, laser: EncodedUsers | None = None) -> Hybrid:
        """Fit a hybrid, with the language model where it is given."""
        hybrid = Hybrid.fit(
            self.split, self.data.items, self.sequence, laser, self.text, seed=self.seed, samples=self.validation
        )
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in hybrid.weights.items())
        logger.info("%s: weights %s", WITHOUT if laser is None else WITH, weights)
        return hybrid

    def rank(self, hybrid: Hybrid) -> RankingReport:
        """Rank the test users."""
        return evaluate_ranking(history_scorer(hybrid), self.samples)

    def text_alone(self, hybrid: Hybrid) -> RankingReport | None:
        """Rank the test users by the likeness of texts alone; None without texts."""
        parts = [part for part in hybrid.fitted_parts if part.name == "text"]
        return self.rank(Hybrid(parts, {"text": 1.0}, hybrid.sources)) if parts else None


def read_text(
    name: str | None, data: Interactions, base: BaseModel | None, folder: Path, progress: bool = False
) -> str | TextVectors | None:
    """Return what the part `text` reads: the vectors of a model are made once and kept in the folder.

    Args:
        name: as `LaserArguments.text_model`.
        data: the catalog.
        base: the language model, which `language-model` reads.
        folder: where vectors are kept; their file is named by the sha256 of the model's name and the texts.
        progress: show a bar.

    Raises:
        ConfigurationError: the model cannot be opened.
    """
    if name in (None, TFIDF):
        return name
    encoder = open_text_encoder(name, base)
    texts = texts_of(data.items)
    path = (
        folder
        / f"text-{sha256_of_json(encoder.name, None if base is None else base.fingerprint(), texts)[:16]}.safetensors"
    )
    if path.is_file():
        return TextVectors(encoder.name, load_file(path)["vectors"])
    with torch.no_grad():
        vectors = np.ascontiguousarray(encoder.encode(texts, progress), dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file({"vectors": vectors}, temporary)
    return TextVectors(encoder.name, vectors)


def check_text_model(name: str | None, base: BaseModel) -> None:
    """Open a text model before anything is trained, to see that it can be; else raise a ConfigurationError."""
    if name not in (None, TFIDF):
        open_text_encoder(name, base)


def what_it_adds(hybrid: Hybrid, with_it: RankingReport, without: RankingReport) -> dict[str, Any]:
    """Say what the language model adds to the hybrid: paired bootstrap over the test users, both filter modes.

    Args:
        hybrid: fitted with it.
        with_it: its ranks.
        without: the ranks of the hybrid that was fitted without.

    Returns:
        `weight` of the part `laser`, `unfiltered` and `filtered` with a `PairedDifference` per metric, and a `verdict`.
    """
    found: dict[str, Any] = {"weight": hybrid.weights.get("laser", 0.0)}
    for mode in SEEN_ITEMS:
        gains, base = (user_gains(getattr(report, f"ranks_{mode}"), report.k) for report in (with_it, without))
        found[mode] = {name: paired_bootstrap(gains[name], base[name]).to_dict() for name in gains}
    first = found["unfiltered"]["ndcg@10"]
    numbers = f"{first['difference']:+.4f} NDCG@10 (95 % interval {first['low']:+.4f} to {first['high']:+.4f}, p "
    numbers += f"{first['p']:.2g}; {len(without.ranks_unfiltered)} test users, seen items kept)"
    if not found["weight"]:
        found["verdict"] = "the language model adds nothing here: by the validation users its weight is not above 0"
    elif first["p"] < SURE:
        verb = "adds" if first["difference"] > 0 else "takes"
        found["verdict"] = f"the language model {verb} {numbers}"
    else:
        found["verdict"] = f"the language model adds nothing here that is sure: {numbers}"
    return found
