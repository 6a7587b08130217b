"""The hybrid: scores by hand and by formulas, what the weights are fitted on, new items, files."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_bituning.data import ItemCatalog, LeaveOneOut, Sample
from peft_bituning.errors import ArtifactError, BiTuningError, ConfigurationError
from peft_bituning.recommenders import Hybrid, IDRecommender, TextVectors, build_recommender
from peft_bituning.recommenders.histories import Histories
from peft_bituning.recommenders.hybrid import Part, Sources, register_part
from peft_bituning.recommenders.hybrid.part import PARTS

TEXTS = ("tf-idf", "vectors")
texts = pytest.mark.parametrize("text", TEXTS)
WEIGHTS = {
    "sequence": 0.4,
    "item_knn": 1.3,
    "popularity": 0.35,
    "seen": -0.7,
    "last": -1.1,
    "text": 2.0,
    "text_last": 0.8,
    "text_seen": -0.5,
    "text_last_seen": 0.6,
    "laser": 0.15,
}
WITHOUT = {name: weight / 2 for name, weight in WEIGHTS.items() if name != "laser"}
NEW_WEIGHTS = {"new_offset": 0.6, "new_scale": 1.25}
NEW = ({"title": "Brass LAMP", "brand": "Acme"}, {"title": "quux"}, {"title": "oak chair of oak"})
NEW_VECTORS = np.random.default_rng(9).normal(size=(3, 6)).astype(np.float32) * 3


def grown(items: ItemCatalog, number: int = len(NEW)) -> ItemCatalog:
    """Return the catalog with items at its end."""
    return ItemCatalog((*items.item_ids, *(f"new{place}" for place in range(number))), (*items.attributes, *NEW[:number]))


def formula(reference: Any, histories: Sequence[Sequence[int]], weights: dict[str, float]) -> np.ndarray:
    """Return the weighted sums of features by their formulas, `[B, I]`."""
    return np.stack([reference.score(history, weights) for history in histories])


@pytest.fixture(scope="module")
def given_text(vectors: np.ndarray) -> dict[str, Any]:
    return {"tf-idf": "tf-idf", "vectors": vectors}


@pytest.fixture(scope="module")
def fitted(
    split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender, laser: Any, given_text: dict[str, Any]
) -> dict[str, Hybrid]:
    """Return the hybrid of all parts as it is fitted, by kind of texts."""
    return {text: Hybrid.fit(split, items, sequence, laser, given_text[text]) for text in TEXTS}


@pytest.fixture(scope="module")
def planted(fitted: dict[str, Hybrid]) -> dict[str, Hybrid]:
    """Return the hybrid with a weight for every feature, by kind of texts."""
    return {
        text: Hybrid(hybrid.fitted_parts, WEIGHTS | NEW_WEIGHTS, hybrid.sources, WITHOUT | NEW_WEIGHTS)
        for text, hybrid in fitted.items()
    }


@pytest.fixture(scope="module")
def known(
    items: ItemCatalog,
    split: LeaveOneOut,
    sequence: IDRecommender,
    laser: Any,
    vectors: np.ndarray,
    make_reference: Any,
) -> dict[str, Any]:
    """Return the features by their formulas once the counts have taken in the validation events."""
    return {
        text: make_reference(items, split.known_sequences, sequence, laser, vectors if text == "vectors" else None)
        for text in TEXTS
    }


# ---------------------------------------------------------------------- by hand


@pytest.fixture(scope="module")
def two_items() -> ItemCatalog:
    return ItemCatalog(("a", "b"), ({"title": "one"}, {"title": "two"}))


def scores_of(hybrid: Hybrid, history: list[int]) -> list[float]:
    row = torch.tensor([history or [0]])
    return hybrid.scores(row, torch.full_like(row, bool(history)))[0].tolist()


def test_two_items_and_one_feature(two_items: ItemCatalog) -> None:
    """Eight of ten buy again what they bought: P = e^w / (e^w + 1) = .8, so w = log 4, less a little by the penalty."""
    split = LeaveOneOut([[0, 0, 1]] * 24 + [[0, 1, 0]] * 6)
    hybrid = Hybrid.fit(split, two_items, text=None, parts=["seen"])
    weight = hybrid.weights["seen"]
    assert set(hybrid.weights) == {"seen"} and weight == pytest.approx(np.log(4), abs=1e-3)
    assert 30 * (1 / (1 + np.exp(-weight)) - 0.8) + 1e-3 * weight == pytest.approx(0, abs=1e-3)
    single = float(np.float32(weight))
    assert scores_of(hybrid, [0]) == [single, 0.0]
    assert scores_of(hybrid, [1]) == [0.0, single]
    assert scores_of(hybrid, [0, 1]) == scores_of(hybrid, [1, 0, 0]) == [single, single]
    assert scores_of(hybrid, []) == [0.0, 0.0]


def test_exact_scores_of_given_weights(two_items: ItemCatalog) -> None:
    sources = Sources(two_items, torch.tensor([3.0, 1.0]))
    parts = [PARTS[name].fit(sources) for name in ("seen", "last", "popularity")]
    hybrid = Hybrid([part for part in parts if part is not None], {"seen": 2.5, "last": -1.0}, sources)
    assert [part.name for part in hybrid.parts] == ["seen", "last"]
    assert scores_of(hybrid, [0]) == [1.5, 0.0]
    assert scores_of(hybrid, [0, 1]) == [2.5, 1.5]
    assert scores_of(hybrid, [0, 1, 0]) == [1.5, 2.5]
    popular = Hybrid([part for part in parts if part is not None], {"popularity": 2.0}, sources)
    assert scores_of(popular, [1]) == pytest.approx([np.log(2), -np.log(2)], abs=1e-6)  # log 4 and log 2 less their mean


@pytest.mark.parametrize("item", [3, 6, 29])
def test_an_item_more_in_the_history(item: int, planted: dict[str, Hybrid], known: dict[str, Any]) -> None:
    names = {"seen": -0.7, "last": -1.1, "popularity": 0.35}
    hybrid = Hybrid(planted["tf-idf"].fitted_parts, names, planted["tf-idf"].sources)
    before, after = (np.array(scores_of(hybrid, history)) for history in ([2, 3], [2, 3, item]))
    expected = np.zeros(30)
    expected[3] += 1.1  # no longer the last
    expected[item] -= 1.1
    expected[item] -= 0.7 if item != 3 else 0.0
    assert np.allclose(after - before, expected, atol=1e-6)
    change = known["tf-idf"].score([2, 3, item], WEIGHTS) - known["tf-idf"].score([2, 3], WEIGHTS)
    whole = np.array(scores_of(planted["tf-idf"], [2, 3, item])) - np.array(scores_of(planted["tf-idf"], [2, 3]))
    assert np.allclose(whole, change, atol=1e-4)


# ---------------------------------------------------------------------- scores


@texts
def test_scores_are_the_weighted_features(
    text: str, planted: dict[str, Hybrid], known: dict[str, Any], asked: list[list[int]], scattered: Callable[..., Any]
) -> None:
    scores = planted[text].scores(*scattered(asked))
    assert scores.shape == (len(asked), 30) and scores.dtype == torch.float32
    assert np.allclose(scores.numpy(), formula(known[text], asked, WEIGHTS), rtol=1e-5, atol=5e-5)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.lists(st.integers(0, 29), max_size=8), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.lists(st.sampled_from([-1.5, -0.2, 0.0, 0.3, 2.0]), min_size=10, max_size=10),
)
def test_any_histories_and_weights(
    planted: dict[str, Hybrid],
    known: dict[str, Any],
    scattered: Callable[..., Any],
    histories: list[list[int]],
    seed: int,
    values: list[float],
) -> None:
    """Scores, shares, and vectors with cells say the same, and what the formulas say."""
    weights = dict(zip(WEIGHTS, values, strict=True))
    batch = scattered(histories, seed)
    for text in TEXTS:
        hybrid = Hybrid(planted[text].fitted_parts, weights, planted[text].sources)
        scores = hybrid.scores(*batch).numpy()
        features = [known[text].features(history) for history in histories]
        size = sum(
            np.stack([np.abs(weights[name] * values) for name, values in row.items()]).sum(0).max() for row in features
        )
        tolerance = 1e-5 * max(1.0, float(size))
        assert np.allclose(scores, formula(known[text], histories, weights), rtol=1e-5, atol=tolerance)
        shares = hybrid.contributions(*batch)
        assert np.allclose(sum(shares.values(), torch.zeros(1)).numpy(), scores, rtol=1e-5, atol=tolerance)
        read = hybrid.histories(*batch)
        cells = hybrid.cells(read)
        places = list(zip(cells.rows.tolist(), cells.items.tolist(), strict=True))
        assert places == sorted(set(places))
        products = (hybrid.queries(read) @ hybrid.item_vectors.T).double().numpy()
        products[cells.rows, cells.items] += cells.values
        assert np.allclose(products, scores, rtol=1e-5, atol=tolerance)


@texts
def test_what_each_part_gives(
    text: str, planted: dict[str, Hybrid], known: dict[str, Any], asked: list[list[int]], scattered: Callable[..., Any]
) -> None:
    shares = planted[text].contributions(*scattered(asked))
    assert set(shares) == {"sequence", "item_knn", "popularity", "seen", "last", "text", "laser"}
    for name, share in shares.items():
        assert share.shape == (len(asked), 30) and share.dtype == torch.float64
        weights = {feature: WEIGHTS[feature] for feature in WEIGHTS if feature.startswith(name) or feature == name}
        assert np.allclose(share.numpy(), formula(known[text], asked, weights), rtol=1e-5, atol=5e-5), name


def test_what_each_part_gives_to_some_items(
    planted: dict[str, Hybrid], asked: list[list[int]], scattered: Callable[..., Any]
) -> None:
    wanted = torch.from_numpy(np.random.default_rng(0).integers(-1, 30, (len(asked), 7)))
    wanted[:, 3] = wanted[:, 2]  # one twice
    wanted[:, 6] = -1
    whole, some = (planted["tf-idf"].contributions(*scattered(asked), *items) for items in ([], [wanted]))
    assert set(whole) == set(some)
    for name in whole:
        expected = whole[name].gather(1, wanted.clamp(min=0)).masked_fill(wanted < 0, 0.0)
        assert torch.allclose(some[name], expected, atol=1e-9)


@texts
def test_no_rows_and_no_parts(text: str, planted: dict[str, Hybrid], asked: list[list[int]], scattered: Any) -> None:
    nothing = torch.zeros(0, 3, dtype=torch.long)
    assert planted[text].scores(nothing, nothing).shape == (0, 30)
    bare = Hybrid(planted[text].fitted_parts, {}, planted[text].sources)
    batch = scattered(asked)
    assert not bare.parts and not bare.weights and not bare.scores(*batch).any() and bare.contributions(*batch) == {}
    read = bare.histories(*batch)
    assert not (bare.queries(read) @ bare.item_vectors.T).any() and not len(bare.cells(read).rows)


def test_a_part_without_a_weight_is_not_computed(planted: dict[str, Hybrid], monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = Hybrid(planted["tf-idf"].fitted_parts, {"seen": 1.0, "last": 0.0}, planted["tf-idf"].sources)
    for name in ("sequence", "laser", "last"):
        monkeypatch.setattr(PARTS[name], "queries", None)
        monkeypatch.setattr(PARTS[name], "cells", None)
    assert [part.name for part in hybrid.parts] == ["seen"] and scores_of(hybrid, [4])[4] == 1.0


# ---------------------------------------------------------------------- the fit


@texts
@pytest.mark.parametrize("side", ["with laser", "without"])
def test_weights_are_where_the_gradient_is_near_zero(
    text: str, side: str, fitted: dict[str, Hybrid], reference: dict[str, Any], split: LeaveOneOut
) -> None:
    """By features of training events alone; nothing of the package's has a share in them."""
    given_weights = fitted[text].weights if side == "with laser" else fitted[text].weights_without_laser
    assert given_weights is not None
    weights = {name: weight for name, weight in given_weights.items() if not name.startswith("new_")}
    assert {"item_knn", "text"} <= set(weights) and ("laser" in weights) == (side == "with laser")
    gradient = 1e-3 * np.array(list(weights.values()))
    for sample in split.samples("valid"):
        found = reference[text].features(sample.history)
        features = np.stack([found[name] for name in weights])
        logits = np.array(list(weights.values())) @ features
        shares = np.exp(logits) / np.exp(logits).sum()
        gradient += features @ shares - features[:, sample.target]
    assert np.abs(gradient).max() < 5e-3


