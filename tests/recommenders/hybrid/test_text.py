"""The part `text` against cosines in loops: tf-idf by hand, vectors whitened by singular values; new items."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_bituning.data import ItemCatalog, LeaveOneOut
from peft_bituning.errors import ArtifactError, ConfigurationError, InputError
from peft_bituning.recommenders.histories import Histories
from peft_bituning.recommenders.hybrid import Sources, TextVectors, tfidf
from peft_bituning.recommenders.hybrid.part import PARTS, Part, phi
from peft_bituning.recommenders.hybrid.tfidf import texts_of, tfidf_neighbors

NEW: tuple[dict[str, str], ...] = (
    {"title": "Brass LAMP lamp", "brand": "Acme"},
    {"title": "oak chair of quux", "size": "large"},
    {},
    {"title": "quux"},
)
FEATURES = ("text", "text_last", "text_seen", "text_last_seen")
texts = pytest.mark.parametrize("text", ["tf-idf", "vectors"])


def expected(reference: Any, histories: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the four features by their formulas, `[B, I, 4]`."""
    rows = [reference.features(history) for history in histories]
    return np.stack([np.stack([row[name] for name in FEATURES], axis=1) for row in rows])


def grown(items: ItemCatalog) -> ItemCatalog:
    """Return the catalog with four items at its end."""
    return ItemCatalog((*items.item_ids, *(f"new{number}" for number in range(len(NEW)))), (*items.attributes, *NEW))


@pytest.fixture(scope="module")
def parts(with_text: Callable[[str], Sources]) -> dict[str, Part]:
    found = {text: PARTS["text"].fit(with_text(text)) for text in ("tf-idf", "vectors")}
    return {text: part for text, part in found.items() if part is not None}


@texts
def test_phi_is_its_formula(
    text: str,
    parts: dict[str, Part],
    reference: dict[str, Any],
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    assert parts[text].features == FEATURES and parts[text].name == "text" and not parts[text].counts
    found = phi(parts[text], Histories(*scattered(asked), 30)).numpy()
    assert np.allclose(found, expected(reference[text], asked), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(0, 29), max_size=7), min_size=1, max_size=3), st.integers(0, 2**32))
def test_phi_is_its_formula_for_any_history(
    parts: dict[str, Part],
    reference: dict[str, Any],
    scattered: Callable[..., tuple[Tensor, Tensor]],
    histories: list[list[int]],
    seed: int,
) -> None:
    read = Histories(*scattered(histories, seed), 30)
    for text, part in parts.items():
        assert np.allclose(phi(part, read).numpy(), expected(reference[text], histories), rtol=0, atol=2e-5), text


