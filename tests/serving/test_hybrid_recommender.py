"""Ranking by the hybrid: with the language model, without it, explained, grown, saved and loaded."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_bituning import LaserRecommender
from peft_bituning.catalog import ExactIndex, FaissIndex
from peft_bituning.catalog.text_encoder import TextEncoder
from peft_bituning.data import ItemCatalog
from peft_bituning.errors import ArtifactError, ConfigurationError, DataError, UnknownItemError
from peft_bituning.recommenders import Hybrid, TextVectors, build_recommender, pad_histories
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid.part import PARTS
from peft_bituning.serving import HybridRecommender
from peft_bituning.training import fit

NEW = {"item_id": "new1", "title": "Gold ladder", "brand": "Acme", "category": "tools"}
OTHER_NEW = {"item_id": "0012", "title": "Tin &amp; lid", "brand": "Delta", "category": "kitchen"}
HISTORY = ["007", "8", "b2"]
ASKED = [HISTORY, [], ["b9"], ["c1", "c1", "b3", "c1"], [*HISTORY, "c0", "c1", "b4"], ["b5", "b6"]]
WEIGHTS = {
    "popularity": 1.0,
    "seen": -2.0,
    "last": 1.5,
    "item_knn": 3.0,
    "sequence": 1.0,
    "laser": 0.2,
    "text": 2.0,
    "text_last": 1.0,
    "text_seen": -1.0,
    "text_last_seen": 0.5,
}
WITHOUT = {name: 1.5 * weight for name, weight in WEIGHTS.items() if name != "laser"}
CHUNKED = partial(ExactIndex, chunk_size=1, item_chunk_size=4)


def ids(row: Sequence[Sequence[Any]]) -> list[str]:
    return [entry[0] for entry in row]


def plain(recommender: LaserRecommender | HybridRecommender, histories: Sequence[Sequence[str]]) -> list[Any]:
    """Return every item's score by the whole matrix, a dictionary a history."""
    indices = [recommender.items.indices_of(history) for history in histories]
    scores = recommender.hybrid.scores(*pad_histories(indices)).tolist()
    return [dict(zip(recommender.items.item_ids, row, strict=True)) for row in scores]


def check_lists(found: Sequence[Any], expected: Sequence[Mapping[str, float]], tolerance: float = 1e-4) -> None:
    """Hold lists against the scores of all items that they may hold; near ties may change places."""
    assert len(found) == len(expected)
    for row, scores in zip(found, expected, strict=True):
        assert dict(row) == pytest.approx(scores, abs=tolerance)
        values = [score for _, score in row]
        assert values == sorted(values, reverse=True)