def test_the_same_bits_twice(
    fitted: dict[str, Hybrid], split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender, laser: Any
) -> None:
    again = Hybrid.fit(split, items, sequence, laser)
    assert again.weights == fitted["tf-idf"].weights
    assert again.weights_without_laser == fitted["tf-idf"].weights_without_laser
    assert again.content_hash() == fitted["tf-idf"].content_hash()


@texts
def test_test_items_change_no_weight(
    text: str,
    fitted: dict[str, Hybrid],
    histories: list[list[int]],
    items: ItemCatalog,
    sequence: IDRecommender,
    laser: Any,
    given_text: dict[str, Any],
) -> None:
    generator = np.random.default_rng(1)
    other = [[*row[:-1], int(generator.integers(30))] if len(row) >= 3 else row for row in histories]
    assert other != histories
    hybrid = Hybrid.fit(LeaveOneOut(other), items, sequence, laser, given_text[text])
    assert hybrid.weights == fitted[text].weights
    assert hybrid.weights_without_laser == fitted[text].weights_without_laser
    assert hybrid.content_hash() == fitted[text].content_hash()


def test_validation_items_change_the_weights(
    fitted: dict[str, Hybrid], histories: list[list[int]], items: ItemCatalog, sequence: IDRecommender, laser: Any
) -> None:
    other = [[*row[:-2], (row[-2] + 1) % 27, row[-1]] if len(row) >= 3 else row for row in histories]
    assert Hybrid.fit(LeaveOneOut(other), items, sequence, laser).weights != fitted["tf-idf"].weights