@texts
def test_an_item_is_most_like_itself_and_one_without_text_like_none(
    text: str, parts: dict[str, Part], scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    found = phi(parts[text], Histories(*scattered([[4], [22], []]), 30))
    assert found[0, 4].tolist() == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert int(found[0, :, 0].argmax()) == 4
    assert not found[1].any() and not found[2].any() and not found[:, 22].any()


def test_words_of_one_item_alone_tell_nothing(
    parts: dict[str, Part], scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    assert not phi(parts["tf-idf"], Histories(*scattered([[26]]), 30)).any()


@texts
def test_no_rows(text: str, parts: dict[str, Part]) -> None:
    nothing = torch.zeros(0, 4, dtype=torch.long)
    assert phi(parts[text], Histories(nothing, nothing, 30)).shape == (0, 30, 4)


def test_texts_begin_with_the_title() -> None:
    catalog = ItemCatalog(
        ("a", "b", "c", "d"), ({"brand": "Acme", "title": "A lamp", "size": "2"}, {"brand": "Bolt"}, {}, {"title": "T"})
    )
    assert texts_of(catalog) == ["A lamp; Acme; 2", "Bolt", "", "T"]
    assert texts_of(catalog, 2) == ["", "T"]


def test_only_the_nearest_are_kept(
    monkeypatch: pytest.MonkeyPatch, items: ItemCatalog, reference: dict[str, Any], with_text: Callable[[str], Sources]
) -> None:
    monkeypatch.setattr(tfidf, "NEIGHBORS", 4)
    part = PARTS["text"].fit(with_text("tf-idf"))
    assert part is not None
    for item in range(30):
        found = phi(part, Histories(torch.tensor([[item]]), torch.ones(1, 1), 30))[0, :, 0].numpy()
        cosines = np.array([reference["tf-idf"].word_cosine(item, other) for other in range(30)])
        near = found > 0
        assert near.sum() == min(4, (cosines > 0).sum())
        assert np.allclose(found[near], cosines[near], atol=1e-6)
        if near.any():
            assert cosines[~near].max() <= cosines[near].min() + 1e-6


@pytest.mark.parametrize("titles", [["one", "two", "three"], ["", "", ""], ["a", "b", "a"], ["one"]])
def test_a_catalog_without_common_words(titles: list[str], scattered: Callable[..., tuple[Tensor, Tensor]]) -> None:
    catalog = ItemCatalog(tuple(map(str, range(len(titles)))), tuple({"title": title} for title in titles))
    part = PARTS["text"].fit(Sources(catalog, torch.zeros(len(titles)), text="tf-idf"))
    assert part is not None
    histories = Histories(*scattered([[0], []]), len(titles))
    assert phi(part, histories).shape == (2, len(titles), 4) and not phi(part, histories).any()


@texts
def test_loaded_again_from_tensors(
    text: str,
    parts: dict[str, Part],
    with_text: Callable[[str], Sources],
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    again = PARTS["text"].load(parts[text].tensors(), with_text("tf-idf"))
    histories = Histories(*scattered(asked), 30)
    assert torch.equal(phi(again, histories), phi(parts[text], histories)) and again.features == FEATURES


@texts
def test_tensors_of_another_catalog_or_too_few_are_refused(
    text: str, parts: dict[str, Part], with_text: Callable[[str], Sources], items: ItemCatalog
) -> None:
    tensors = parts[text].tensors()
    with pytest.raises(ArtifactError, match="save the folder again"):
        PARTS["text"].load(tensors, Sources(grown(items), torch.zeros(34)))
    for name in tensors:
        with pytest.raises(ArtifactError, match="save the folder again"):
            PARTS["text"].load({key: tensors[key] for key in tensors if key != name}, with_text("tf-idf"))


def test_what_is_no_text_is_refused(sources: Sources, items: ItemCatalog, vectors: np.ndarray) -> None:
    def fit(text: Any) -> Part | None:
        return PARTS["text"].fit(Sources(items, sources.counts, text=text))

    assert fit(None) is None
    with pytest.raises(ConfigurationError, match="'poems'"):
        fit("poems")
    with pytest.raises(ConfigurationError, match="must have 30 vectors, one per item, got 29"):
        fit(TextVectors("short", vectors[1:]))
    with pytest.raises(InputError, match=r"of shape \[items, width\], got \[30\]"):
        fit(TextVectors("flat", vectors[:, 0]))
    with pytest.raises(InputError, match="must be finite"):
        fit(TextVectors("broken", np.where(vectors > 2, np.nan, vectors)))


# ---------------------------------------------------------------------- new items


@pytest.mark.parametrize("steps", [(34,), (31, 34)])
def test_new_items_by_words(
    steps: tuple[int, ...],
    parts: dict[str, Part],
    split: LeaveOneOut,
    items: ItemCatalog,
    make_reference: Any,
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Added at once or one after the other: words are weighed by the first catalog, and likeness goes both ways."""
    everything, part, known = grown(items), parts["tf-idf"], 30
    for number in steps:
        catalog = ItemCatalog(everything.item_ids[:number], everything.attributes[:number])
        part, known = part.extended(Sources(catalog, torch.zeros(number), text="tf-idf"), known), number
    histories = [*asked, [30], [31, 4], [1, 32], [33], [30, 31, 30, 2]]
    formula = expected(make_reference(everything, split.train_sequences, num_known=30), histories)
    found = phi(part, Histories(*scattered(histories), 34)).numpy()
    assert np.allclose(found, formula, rtol=0, atol=2e-5)
    assert np.allclose(found[: len(asked), :30], phi(parts["tf-idf"], Histories(*scattered(asked), 30)), atol=1e-6)
    assert formula[len(asked), 0, 0] > 0.5  # "Brass LAMP lamp" is like "brass lamp"
    assert not found[:, 32:].any()  # no word that the others have
    again = PARTS["text"].load(part.tensors(), Sources(everything, torch.zeros(34)))
    assert np.array_equal(phi(again, Histories(*scattered(histories), 34)).numpy(), found)


def test_new_items_take_the_place_of_farther_ones(
    monkeypatch: pytest.MonkeyPatch, items: ItemCatalog, make_reference: Any, split: LeaveOneOut
) -> None:
    monkeypatch.setattr(tfidf, "NEIGHBORS", 3)
    everything = grown(items)
    reference = make_reference(everything, split.train_sequences, num_known=30)
    part = PARTS["text"].fit(Sources(items, torch.zeros(30), text="tf-idf"))
    assert part is not None
    other = part.extended(Sources(everything, torch.zeros(34), text="tf-idf"), 30)

    def near(part: Part, item: int, num_items: int) -> dict[int, float]:
        row = phi(part, Histories(torch.tensor([[item]]), torch.ones(1, 1), num_items))[0, :, 0]
        return {int(place): float(row[place]) for place in row.nonzero()[:, 0]}

    displaced = 0
    for item in range(34):
        after = near(other, item, 34)
        assert len(after) <= 3
        for place, value in after.items():
            assert value == pytest.approx(reference.word_cosine(item, place), abs=1e-6)
        if item >= 30:
            continue
        before = near(part, item, 30)
        come, gone = set(after) - set(before), set(before) - set(after)
        assert come <= set(range(30, 34)) and {place: after[place] for place in after if place < 30}.items() <= (
            before.items()
        )
        if gone:
            displaced += 1
            assert max(before[place] for place in gone) < min(after[place] for place in come)
    assert displaced


@pytest.mark.parametrize("given", [True, False])
def test_new_items_by_vectors(
    given: bool,
    parts: dict[str, Part],
    split: LeaveOneOut,
    items: ItemCatalog,
    vectors: np.ndarray,
    make_reference: Any,
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Whitened as the others were; without vectors, or with zeros, they are like none."""
    new = np.random.default_rng(9).normal(size=(4, 6)).astype(np.float32) * 3
    new[2] = 0.0
    new = new if given else np.zeros_like(new)
    sources = Sources(grown(items), torch.zeros(34), text=TextVectors("made up", new) if given else None)
    part = parts["vectors"].extended(sources, 30)
    histories = [*asked, [30], [31, 4], [1, 32], [33, 30]]
    reference = make_reference(
        grown(items), split.train_sequences, vectors=np.concatenate([vectors, new]), num_known=30
    )
    found = phi(part, Histories(*scattered(histories), 34)).numpy()
    assert np.allclose(found, expected(reference, histories), rtol=0, atol=5e-5)
    assert found[:, 30].any() == given
    again = PARTS["text"].load(part.tensors(), Sources(grown(items), torch.zeros(34)))
    assert np.array_equal(phi(again, Histories(*scattered(histories), 34)).numpy(), found)


def test_new_vectors_of_another_width_are_refused(parts: dict[str, Part], items: ItemCatalog) -> None:
    with pytest.raises(InputError, match=r"must be \[items, 6\], got \[4, 5\]"):
        parts["vectors"].extended(
            Sources(grown(items), torch.zeros(34), text=TextVectors("made up", np.ones((4, 5)))), 30
        )


def test_neighbors_of_the_last_items_alone(items: ItemCatalog, make_reference: Any) -> None:
    everything = grown(items)
    lists = tfidf_neighbors(everything, 30, 30)
    reference = make_reference(everything, [[0]], num_known=30)
    assert len(lists) == 4
    for row in range(4):
        cosines = np.array([reference.word_cosine(30 + row, other) for other in range(34)])
        values = np.zeros(34)
        real = lists.similarities[row] > 0
        values[lists.items[row][real]] = lists.similarities[row][real]
        assert np.allclose(values, cosines, atol=1e-6)
    assert lists.items[0, 0] == 30 and lists.similarities[0, 0] == pytest.approx(1)