def same_lists(found: Sequence[Any], expected: Sequence[Any], tolerance: float = 1e-4) -> None:
    assert [ids(row) for row in found] == [ids(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert [entry[1] for entry in row] == pytest.approx([entry[1] for entry in other], abs=tolerance)


def another(
    present: LaserRecommender, weights: Mapping[str, float] = WEIGHTS, text: Any = "tf-idf", hybrid: bool = True
) -> LaserRecommender:
    """Return a recommender of the same language model with a hybrid of given weights, or none; free to be changed."""
    made = None
    if hybrid:
        assert present.hybrid is not None
        sources = replace(present.hybrid.sources, text=text)
        parts = [part for part in present.hybrid.fitted_parts if part.name != "text"]
        if text is not None:
            parts.append(PARTS["text"].fit(sources))
        names = {name for part in parts for name in part.features}
        with_it, without = ({n: weight for n, weight in given.items() if n in names} for given in (weights, WITHOUT))
        made = Hybrid(parts, with_it, sources, without)
    return LaserRecommender(
        present.base,
        present.model,
        present.items,
        present.table,
        present.template,
        present.id_recommender,
        present.settings,
        "cpu",
        made,
    )


def made_up(texts: Sequence[str], width: int = 6) -> np.ndarray:
    """Stand in for a model of texts: a vector by the letters of each."""
    return np.array([[sum(map(ord, text[place::width])) % 97 for place in range(width)] for text in texts], float)


TEXTS: dict[str, Any] = {"none": None, "tf-idf": "tf-idf"}


@pytest.fixture
def text_of(trained) -> Callable[[str], Any]:
    """Return what the part text reads, by a short name."""
    titles = [row["title"] for row in trained.data.items.attributes]
    known = {
        **TEXTS,
        "vectors": TextVectors("vectors", made_up(titles)),
        "model": TextVectors("a-model", made_up(titles)),
    }
    return known.__getitem__


@pytest.fixture
def whole(trained) -> LaserRecommender:
    """Return a recommender whose hybrid has all parts, with tf-idf; free to be changed."""
    return another(trained.recommender)


@pytest.fixture(scope="module")
def whole_folder(trained, tmp_path_factory) -> Path:
    """Return the folder of such a one; read it, do not change it."""
    folder = tmp_path_factory.mktemp("whole")
    another(trained.recommender).save_pretrained(folder)
    return folder


def load(folder: Path, trained) -> LaserRecommender:
    return LaserRecommender.from_pretrained(folder, base_model=trained.base_folder, device="cpu")


# ---------------------------------------------------------------------- lists


def test_the_default_ranks_by_the_hybrid(trained, whole) -> None:
    for recommender in (trained.recommender, whole):
        found = recommender.recommend(ASKED, k=12, filter_seen=False)
        check_lists(found, plain(recommender, ASKED))
        assert recommender.recommend(ASKED, k=12, filter_seen=False, parts="hybrid") == found
        same_lists(recommender.recommend(ASKED, k=4, filter_seen=False), [row[:4] for row in found], 1e-9)
    assert {part.name for part in whole.hybrid.parts} == set(PARTS)


def test_laser_alone_gives_cosines(whole, trained) -> None:
    found = whole.recommend(ASKED, k=12, filter_seen=False, parts="laser")
    cosines = whole.encode_users(ASKED, normalize_embeddings=True) @ whole.table.embeddings.numpy().T
    check_lists(found, [dict(zip(whole.items.item_ids, row, strict=True)) for row in cosines], 1e-5)
    assert found == trained.recommender.recommend(ASKED, k=12, filter_seen=False, parts="laser")
    by_hybrid = whole.recommend(ASKED, k=12, filter_seen=False)
    assert [ids(row) for row in found] != [ids(row) for row in by_hybrid]


@pytest.mark.parametrize("name", ["text", "", "Laser", "hybrid without the language model"])
def test_unknown_parts_are_named(whole, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parts must be 'hybrid' or 'laser', got {name!r}"):
        whole.recommend([HISTORY], parts=name)


def test_what_is_asked_for_limits_the_list(whole) -> None:
    for recommender in (whole, whole.without("laser")):
        every = recommender.recommend(ASKED, k=12, filter_seen=False)
        unseen = recommender.recommend(ASKED, k=100)
        left = [[pair for pair in row if pair[0] not in seen] for row, seen in zip(every, ASKED, strict=True)]
        same_lists(unseen, left, 1e-9)
        some = recommender.recommend(ASKED, k=12, candidates=["c1", "b5", "8", "c1"])
        same_lists(some, [[pair for pair in row if pair[0] in ("c1", "b5", "8")] for row in unseen], 1e-9)
        assert recommender.recommend(ASKED, candidates=[]) == [[]] * len(ASKED)
        assert len(recommender.recommend([[]], k=100)[0]) == 12
        assert recommender.recommend([list(recommender.items.item_ids)]) == [[]]
        assert recommender.recommend([]) == []
        same_lists(recommender.recommend(ASKED, k=np.int64(2)), [row[:2] for row in unseen], 1e-9)
        with_unknown = recommender.recommend([["nope", *HISTORY], ["nope"]], on_unknown="ignore", k=12)
        same_lists(with_unknown, recommender.recommend([HISTORY, []], k=12))
        assert recommender.recommend([[8]], k=3) == recommender.recommend([["8"]], k=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"histories": "007"}, ConfigurationError, "histories must be a list of lists of item ids, got '007'"),
        ({"histories": ["007"]}, ConfigurationError, r"got \['007'\]; for one user write \[\[\.\.\.\]\]"),
        (
            {"histories": [["nope"]]},
            UnknownItemError,
            "1 item ids are not in the catalog: nope; add them with add_item",
        ),
        ({"candidates": "007"}, ConfigurationError, "candidates must be a list of item ids, got '007'"),
        ({"candidates": ["nope"]}, UnknownItemError, "'nope'"),
        ({"k": 0}, ConfigurationError, "k must be an integer >= 1, got 0"),
        ({"k": True}, ConfigurationError, "k must be an integer >= 1, got True"),
        ({"k": 1.5}, ConfigurationError, "k must be an integer >= 1, got 1.5"),
        ({"on_unknown": "skip"}, ConfigurationError, "on_unknown must be 'error' or 'ignore', got 'skip'"),
    ],
)
def test_wrong_arguments_are_named(whole, arguments: dict[str, Any], error: Any, message: str) -> None:
    for recommender in (whole, whole.without("laser")):
        with pytest.raises(error, match=message):
            recommender.recommend(**{"histories": [HISTORY], **arguments})


def test_batches_change_no_list(whole, monkeypatch) -> None:
    lean = whole.without("laser")
    found, without = whole.recommend(ASKED, k=12), lean.recommend(ASKED, k=12)
    for batch_size in (1, 4):
        same_lists(whole.recommend(ASKED, k=12, batch_size=batch_size), found)
    monkeypatch.setattr("peft_bituning.serving.hybrid_recommender.USERS_AT_ONCE", 2)
    same_lists(whole.recommend(ASKED, k=12), found)
    same_lists(lean.recommend(ASKED, k=12), without)
    for place, history in enumerate(ASKED):
        same_lists(whole.recommend([history], k=12), [found[place]])
        same_lists(lean.recommend([history], k=12), [without[place]])


def test_a_hybrid_is_of_the_catalog_it_ranks(trained, whole) -> None:
    fewer = ItemCatalog(trained.data.items.item_ids[:-1], trained.data.items.attributes[:-1])
    with pytest.raises(ConfigurationError, match="hybrid must be of 11 items, got one of 12"):
        HybridRecommender(fewer, whole.hybrid)


# ---------------------------------------------------------------------- explained


def test_shares_add_up_to_the_score(trained, whole) -> None:
    for recommender in (trained.recommender, whole, whole.without("laser")):
        found = recommender.recommend(ASKED, k=12, filter_seen=False, explain=True)
        same_lists(recommender.recommend(ASKED, k=12, filter_seen=False), found, 1e-6)
        indices = [recommender.items.indices_of(history) for history in ASKED]
        expected = recommender.hybrid.contributions(*pad_histories(indices))
        for place, (row, scores) in enumerate(zip(found, plain(recommender, ASKED), strict=True)):
            for item, score, shares in row:
                assert shares.keys() == {part.name for part in recommender.hybrid.parts}
                assert sum(shares.values()) == pytest.approx(score, abs=1e-6)
                assert score == pytest.approx(scores[item], abs=1e-4)
                column = recommender.items.index[item]
                wanted = {name: float(share[place, column]) for name, share in expected.items()}
                assert shares == pytest.approx(wanted, abs=1e-4)