@texts
def test_counts_take_in_validation_events_after_the_fit(
    text: str,
    fitted: dict[str, Hybrid],
    known: dict[str, Any],
    histories: list[list[int]],
    asked: list[list[int]],
    scattered: Callable[..., Any],
) -> None:
    hybrid = fitted[text]
    events = [item for row in histories for item in (row[:-1] if len(row) >= 3 else row)]
    assert hybrid.sources.counts.tolist() == [events.count(item) for item in range(30)]
    assert hybrid.sources.counts[27] == 1  # bought once, in validation
    assert not hybrid.new.any() and hybrid.num_items == 30
    scores = hybrid.scores(*scattered(asked)).numpy()
    assert np.allclose(scores, formula(known[text], asked, hybrid.weights), rtol=1e-5, atol=1e-4)


def test_named_parts_alone_are_fitted(split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender) -> None:
    hybrid = Hybrid.fit(split, items, sequence, parts=["seen", "popularity", "seen"])
    assert sorted(part.name for part in hybrid.fitted_parts) == ["popularity", "seen"]
    assert set(hybrid.weights) <= {"seen", "popularity"} and "seen" in hybrid.weights
    other = Hybrid.fit(split, items, sequence, parts=("popularity", "seen"))
    assert other.weights == pytest.approx(hybrid.weights, abs=1e-3)
    nothing = Hybrid.fit(split, items, sequence, parts=[])
    assert nothing.weights == {} and not nothing.scores(torch.tensor([[1]]), torch.ones(1, 1)).any()


def test_sources_that_are_not_there_leave_their_parts_out(split: LeaveOneOut, items: ItemCatalog) -> None:
    hybrid = Hybrid.fit(split, items, text=None)
    assert {part.name for part in hybrid.fitted_parts} == {"item_knn", "popularity", "seen", "last"}
    assert hybrid.text_model is None and hybrid.weights_without_laser is None


def test_weights_are_fitted_on_given_samples(
    fitted: dict[str, Hybrid], split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender, laser: Any
) -> None:
    samples = split.samples("valid")
    assert Hybrid.fit(split, items, sequence, laser, samples=samples).weights == fitted["tf-idf"].weights
    again: list[Sample] = [Sample(sample.user, sample.history, sample.history[-1]) for sample in samples]
    last = Hybrid.fit(split, items, parts=["last"], text=None, samples=again)  # all buy the last item once more
    assert last.weights["last"] > 5
    assert Hybrid.fit(split, items, samples=[]).weights == {}


def test_vectors_of_other_types(
    fitted: dict[str, Hybrid], split: LeaveOneOut, items: ItemCatalog, sequence: Any, laser: Any, vectors: np.ndarray
) -> None:
    weights = fitted["vectors"].weights
    assert fitted["vectors"].text_model == "vectors"
    assert Hybrid.fit(split, items, sequence, laser, torch.from_numpy(vectors)).weights == weights
    named = Hybrid.fit(split, items, sequence, laser, TextVectors("some model", vectors.astype(np.float64)))
    assert named.text_model == "some model" and named.weights == pytest.approx(weights, abs=1e-3)
    centred = Hybrid.fit(split, items, sequence, laser, vectors, shrinkage=1e6)
    assert centred.weights != weights and centred.settings()["shrinkage"] == 1e6


def test_unknown_parts_and_sources_of_another_catalog(
    split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender, vectors: np.ndarray
) -> None:
    with pytest.raises(ConfigurationError, match="parts must be among .*item_knn.*, got magic, tarot"):
        Hybrid.fit(split, items, parts=["seen", "tarot", "magic"])
    with pytest.raises(ConfigurationError, match="sequence must know the catalog's 30 items, got 29"):
        Hybrid.fit(split, items, build_recommender("sasrec", 29, hidden_size=8))
    with pytest.raises(ConfigurationError, match="text must have 30 vectors, one per item, got 28"):
        Hybrid.fit(split, items, sequence, text=vectors[:28])
    with pytest.raises(ConfigurationError, match="shrinkage must be a finite number >= 0, got -1"):
        Hybrid.fit(split, items, sequence, text=vectors, shrinkage=-1)


@pytest.mark.parametrize("number", [29, 31])
def test_an_adapter_of_another_catalog_is_refused(
    number: int, split: LeaveOneOut, items: ItemCatalog, make_laser: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigurationError, match=f"{number}"):
        Hybrid.fit(split, items, laser=make_laser(number))


# ---------------------------------------------------------------------- without the adapter, with another


@texts
def test_without_laser_is_as_if_it_had_never_been(
    text: str,
    fitted: dict[str, Hybrid],
    split: LeaveOneOut,
    items: ItemCatalog,
    sequence: IDRecommender,
    given_text: dict[str, Any],
    asked: list[list[int]],
    scattered: Callable[..., Any],
) -> None:
    assert "laser" in fitted[text].weights
    without, never = fitted[text].without("laser"), Hybrid.fit(split, items, sequence, None, given_text[text])
    assert without.weights == pytest.approx(never.weights, abs=1e-3)
    assert without.weights == pytest.approx(fitted[text].weights_without_laser)
    assert without.weights_without_laser is None and without.sources.laser is None
    assert "laser" not in {part.name for part in without.fitted_parts}
    batch = scattered(asked)
    assert torch.allclose(without.scores(*batch), never.scores(*batch), atol=1e-2)
    assert without.without("laser").weights == without.weights
    assert never.without("laser").weights == never.weights


def test_only_the_adapter_can_be_left_out(fitted: dict[str, Hybrid]) -> None:
    with pytest.raises(ConfigurationError, match="only 'laser' can be left out after fitting, got 'text'"):
        fitted["tf-idf"].without("text")