def test_only_the_hybrid_can_be_explained(whole, trained) -> None:
    alone = another(trained.recommender, hybrid=False)
    for recommender, parts in ((whole, "laser"), (alone, None), (alone, "laser")):
        with pytest.raises(ConfigurationError, match="explain needs the hybrid, whose parts it tells apart"):
            recommender.recommend([HISTORY], explain=True, parts=parts)


def shares_of(recommender: Any, history: Sequence[str]) -> dict[str, dict[str, float]]:
    (row,) = recommender.recommend([history], k=100, filter_seen=False, explain=True)
    return {item: shares for item, _, shares in row}


def test_a_history_that_grows_changes_what_the_parts_say(whole) -> None:
    before, after = shares_of(whole, HISTORY), shares_of(whole, [*HISTORY, "b7"])
    for shares, history in ((before, HISTORY), (after, [*HISTORY, "b7"])):
        for item, share in shares.items():
            assert share["seen"] == (WEIGHTS["seen"] if item in history else 0)
            assert share["last"] == (WEIGHTS["last"] if item == history[-1] else 0)
    assert before["b7"]["text"] != after["b7"]["text"]
    for name in ("item_knn", "sequence", "laser", "text"):
        assert {item: share[name] for item, share in before.items()} != pytest.approx(
            {item: share[name] for item, share in after.items()}, abs=1e-6
        )
    assert {item: share["popularity"] for item, share in before.items()} == {
        item: share["popularity"] for item, share in after.items()
    }
    # what was left out as seen is recommended no more, what was not seen before may be
    lists = whole.recommend([HISTORY, [*HISTORY, "b7"]], k=12)
    assert "b7" in ids(lists[0]) and "b7" not in ids(lists[1])


def test_an_item_that_was_bought_twice_is_seen_as_one_bought_once(whole) -> None:
    """`phi(j, h) = 1 where j is in h`, however often."""
    once, twice = shares_of(whole, ["b7", "8"]), shares_of(whole, ["b7", "8", "b7", "b7", "8"])
    for item in whole.items.item_ids:
        assert twice[item]["seen"] == once[item]["seen"] == (WEIGHTS["seen"] if item in ("b7", "8") else 0)


# ---------------------------------------------------------------------- without the language model


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("this must not be called")


def test_the_folder_without_its_language_model(trained, whole_folder, monkeypatch) -> None:
    full = [load(folder, trained) for folder in (trained.folder, whole_folder)]
    for name in (
        "peft_bituning.serving.folder.load_base_model",
        "peft_bituning.serving.folder.PeftModel.from_pretrained",
        "peft_bituning.base_models.load_base_model",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
    ):
        monkeypatch.setattr(name, refuse)
    for folder, recommender in zip((trained.folder, whole_folder), full, strict=True):
        lean, loaded = recommender.without("laser"), HybridRecommender.from_pretrained(folder)
        assert isinstance(lean, HybridRecommender) and lean.base is None and lean.hybrid.sources.laser is None
        assert not any(part.name == "laser" for part in [*lean.hybrid.parts, *loaded.hybrid.fitted_parts])
        assert loaded.hybrid.weights == lean.hybrid.weights == recommender.hybrid.weights_without_laser
        assert loaded.items == lean.items and loaded.results == lean.results == recommender.results
        found = loaded.recommend(ASKED, k=12, filter_seen=False, explain=True)
        assert found == lean.recommend(ASKED, k=12, filter_seen=False, explain=True)
        check_lists([[entry[:2] for entry in row] for row in found], plain(lean, ASKED))
        assert repr(loaded) == repr(lean)


def test_a_loaded_folder_gives_the_lists_that_were_saved(trained, whole, whole_folder) -> None:
    loaded = load(whole_folder, trained)
    assert loaded.hybrid.content_hash() == whole.hybrid.content_hash()
    found = loaded.recommend(ASKED, k=12, filter_seen=False, explain=True)
    assert found == whole.recommend(ASKED, k=12, filter_seen=False, explain=True)
    lean = whole.without("laser")
    assert HybridRecommender.from_pretrained(str(whole_folder)).recommend(ASKED) == lean.recommend(ASKED)


def test_a_repository_is_downloaded(whole_folder, whole, monkeypatch) -> None:
    asked: list[Any] = []

    def download(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
        asked.append((repo_id, revision, token))
        return whole_folder

    monkeypatch.setattr("peft_bituning.serving.hub.download", download)
    loaded = HybridRecommender.from_pretrained("someone/shop", revision="v1", token="secret")
    assert asked == [("someone/shop", "v1", "secret")]
    assert loaded.recommend(ASKED) == whole.without("laser").recommend(ASKED)


def test_nothing_keeps_the_language_model(trained) -> None:
    loaded = load(trained.folder, trained)
    model, lean = weakref.ref(loaded.base.model), loaded.without("laser")
    before = lean.recommend(ASKED)
    del loaded
    gc.collect()
    assert model() is None
    assert lean.recommend(ASKED) == before


def test_only_laser_can_be_left_out(whole, trained) -> None:
    with pytest.raises(ConfigurationError, match="only 'laser' can be left out after fitting, got 'text'; fit with pa"):
        whole.without("text")
    with pytest.raises(ConfigurationError, match="there is no hybrid to leave 'laser' out of; this folder has the ada"):
        another(trained.recommender, hybrid=False).without("laser")


@pytest.mark.parametrize("saved", [False, True])
def test_a_hybrid_that_laser_adds_nothing_to_embeds_nobody(trained, saved: bool, monkeypatch, tmp_path) -> None:
    recommender = another(trained.recommender, {**WEIGHTS, "laser": 0.0})
    if saved:
        recommender.save_pretrained(tmp_path)
        recommender = load(tmp_path, trained)
    monkeypatch.setattr(LaserRecommender, "_encode", refuse)
    found = recommender.recommend(ASKED, k=12, filter_seen=False, explain=True)
    assert all("laser" not in shares for row in found for _, _, shares in row)
    check_lists([[entry[:2] for entry in row] for row in found], plain(recommender, ASKED))
    with pytest.raises(AssertionError, match="this must not be called"):
        recommender.recommend(ASKED, parts="laser")


def test_names_and_results(trained, whole, loaded) -> None:
    lean = loaded.without("laser")
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in lean.hybrid.weights.items())
    assert repr(lean) == f"HybridRecommender(12 items; {weights})" and "laser" not in repr(lean)
    verdict = loaded.results["language_model"]["verdict"]
    assert repr(loaded).startswith("LaserRecommender(12 items, 'tiny-llama', ranks by HybridRecommender(12 items; ")
    assert repr(loaded).endswith(f"; {verdict})") and f"laser {loaded.hybrid.weights['laser']:.3g}" in repr(loaded)
    results = json.loads((trained.folder / "results.json").read_text())
    for recommender in (loaded, lean, trained.recommender):
        assert recommender.results["rows"] == results["rows"]
        assert recommender.results["language_model"] == results["language_model"]
        assert recommender.results["hybrid"]["weights"] == loaded.hybrid.weights
    assert repr(HybridRecommender(lean.items, lean.hybrid)) == repr(lean)
    assert HybridRecommender(lean.items, lean.hybrid).results == {}
    alone = repr(another(trained.recommender, hybrid=False))
    assert alone.startswith("LaserRecommender(12 items, 'tiny-llama', ranks by the adapter alone")


# ---------------------------------------------------------------------- new items


def grow(recommender: Any, *records: Mapping[str, str]) -> None:
    recommender.add_items(list(records))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("text", ["none", "tf-idf", "vectors"])
def test_new_items_can_be_recommended_and_are_neutral_in_counts(trained, text_of, text: str, lean: bool) -> None:
    recommender: Any = another(trained.recommender, text=text_of(text))
    recommender = recommender.without("laser") if lean else recommender
    recommender.add_items(iter([NEW, OTHER_NEW]))
    assert recommender.items.item_ids[-2:] == ("new1", "0012") and recommender.hybrid.num_items == 14
    for history in ASKED:
        shares = shares_of(recommender, history)
        assert len(shares) == 14
        for item in ("new1", "0012"):
            for name in ("popularity", "sequence", "item_knn", "seen", "last"):
                assert shares[item][name] == 0
            assert lean or shares[item]["laser"] != 0
    asked = [*ASKED, ["new1"], [*HISTORY, "new1", "0012"]]
    check_lists(recommender.recommend(asked, k=100, filter_seen=False), plain(recommender, asked))
    shares = shares_of(recommender, [*HISTORY, "new1"])
    assert shares["new1"]["seen"] == recommender.hybrid.weights["seen"]
    assert shares["new1"]["last"] == recommender.hybrid.weights["last"]
    assert "new1" not in ids(recommender.recommend([["new1"]], k=100)[0])
    assert ids(recommender.recommend([HISTORY], candidates=["new1"])[0]) == ["new1"]


def by_text(titles: Sequence[str]) -> HybridRecommender:
    """Return a recommender by the likeness to the last item's title."""
    items = ItemCatalog.from_records({"item_id": f"i{n}", "title": title} for n, title in enumerate(titles))
    sources = Sources(items, torch.ones(len(items)), text="tf-idf")
    return HybridRecommender(items, Hybrid([PARTS["text"].fit(sources)], {"text_last": 1.0}, sources))


def likeness(recommender: HybridRecommender) -> dict[str, dict[str, float]]:
    """Return how like all items are to each."""
    rows = {item: shares_of(recommender, [item]) for item in recommender.items.item_ids}
    return {item: {other: share["text"] for other, share in shares.items()} for item, shares in rows.items()}


@pytest.mark.parametrize("title", ["Brass lamp", "Lamp", "Steel", "Steel kettle and lamp", "Lamp and pan, kettle"])
def test_a_new_item_is_like_the_items_whose_words_it_has(title: str) -> None:
    """A new text may share words with any item, the first one too, and with a few or with all."""
    titles = ["Brass lamp", "Steel lamp", "Steel kettle", "Copper kettle", "Copper pan", "Brass pan"]
    recommender = by_text(titles)
    before = likeness(recommender)
    recommender.add_items([{"item_id": "new", "title": title}])
    after = likeness(recommender)
    words = set(title.lower().replace(",", "").split())
    for item, text in zip(before, titles, strict=True):
        assert (after["new"][item] > 0) == bool(words & set(text.lower().split()))
        assert after[item]["new"] == pytest.approx(after["new"][item], abs=1e-6)
        assert {other: after[item][other] for other in before} == pytest.approx(before[item], abs=1e-6)