def test_an_adapter_that_only_lowers_is_left_out(
    split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender, laser: Any
) -> None:
    class Opposite:
        item_embeddings = laser.item_embeddings

        def user_embeddings(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
            return -laser.user_embeddings(histories)

    alone = Hybrid.fit(split, items, laser=Opposite(), text=None, parts=["laser", "seen"])
    assert "laser" not in alone.weights and "seen" in alone.weights
    assert Hybrid.fit(split, items, laser=laser, text=None, parts=["laser", "seen"]).weights["laser"] > 0


def test_another_adapter_is_read(
    planted: dict[str, Hybrid],
    make_laser: Callable[..., Any],
    make_reference: Any,
    split: LeaveOneOut,
    items: ItemCatalog,
    sequence: IDRecommender,
    asked: list[list[int]],
    scattered: Callable[..., Any],
) -> None:
    other = make_laser(30, seed=5)
    hybrid = planted["tf-idf"].reading(other)
    assert hybrid.weights == planted["tf-idf"].weights
    assert hybrid.weights_without_laser == planted["tf-idf"].weights_without_laser
    reference = make_reference(items, split.known_sequences, sequence, other)
    scores = hybrid.scores(*scattered(asked)).numpy()
    assert np.allclose(scores, formula(reference, asked, WEIGHTS), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------- new items


@pytest.mark.parametrize("held_out", [(2, 9, 22)])
def test_items_held_out_are_new(
    held_out: tuple[int, ...],
    histories: list[list[int]],
    items: ItemCatalog,
    sequence: IDRecommender,
    laser: Any,
    make_reference: Any,
    asked: list[list[int]],
    scattered: Callable[..., Any],
) -> None:
    """They have an offset and a scale; a history may hold them."""
    split = LeaveOneOut(histories, held_out_items=held_out)
    fitted = Hybrid.fit(split, items, sequence, laser)
    assert fitted.new.nonzero()[:, 0].tolist() == sorted(held_out) and not fitted.sources.counts[list(held_out)].any()
    reference = make_reference(items, split.known_sequences, sequence, laser)
    batch = scattered(asked)
    for hybrid in (fitted, Hybrid(fitted.fitted_parts, WEIGHTS | NEW_WEIGHTS, fitted.sources)):
        plain = formula(reference, asked, hybrid.weights)
        offset, scale = hybrid.weights.get("new_offset", 0.0), hybrid.weights.get("new_scale", 1.0)
        expected = np.where(np.isin(np.arange(30), held_out), offset + scale * plain, plain)
        assert np.allclose(hybrid.scores(*batch).numpy(), expected, rtol=1e-5, atol=1e-4)
        assert np.allclose(sum(hybrid.contributions(*batch).values(), torch.zeros(1)).numpy(), expected, atol=1e-4)
        read = hybrid.histories(*batch)
        cells, products = hybrid.cells(read), (hybrid.queries(read) @ hybrid.item_vectors.T).double().numpy()
        products[cells.rows, cells.items] += cells.values
        assert np.allclose(products, expected, atol=1e-4)


@pytest.fixture(scope="module")
def make_extended(
    planted: dict[str, Hybrid], items: ItemCatalog, make_laser: Callable[..., Any]
) -> Callable[[str, tuple[int, ...]], Hybrid]:
    """Return what adds the new items to the hybrid, all at once or in steps, without their vectors or with them."""

    def make(text: str, steps: tuple[int, ...] = (3,)) -> Hybrid:
        hybrid = planted[text.removesuffix(" not given")]
        before = 0
        for number in steps:
            given_vectors = NEW_VECTORS[before:number] if text == "vectors" else None
            hybrid, before = hybrid.extended(grown(items, number), given_vectors, make_laser(30 + number)), number
        return hybrid

    return make


@pytest.fixture(scope="module")
def known_grown(
    items: ItemCatalog,
    split: LeaveOneOut,
    sequence: IDRecommender,
    make_laser: Callable[..., Any],
    vectors: np.ndarray,
    make_reference: Any,
) -> dict[str, Any]:
    """Return the features of the grown catalog by their formulas; words and directions are the first 30 items'."""
    all_vectors = {
        "tf-idf": None,
        "vectors": np.concatenate([vectors, NEW_VECTORS]),
        "vectors not given": np.concatenate([vectors, np.zeros_like(NEW_VECTORS)]),
    }
    return {
        text: make_reference(grown(items), split.known_sequences, sequence, make_laser(33), each, num_known=30)
        for text, each in all_vectors.items()
    }


EXTENDED = [("tf-idf", (3,)), ("tf-idf", (1, 3)), ("vectors", (3,)), ("vectors", (2, 3)), ("vectors not given", (3,))]


@pytest.mark.parametrize(("text", "steps"), EXTENDED)
def test_added_items(
    text: str,
    steps: tuple[int, ...],
    make_extended: Callable[..., Hybrid],
    known_grown: dict[str, Any],
    planted: dict[str, Hybrid],
    asked: list[list[int]],
    scattered: Callable[..., Any],
) -> None:
    hybrid, before = make_extended(text, steps), planted[text.removesuffix(" not given")]
    assert hybrid.num_items == 33 and hybrid.new.nonzero()[:, 0].tolist() == [30, 31, 32]
    assert hybrid.weights == before.weights and hybrid.weights_without_laser == before.weights_without_laser
    assert hybrid.text_model == before.text_model and not hybrid.sources.counts[30:].any()
    histories = [*asked, [30], [4, 31, 32], [32, 30, 1], list(range(20, 33))]
    plain = formula(known_grown[text], histories, WEIGHTS)
    expected = np.where(np.arange(33) >= 30, 0.6 + 1.25 * plain, plain)
    batch = scattered(histories)
    scores = hybrid.scores(*batch).numpy()
    assert np.allclose(scores, expected, rtol=1e-5, atol=1e-4)
    assert np.allclose(sum(hybrid.contributions(*batch).values(), torch.zeros(1)).numpy(), scores, atol=1e-4)
    assert np.allclose(scores[: len(asked), :30], before.scores(*scattered(asked)).numpy(), atol=1e-5)
    assert before.num_items == 30 and not before.new.any()  # which stays as it was


def test_an_added_item_is_found_by_its_words(make_extended: Callable[..., Hybrid], known: dict[str, Any]) -> None:
    shares = make_extended("tf-idf").contributions(torch.tensor([[0], [22]]), torch.ones(2, 1))
    assert shares["text"][0, 30] > shares["text"][0, 32] >= 0.0  # "brass lamp; Acme" is in the history
    assert not shares["text"][:, 31].any() and not shares["text"][1].any()
    for name in ("sequence", "item_knn", "popularity", "seen", "last"):
        assert not shares[name][:, 30:].any()
    assert shares["new"][:, 30:].unique().tolist() == [pytest.approx(0.6)] and not shares["new"][:, :30].any()


@pytest.mark.parametrize("text", ["tf-idf", "vectors", "vectors not given"])
def test_added_items_are_saved_and_loaded(
    text: str,
    make_extended: Callable[..., Hybrid],
    items: ItemCatalog,
    make_laser: Callable[..., Any],
    asked: list[list[int]],
    scattered: Callable[..., Any],
    tmp_path: Path,
) -> None:
    hybrid = make_extended(text)
    hybrid.save_pretrained(tmp_path)
    loaded = Hybrid.from_pretrained(tmp_path, grown(items), laser=make_laser(33))
    batch = scattered([*asked, [30], [4, 31, 32]])
    assert torch.equal(loaded.scores(*batch), hybrid.scores(*batch))
    assert loaded.new.tolist() == hybrid.new.tolist() and loaded.content_hash() == hybrid.content_hash()
    with pytest.raises(ArtifactError, match="must be of 30 items"):
        Hybrid.from_pretrained(tmp_path, items, laser=make_laser(33))


@texts
def test_items_are_added_to_what_was_loaded(
    text: str,
    planted: dict[str, Hybrid],
    make_extended: Callable[..., Hybrid],
    items: ItemCatalog,
    laser: Any,
    make_laser: Callable[..., Any],
    asked: list[list[int]],
    scattered: Callable[..., Any],
    tmp_path: Path,
) -> None:
    planted[text].save_pretrained(tmp_path)
    loaded = Hybrid.from_pretrained(tmp_path, items, laser=laser)
    hybrid = loaded.extended(grown(items), NEW_VECTORS if text == "vectors" else None, make_laser(33))
    batch = scattered([*asked, [30], [4, 31, 32]])
    assert torch.equal(hybrid.scores(*batch), make_extended(text).scores(*batch))


def test_added_items_without_an_adapter(
    make_extended: Callable[..., Hybrid], planted: dict[str, Hybrid], items: ItemCatalog, scattered: Callable[..., Any]
) -> None:
    """Left out before or after, it is the same."""
    batch = scattered([[30, 2], [4]])
    before = planted["tf-idf"].without("laser").extended(grown(items))
    assert torch.allclose(before.scores(*batch), make_extended("tf-idf").without("laser").scores(*batch), atol=1e-6)
    same = planted["tf-idf"].extended(items)  # none at all
    assert torch.equal(same.scores(*scattered([[3]])), planted["tf-idf"].scores(*scattered([[3]])))


# ---------------------------------------------------------------------- files


@pytest.fixture
def saved(planted: dict[str, Hybrid], tmp_path: Path) -> Callable[[str], Path]:
    """Return what saves the hybrid of all weights."""

    def save(text: str = "tf-idf") -> Path:
        planted[text].save_pretrained(tmp_path / text)
        return tmp_path / text

    return save


@texts
@pytest.mark.parametrize("with_sequence", [True, False])
def test_saved_and_loaded(
    text: str,
    with_sequence: bool,
    planted: dict[str, Hybrid],
    items: ItemCatalog,
    sequence: IDRecommender,
    laser: Any,
    asked: list[list[int]],
    scattered: Callable[..., Any],
    tmp_path: Path,
) -> None:
    hybrid, batch = planted[text], scattered(asked)
    hybrid.save_pretrained(str(tmp_path / "deep" / "folder"), with_sequence=with_sequence)
    names = {path.name for path in (tmp_path / "deep" / "folder").iterdir()}
    assert names == {"hybrid.json", "hybrid.safetensors"} | ({"sequence"} if with_sequence else set())
    beside = None if with_sequence else sequence
    loaded = Hybrid.from_pretrained(str(tmp_path / "deep" / "folder"), items, beside, laser)
    assert torch.equal(loaded.scores(*batch), hybrid.scores(*batch))
    assert loaded.weights == hybrid.weights and loaded.weights_without_laser == hybrid.weights_without_laser
    assert loaded.content_hash() == hybrid.content_hash() and loaded.text_model == hybrid.text_model
    assert torch.equal(loaded.without("laser").scores(*batch), hybrid.without("laser").scores(*batch))
    alone = Hybrid.from_pretrained(tmp_path / "deep" / "folder", items, sequence)
    assert torch.equal(alone.scores(*batch), hybrid.without("laser").scores(*batch))
    assert alone.weights == WITHOUT | NEW_WEIGHTS and alone.weights_without_laser is None
    loaded.save_pretrained(tmp_path / "again", with_sequence=False)
    for name in ("hybrid.json", "hybrid.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "folder" / name).read_bytes()


def test_what_was_fitted_is_loaded(
    fitted: dict[str, Hybrid], items: ItemCatalog, laser: Any, asked: list[list[int]], scattered: Any, tmp_path: Path
) -> None:
    """Weights that are there, parts that are not."""
    for text, hybrid in fitted.items():
        hybrid.save_pretrained(tmp_path / text)
        loaded = Hybrid.from_pretrained(tmp_path / text, items, laser=laser)
        assert torch.equal(loaded.scores(*scattered(asked)), hybrid.scores(*scattered(asked)))
        assert loaded.weights == hybrid.weights and loaded.weights_without_laser == hybrid.weights_without_laser
        settings_file = json.loads((tmp_path / text / "hybrid.json").read_text(encoding="utf-8"))
        needed = {*hybrid.weights, *(hybrid.weights_without_laser or {})}
        assert settings_file["parts"] == [
            part.name for part in hybrid.fitted_parts if needed & {*part.dense, *part.sparse}
        ]


def test_another_id_recommender_is_refused(
    saved: Callable[..., Path], planted: dict[str, Hybrid], items: ItemCatalog, tmp_path: Path
) -> None:
    other = build_recommender("sasrec", 30, hidden_size=8, num_hidden_layers=1, max_history_length=6, seed=3)
    folder = saved()
    with pytest.raises(ArtifactError, match="not the one that the hybrid was fitted with"):
        Hybrid.from_pretrained(folder, items, other)
    shutil.rmtree(folder / "sequence")
    with pytest.raises(ArtifactError):
        Hybrid.from_pretrained(folder, items)
    other.save_pretrained(folder / "sequence")
    with pytest.raises(ArtifactError, match="not the one that the hybrid was fitted with"):
        Hybrid.from_pretrained(folder, items)
    Hybrid(planted["tf-idf"].fitted_parts, {"seen": 1.0}, planted["tf-idf"].sources).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "sequence").exists()  # which has no weight
    assert Hybrid.from_pretrained(tmp_path / "none", items).weights == {"seen": 1.0}


def test_a_folder_that_is_none(items: ItemCatalog, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the hybrid in nowhere cannot be read"):
        Hybrid.from_pretrained(tmp_path / "nowhere", items)


@pytest.mark.parametrize("file", ["hybrid.json", "hybrid.safetensors", "sequence/model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "all but one byte", "noise"])
def test_damaged_files_are_named(
    file: str, damage: str, saved: Callable[..., Path], items: ItemCatalog, laser: Any
) -> None:
    folder = saved()
    content = (folder / file).read_bytes().rstrip()
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "all but one byte": content[:-1],
        "noise": b"\xff\xfe\x00garbage",
    }
    (folder / file).unlink()
    if damage != "missing":
        (folder / file).write_bytes(damaged[damage])
    with pytest.raises(ArtifactError):
        Hybrid.from_pretrained(folder, items, laser=laser)


@pytest.mark.parametrize("content", ["null", "[]", "3", '"text"', "{}", "[1, 2]", "{]", "NaN", '{"format_version": 1}'])
def test_other_json_is_refused(content: str, saved: Callable[..., Path], items: ItemCatalog, laser: Any) -> None:
    folder = saved()
    (folder / "hybrid.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match="the hybrid in tf-idf cannot be read"):
        Hybrid.from_pretrained(folder, items, laser=laser)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 2),
        ("format_version", None),
        ("parts", 5),
        ("parts", None),
        ("parts", ["seen", "tarot"]),
        ("parts", [["seen"]]),
        ("parts", [{}]),
        ("weights", None),
        ("weights", [1.0]),
        ("weights", {"seen": "much"}),
        ("weights", {"seen": None}),
        ("weights", {"seen": [1.0]}),
        ("weights_without_laser", [1.0]),
        ("weights_without_laser", {"seen": "much"}),
        ("sequence", "0" * 64),
        ("sequence", 7),
        ("shrinkage", "much"),
        ("shrinkage", None),
    ],
)
def test_settings_that_are_none_are_refused(
    key: str, value: Any, saved: Callable[..., Path], items: ItemCatalog, laser: Any
) -> None:
    folder = saved()
    settings_file = json.loads((folder / "hybrid.json").read_text(encoding="utf-8"))
    assert key in settings_file
    (folder / "hybrid.json").write_text(json.dumps(settings_file | {key: value}), encoding="utf-8")
    with pytest.raises(ArtifactError):
        Hybrid.from_pretrained(folder, items, laser=laser)


@pytest.mark.parametrize("key", ["format_version", "parts", "weights", "weights_without_laser", "sequence"])
def test_settings_that_are_missing_are_refused(
    key: str, saved: Callable[..., Path], items: ItemCatalog, laser: Any
) -> None:
    folder = saved()
    settings_file = json.loads((folder / "hybrid.json").read_text(encoding="utf-8"))
    del settings_file[key]
    (folder / "hybrid.json").write_text(json.dumps(settings_file), encoding="utf-8")
    with pytest.raises(ArtifactError, match=f"cannot be read .*{key}"):
        Hybrid.from_pretrained(folder, items, laser=laser)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((text, name) for text in TEXTS for name in ("counts", "new", "item_knn.items", "item_knn.similarities")),
        ("tf-idf", "text.items"),
        ("tf-idf", "text.similarities"),
        ("vectors", "text.vectors"),
    ],
)
def test_tensors_of_another_catalog_are_refused(
    text: str, name: str, saved: Callable[..., Path], items: ItemCatalog, laser: Any
) -> None:
    folder = saved(text)
    tensors = load_file(folder / "hybrid.safetensors")
    for changed in ({name: tensors[name][:-1].clone()}, {name: torch.cat([tensors[name], tensors[name][:1]])}, None):
        kept = {key: tensor for key, tensor in tensors.items() if key != name} | (changed or {})
        save_file(kept, folder / "hybrid.safetensors")
        with pytest.raises(ArtifactError):
            Hybrid.from_pretrained(folder, items, laser=laser)