def test_new_items_take_no_others_place_in_a_small_catalog() -> None:
    """All texts share a word: everything is like everything, and far fewer than 300 are neighbors."""
    words = ("brass", "steel", "copper", "iron", "tin")
    recommender = by_text([f"thing {words[n % 3]} {words[n % 5]}" for n in range(12)])
    before = likeness(recommender)
    assert all(value > 0 for row in before.values() for value in row.values())
    recommender.add_items({"item_id": f"new{n}", "title": f"thing steel {words[n]}"} for n in range(4))
    after = likeness(recommender)
    for item, row in before.items():
        assert {other: after[item][other] for other in before} == pytest.approx(row, abs=1e-6)
        assert all(after[item][f"new{n}"] > 0 and after[f"new{n}"][item] > 0 for n in range(4))


@pytest.mark.parametrize(("part", "text"), [*((name, "tf-idf") for name in sorted(PARTS)), ("text", "vectors")])
def test_new_items_change_no_share_of_the_others(trained, text_of, part: str, text: str) -> None:
    features = {name: weight for name, weight in WEIGHTS.items() if name.startswith(part)}
    recommender: Any = another(trained.recommender, features, text_of(text if part == "text" else "none"))
    assert [each.name for each in recommender.hybrid.parts] == [part]
    before = [shares_of(recommender, history) for history in ASKED]
    grow(recommender, NEW, OTHER_NEW, {"item_id": "new2", "title": "Copper rope lamp"})
    for history, shares in zip(ASKED, before, strict=True):
        after = shares_of(recommender, history)
        assert len(after) == 15
        for item in trained.data.items.item_ids:
            assert after[item][part] == pytest.approx(shares[item][part], abs=1e-5)


def test_old_lists_stay_apart_from_the_new_items(loaded) -> None:
    for recommender in (loaded.without("laser"), loaded):
        before = recommender.recommend(ASKED, k=100)
        grow(recommender, NEW)
        after = recommender.recommend(ASKED, k=100)
        assert all("new1" in ids(row) for row in after)
        assert [[item for item in ids(row) if item != "new1"] for row in after] == [ids(row) for row in before]


@pytest.mark.parametrize("text", ["none", "tf-idf", "vectors"])
def test_grown_recommenders_are_saved_and_loaded_again(trained, text_of, tmp_path, text: str) -> None:
    recommender = another(trained.recommender, text=text_of(text))
    grow(recommender, NEW)
    lean = recommender.without("laser")
    grow(recommender, OTHER_NEW)  # after what was taken off it, which stays as it is
    assert len(lean.items) == 13
    recommender.save_pretrained(tmp_path / "whole")
    asked = [*ASKED, ["0012", "new1"], ["new1", *HISTORY]]
    again = load(tmp_path / "whole", trained)
    found = again.recommend(asked, k=100, filter_seen=False, explain=True)
    assert found == recommender.recommend(asked, k=100, filter_seen=False, explain=True)
    without = HybridRecommender.from_pretrained(tmp_path / "whole")
    grow(lean, OTHER_NEW)
    for other in (without, recommender.without("laser"), again.without("laser")):
        assert other.recommend(asked, k=100) == lean.recommend(asked, k=100)
    lean.hybrid.save_pretrained(tmp_path / "lean")
    reloaded = HybridRecommender(lean.items, Hybrid.from_pretrained(tmp_path / "lean", lean.items))
    assert reloaded.recommend(asked, k=100) == lean.recommend(asked, k=100)
    grow(again, {"item_id": "third", "title": "Third"})  # and they grow on
    assert "third" in ids(again.recommend([HISTORY], k=100)[0])


@pytest.mark.parametrize(
    ("records", "error", "message"),
    [
        ([NEW, {"item_id": "007", "title": "Again"}], DataError, "Already in the catalog: '007'"),
        ([NEW, NEW], DataError, "given more than once: 'new1'"),
        ([NEW, {"title": "No id"}], DataError, "Item 2 has no usable 'item_id'"),
        (NEW, ConfigurationError, "items must be a list of records, got .*; for one item write"),
        ("new1", ConfigurationError, "items must be a list of records, got 'new1'; for one item write"),
    ],
)
def test_refused_items_leave_everything_as_it_was(loaded, records: Any, error: Any, message: str) -> None:
    for recommender in (loaded, loaded.without("laser")):
        before, hybrid, index = recommender.recommend(ASKED, k=12), recommender.hybrid, recommender.index
        with pytest.raises(error, match=message):
            recommender.add_items(records)
        assert len(recommender.items) == 12 and recommender.hybrid is hybrid and recommender.index is index
        assert recommender.recommend(ASKED, k=12) == before
        recommender.add_items([NEW])
        assert len(recommender.items) == recommender.hybrid.num_items == 13


def test_adding_nothing_changes_nothing(whole) -> None:
    for recommender in (whole, whole.without("laser")):
        before = recommender.recommend(ASKED, k=12)
        recommender.add_items([])
        assert len(recommender.items) == 12 and recommender.recommend(ASKED, k=12) == before


def test_texts_of_new_items_are_read_by_the_model_that_read_the_others(trained, text_of, monkeypatch, tmp_path) -> None:
    opened: list[Any] = []

    def open_text_encoder(name: str, base: Any = None) -> TextEncoder:
        opened.append((name, base))
        return TextEncoder(name, lambda texts, progress: made_up([text.split(";")[0] for text in texts]))

    monkeypatch.setattr("peft_bituning.serving.hybrid_recommender.open_text_encoder", open_text_encoder)
    recommender = another(trained.recommender, text=text_of("model"))
    twin = {"item_id": "twin", "title": "Steel kettle"}
    recommender.save_pretrained(tmp_path)
    for each, base in (
        (recommender.without("laser"), None),
        (HybridRecommender.from_pretrained(tmp_path), None),
        (recommender, recommender.base),
    ):
        assert each.hybrid.text_model == "a-model"
        each.add_items([twin])
        assert opened == [("a-model", base)]
        shares = shares_of(each, ["b3", "b9"])
        assert shares["twin"]["text"] == pytest.approx(shares["8"]["text"], abs=1e-5)
        assert shares["twin"]["text"] != 0
        opened.clear()
    given = another(trained.recommender, text=text_of("vectors"))
    given.add_items([twin])
    assert opened == []  # nobody knows what made an array's vectors
    assert all(shares_of(given, history)["twin"]["text"] == 0 for history in ASKED)


def test_texts_that_cannot_be_read_leave_everything_as_it_was(trained, text_of, monkeypatch) -> None:
    def open_text_encoder(name: str, base: Any = None) -> TextEncoder:
        raise ConfigurationError(f"text_model {name!r} is not here")

    monkeypatch.setattr("peft_bituning.serving.hybrid_recommender.open_text_encoder", open_text_encoder)
    whole = another(trained.recommender, text=text_of("model"))
    for recommender in (whole, whole.without("laser")):
        before, table = recommender.recommend(ASKED, k=12), getattr(recommender, "table", None)
        with pytest.raises(ConfigurationError, match="text_model 'a-model' is not here"):
            recommender.add_items([NEW])
        assert len(recommender.items) == recommender.hybrid.num_items == 12
        assert getattr(recommender, "table", None) is table
        assert recommender.recommend(ASKED, k=12) == before


def test_a_language_model_reads_texts_where_it_is_at_hand(trained, text_of) -> None:
    titles = TextVectors("language-model:1", np.random.default_rng(0).normal(size=(12, 32)))
    whole = another(trained.recommender, text=titles)
    lean = whole.without("laser")
    whole.add_items([NEW])
    assert shares_of(whole, HISTORY)["new1"]["text"] != 0
    with pytest.raises(ConfigurationError, match="text_model 'language-model:1' needs the base model, which is not lo"):
        lean.add_items([NEW])
    assert len(lean.items) == 12
    with_it = HybridRecommender(lean.items, lean.hybrid, base=whole.base)
    with_it.add_items([NEW])
    assert shares_of(with_it, HISTORY)["new1"]["text"] != 0


# ---------------------------------------------------------------------- another index


def test_another_index_gives_the_same_lists(whole) -> None:
    lean = whole.without("laser")
    for recommender in (whole, lean):
        before = recommender.recommend(ASKED, k=12)
        recommender.use_index(CHUNKED)
        same_lists(recommender.recommend(ASKED, k=12), before, 1e-6)
    assert whole.index.item_chunk_size == whole.by_hybrid.index.index.item_chunk_size == 4
    assert lean.index.index.item_chunk_size == 4
    same_lists(whole.recommend([HISTORY], parts="laser"), whole.recommend([HISTORY], parts="laser"))


def test_a_graph_gives_the_same_lists(trained, text_of) -> None:
    pytest.importorskip("faiss")
    whole = another(trained.recommender, text=text_of("vectors"))
    more = [{"item_id": f"n{n}", "title": f"Thing {n * n} of {n}"} for n in range(60)]
    whole.add_items(more)
    lean = whole.without("laser")
    asked = [*ASKED, ["n7", "n8"]]
    for recommender in (whole, lean):
        before = recommender.recommend(asked, explain=True)
        recommender.use_index(partial(FaissIndex, efSearch=200))
        found = recommender.recommend(asked, explain=True)
        if recommender is whole:  # without laser the new items are all alike, and a graph may take any of them
            same_lists(found, before, 1e-6)
        assert [[entry[1] for entry in row] for row in found] == [
            pytest.approx([entry[1] for entry in row], abs=1e-6) for row in before
        ]
    assert isinstance(whole.index, FaissIndex) and isinstance(whole.by_hybrid.index.index, FaissIndex)


def test_another_index_survives_new_items(loaded) -> None:
    loaded.use_index(CHUNKED)
    lean = loaded.without("laser")
    lean.use_index(CHUNKED)
    for recommender, index in ((loaded, lambda: loaded.by_hybrid.index.index), (lean, lambda: lean.index.index)):
        recommender.add_items([NEW])
        assert len(index()) == 13 and index().item_chunk_size == 4
        check_lists(recommender.recommend(ASKED, k=100, filter_seen=False), plain(recommender, ASKED))
    assert loaded.index.item_chunk_size == 4 and len(loaded.index) == 13