@texts
def test_hybrids_of_another_catalog_are_refused(
    text: str, saved: Callable[..., Path], items: ItemCatalog, laser: Any
) -> None:
    folder = saved(text)
    for other in (ItemCatalog(items.item_ids[:29], items.attributes[:29]), grown(items)):
        with pytest.raises(ArtifactError, match=f"must be of {len(other)} items"):
            Hybrid.from_pretrained(folder, other, laser=laser)


def test_an_adapter_of_another_catalog_is_refused_in_loading(
    saved: Callable[..., Path], items: ItemCatalog, make_laser: Callable[..., Any]
) -> None:
    folder = saved()
    with pytest.raises(BiTuningError):
        Hybrid.from_pretrained(folder, items, laser=make_laser(29))


@texts
def test_the_hash_tells_hybrids_apart(text: str, planted: dict[str, Hybrid], sequence: IDRecommender) -> None:
    hybrid = planted[text]
    parts, sources, without = hybrid.fitted_parts, hybrid.sources, hybrid.weights_without_laser
    hashes = [
        hybrid.content_hash(),
        Hybrid(parts, WEIGHTS | NEW_WEIGHTS | {"seen": -0.7000001}, sources, without).content_hash(),
        Hybrid(parts, WEIGHTS | NEW_WEIGHTS, sources, WITHOUT).content_hash(),
        Hybrid(parts, WEIGHTS | NEW_WEIGHTS, sources).content_hash(),
        Hybrid(parts, WEIGHTS, sources, without).content_hash(),
        hybrid.without("laser").content_hash(),
        Hybrid(
            parts, WEIGHTS | NEW_WEIGHTS, Sources(sources.items, sources.counts + 1, None, sequence), without
        ).content_hash(),
    ]
    assert len(set(hashes)) == len(hashes) and all(len(each) == 64 for each in hashes)
    assert Hybrid(parts, dict(WEIGHTS | NEW_WEIGHTS), sources, without).content_hash() == hashes[0]


# ---------------------------------------------------------------------- a part of one's own


class Even(Part):
    """One dense and one sparse feature: whether an item's index is even; whether a history begins with it."""

    dense = ("even",)
    sparse = ("first",)

    @classmethod
    def fit(cls, sources: Sources) -> "Even":
        part = cls()
        part.item_vectors = (torch.arange(len(sources.items)) % 2 == 0).float()[:, None]
        return part

    def queries(self, histories: Histories) -> torch.Tensor:
        return torch.ones(1, len(histories), 1)

    def cells(self, histories: Histories) -> Any:
        first = [(row, items[0]) for row, items in enumerate(histories.as_lists()) if items]
        rows, items = (np.array([pair[place] for pair in first], dtype=np.int64) for place in (0, 1))
        return histories.seen._replace(rows=rows, items=items, values=np.ones((len(first), 1)))


@pytest.fixture
def own_part() -> Iterator[type[Part]]:
    """Register a part for a while."""
    yield register_part("even")(Even)
    PARTS.pop("even", None)


def test_a_part_of_ones_own_has_a_weight(
    own_part: type[Part],
    histories: list[list[int]],
    items: ItemCatalog,
    asked: list[list[int]],
    scattered: Callable[..., Any],
    tmp_path: Path,
) -> None:
    assert PARTS["even"] is own_part and own_part.name == "even"
    even = LeaveOneOut([[*row[:-2], row[-2] // 2 * 2, row[-1]] for row in histories if len(row) >= 3])
    hybrid = Hybrid.fit(even, items, text=None, parts=["even", "seen"])
    assert hybrid.weights["even"] > 2 and set(hybrid.weights) >= {"even", "first"}
    scores = hybrid.scores(*scattered(asked)).numpy()
    seen = hybrid.weights.get("seen", 0.0)
    for row, history in enumerate(asked):
        for item in range(30):
            expected = hybrid.weights["even"] * (item % 2 == 0) + hybrid.weights["first"] * (history[:1] == [item])
            assert scores[row, item] == pytest.approx(expected + seen * (item in history), abs=1e-5)
    hybrid.save_pretrained(tmp_path)
    batch = scattered(asked)
    assert torch.equal(Hybrid.from_pretrained(tmp_path, items).scores(*batch), hybrid.scores(*batch))
    extended = hybrid.extended(grown(items)).scores(*scattered([[3]]))[0]
    assert extended[30] == pytest.approx(
        hybrid.weights.get("new_offset", 0.0) + hybrid.weights.get("new_scale", 1.0) * hybrid.weights["even"], abs=1e-5
    )
    del PARTS["even"]
    with pytest.raises(ArtifactError, match="parts that are registered .* got .*even"):
        Hybrid.from_pretrained(tmp_path, items)


def test_all_parts_are_fitted_with_ones_own(own_part: type[Part], split: LeaveOneOut, items: ItemCatalog) -> None:
    hybrid = Hybrid.fit(split, items)
    assert {part.name for part in hybrid.fitted_parts} == {"text", "item_knn", "popularity", "seen", "last", "even"}


@pytest.mark.parametrize("name", ["seen", "text", "laser"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    before = dict(PARTS)
    with pytest.raises(ConfigurationError, match=f"must be free, got '{name}', which {PARTS[name].__name__} has"):
        register_part(name)(Even)
    assert before == PARTS