def test_an_index_that_cannot_be_made_changes_nothing(loaded) -> None:
    def only_the_table(embeddings: torch.Tensor) -> ExactIndex:
        return ExactIndex(embeddings, chunk_size=1 if embeddings.shape[1] == 32 else 0)

    lean = loaded.without("laser")
    for recommender in (loaded, lean):
        before, index = recommender.recommend(ASKED), recommender.index
        for make_index in (partial(ExactIndex, chunk_size=0), only_the_table):
            with pytest.raises(ConfigurationError, match="chunk_size must be at least 1, got 0"):
                recommender.use_index(make_index)
            assert recommender.index is index and recommender.recommend(ASKED) == before
        recommender.add_items([NEW])  # the index in use is made anew
        assert len(recommender.items) == 13


# ---------------------------------------------------------------------- folders without a hybrid


def test_a_folder_without_a_hybrid_ranks_by_the_adapter(trained, tmp_path) -> None:
    another(trained.recommender, hybrid=False).save_pretrained(tmp_path)
    assert not (tmp_path / "hybrid").exists()
    loaded = load(tmp_path, trained)
    assert loaded.hybrid is None and loaded.by_hybrid is None
    found = loaded.recommend(ASKED, k=12)
    assert found == loaded.recommend(ASKED, k=12, parts="laser")
    assert found == trained.recommender.recommend(ASKED, k=12, parts="laser")
    with pytest.raises(ConfigurationError, match="parts must be 'laser', got 'hybrid'"):
        loaded.recommend(ASKED, parts="hybrid")
    with pytest.raises(ConfigurationError, match="there is no hybrid to leave 'laser' out of"):
        loaded.without("laser")
    with pytest.raises(ArtifactError, match="hybrid/hybrid.json"):
        HybridRecommender.from_pretrained(tmp_path)
    loaded.use_index(CHUNKED)
    loaded.add_items([NEW])
    assert "new1" in ids(loaded.recommend([HISTORY], k=100)[0])


def test_a_save_without_a_hybrid_leaves_none_of_an_earlier_one(trained, copied) -> None:
    """Files of an earlier save may stay, but they are no part of the folder any more."""
    another(trained.recommender, hybrid=False).save_pretrained(copied)
    loaded = load(copied, trained)
    assert loaded.hybrid is None
    assert loaded.recommend(ASKED) == trained.recommender.recommend(ASKED, parts="laser")


# ---------------------------------------------------------------------- damaged folders

FILES = ["hybrid/hybrid.json", "hybrid/hybrid.safetensors"]
SEQUENCE_FILES = ["hybrid/sequence/config.json", "hybrid/sequence/model.safetensors"]


def loaders(folder: Path, trained) -> list[Callable[[], Any]]:
    return [lambda: load(folder, trained), lambda: HybridRecommender.from_pretrained(folder)]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_truncated_or_changed_file_is_named(trained, copied, name: str) -> None:
    content = (copied / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (copied / name).write_bytes(damaged)
        for attempt in loaders(copied, trained):
            with pytest.raises(ArtifactError, match=rf"1 files are not the ones .* first {name}; .* download or save"):
                attempt()
    (copied / name).unlink()
    for attempt in loaders(copied, trained):
        with pytest.raises(ArtifactError, match=rf"1 files are missing, first {name}; .* repeat it"):
            attempt()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_under_a_fresh_manifest_is_still_refused(trained, copied, sign, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: len(content) // 2])
    sign(copied)
    for attempt in loaders(copied, trained):
        with pytest.raises(ArtifactError, match="the hybrid in hybrid cannot be read .*; save it again"):
            attempt()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_manifest_leaves_out_is_named(trained, copied, sign, name: str) -> None:
    (copied / name).unlink()
    sign(copied)
    with pytest.raises(ArtifactError, match=f"manifest.json must list every file of the folder, .*{name}"):
        HybridRecommender.from_pretrained(copied)
    if name != "hybrid/hybrid.json":  # without it there is no hybrid
        with pytest.raises(ArtifactError, match="hybrid"):
            load(copied, trained)


def test_a_hybrid_that_the_manifest_does_not_know_is_not_used(trained, copied) -> None:
    """Else somebody's own weights would rank, which nothing has checked."""
    edit(copied / "hybrid/hybrid.json", weights={"popularity": -100.0}, weights_without_laser=None, sequence=None)
    manifest = json.loads((copied / "manifest.json").read_text())
    listed = {name: digest for name, digest in manifest["sha256"].items() if not name.startswith("hybrid/")}
    (copied / "manifest.json").write_text(json.dumps({"sha256": listed}))
    try:
        found = load(copied, trained).hybrid
    except ArtifactError:
        found = None
    assert found is None
    with pytest.raises(ArtifactError, match="manifest.json must list every file of the folder"):
        HybridRecommender.from_pretrained(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": None}, "the hybrid in hybrid cannot be read"),
        ({"weights": {"popularity": "much"}}, "the hybrid in hybrid cannot be read"),
        ({"parts": ["popularity", "of-somebody-else"]}, "of parts that are registered .*of-somebody-else"),
        ({"format_version": 99}, "format_version"),
    ],
)
def test_settings_of_another_kind(trained, copied, sign, changes: dict[str, Any], message: str) -> None:
    edit(copied / "hybrid/hybrid.json", **changes)
    sign(copied)
    for attempt in loaders(copied, trained):
        with pytest.raises(ArtifactError, match=message):
            attempt()


def test_a_hybrid_of_another_catalog(trained, copied, sign) -> None:
    path = copied / "hybrid/hybrid.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "counts": tensors["counts"][:-1].contiguous()}, path)
    sign(copied)
    for attempt in loaders(copied, trained):
        with pytest.raises(ArtifactError, match=r"must be of 12 items .*, got \[11\] items"):
            attempt()


def test_a_damaged_catalog_is_an_error_of_the_folder(trained, copied, sign) -> None:
    path = copied / "catalog/items.jsonl"
    path.write_text(path.read_text()[:-9])
    sign(copied)
    for attempt in loaders(copied, trained):
        with pytest.raises(ArtifactError, match="items.jsonl"):
            attempt()


def test_a_card_may_be_edited(trained, copied) -> None:
    (copied / "README.md").write_text("My own words.")
    assert HybridRecommender.from_pretrained(copied).recommend(ASKED) == trained.recommender.without("laser").recommend(
        ASKED
    )


# ---------------------------------------------------------------------- an ID recommender of the hybrid's own


@pytest.fixture(scope="module")
def apart(trained, tiny_config, tiny_arguments, tmp_path_factory) -> tuple[LaserRecommender, Path]:
    """Return what a run leaves whose prefix reads no ID recommender, but whose hybrid does."""
    folder = tmp_path_factory.mktemp("apart") / "output"
    config = replace(tiny_config, prefix_encoder="static")
    arguments = tiny_arguments(folder, stage2_epochs=0)
    return fit(trained.data, base_model=trained.base_folder, config=config, arguments=arguments), folder


def test_the_hybrids_own_recommender_is_saved_with_it(apart, trained) -> None:
    made, folder = apart
    assert made.id_recommender is None and made.settings.recommender_hash is None
    assert made.hybrid.weights["sequence"] and made.hybrid.sources.sequence.recommender_type == "sasrec"
    assert not (folder / "recommender").exists()
    listed = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert {*FILES, *SEQUENCE_FILES} <= listed.keys()
    loaded, lean = load(folder, trained), HybridRecommender.from_pretrained(folder)
    assert loaded.id_recommender is None
    assert loaded.hybrid.sources.sequence.content_hash() == made.hybrid.settings()["sequence"]
    check_lists(loaded.recommend(ASKED, k=12, filter_seen=False), plain(made, ASKED))
    assert loaded.recommend(ASKED, explain=True) == made.recommend(ASKED, explain=True)
    assert lean.recommend(ASKED, explain=True) == made.without("laser").recommend(ASKED, explain=True)
    assert lean.recommend(ASKED, explain=True)[0][0][2].keys() >= {"sequence"}


def test_it_is_saved_again(apart, trained, tmp_path) -> None:
    _, folder = apart
    loaded = load(folder, trained)
    loaded.add_items([NEW])
    loaded.save_pretrained(tmp_path)
    again = load(tmp_path, trained)
    assert again.recommend(ASKED, k=13) == loaded.recommend(ASKED, k=13)
    assert (tmp_path / SEQUENCE_FILES[0]).is_file()


@pytest.mark.parametrize("name", SEQUENCE_FILES)
def test_its_files_are_checked(apart, trained, tmp_path, sign, name: str) -> None:
    folder = Path(shutil.copytree(apart[1], tmp_path / "copy"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    for attempt in loaders(folder, trained):
        with pytest.raises(ArtifactError, match=rf"1 files are not the ones .* first {name}; .* download or save"):
            attempt()
    sign(folder)
    for attempt in loaders(folder, trained):
        with pytest.raises(ArtifactError, match=Path(name).name):
            attempt()
    (folder / name).unlink()
    for attempt in loaders(folder, trained):
        with pytest.raises(ArtifactError, match=rf"1 files are missing, first {name}; .* repeat it"):
            attempt()
    sign(folder)
    for attempt in loaders(folder, trained):
        with pytest.raises(ArtifactError):
            attempt()


def test_another_recommender_in_its_place(apart, trained, copied, tmp_path, sign) -> None:
    folder = Path(shutil.copytree(apart[1], tmp_path / "apart"))
    shutil.rmtree(folder / "hybrid/sequence")
    build_recommender("sasrec", 12, seed=5).save_pretrained(folder / "hybrid/sequence")
    sign(folder)
    for attempt in loaders(folder, trained):
        with pytest.raises(ArtifactError, match="the ID recommender is not the one that the hybrid was fitted with"):
            attempt()
    shutil.rmtree(folder / "hybrid/sequence")  # and none at all
    sign(folder)
    for attempt in loaders(folder, trained):
        with pytest.raises(ArtifactError):
            attempt()


def test_saves_over_one_another_leave_folders_that_load(apart, trained, loaded, tmp_path) -> None:
    """With an ID recommender of the hybrid's own first, then with one that the prefix reads, and back."""
    made, _ = apart
    sources = replace(made.hybrid.sources, sequence=build_recommender("sasrec", 12, seed=5).eval())
    parts = [PARTS[name].fit(sources) for name in ("popularity", "sequence", "laser")]
    weights = {"popularity": 1.0, "sequence": 3.0}
    own = LaserRecommender(
        made.base,
        made.model,
        made.items,
        made.table,
        made.template,
        None,
        made.settings,
        "cpu",
        Hybrid(parts, {**weights, "laser": 0.1}, sources, weights),
    )
    for recommender in (own, loaded, own):
        recommender.save_pretrained(tmp_path)
        again = load(tmp_path, trained)
        assert again.recommend(ASKED) == recommender.recommend(ASKED)
        lean = HybridRecommender.from_pretrained(tmp_path)
        assert lean.recommend(ASKED) == recommender.without("laser").recommend(ASKED)
