"""What users choose among: the whole of a small catalog, or enough of a larger one; features by their formulas."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peft_bituning.data import LeaveOneOut, Sample
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid import choices as module
from peft_bituning.recommenders.hybrid.choices import draw_choices
from peft_bituning.recommenders.hybrid.part import PARTS, Part
from peft_bituning.recommenders.hybrid.weights import Choices

SHARED = 10  # items drawn of the catalog's 30
texts = pytest.mark.parametrize("text", ["tf-idf", "vectors"])


@pytest.fixture(scope="module")
def parts(with_text: Callable[[str], Sources]) -> dict[str, list[Part]]:
    """Return all parts, by kind of texts."""
    found: dict[str, list[Part]] = {}
    for text in ("tf-idf", "vectors"):
        fitted = [PARTS[name].fit(with_text(text)) for name in PARTS]
        found[text] = [part for part in fitted if part is not None]
    assert all(len(each) == 7 for each in found.values())
    return found


@pytest.fixture(scope="module")
def samples(split: LeaveOneOut) -> list[Sample]:
    """Return 120 samples, more than are read at once, in an order in which histories differ in length."""
    return [sample for pair in zip(split.samples("valid"), split.samples("test"), strict=True) for sample in pair]


@pytest.fixture(scope="module")
def formulas(reference: dict[str, Any], samples: list[Sample]) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return every feature of every sample by its formula, by kind of texts."""
    return {text: [each.features(sample.history) for sample in samples] for text, each in reference.items()}


def real_items(choices: Choices, row: int) -> list[int]:
    """Return which items a user chooses among where items are drawn."""
    assert choices.items is not None
    return choices.items[row][choices.offsets[row] > -np.inf].tolist()


@texts
def test_a_small_catalog_is_chosen_among_as_a_whole(
    text: str, parts: dict[str, list[Part]], samples: list[Sample], formulas: dict[str, Any], sources: Sources
) -> None:
    choices = draw_choices(parts[text], samples, sources.counts)
    names = [name for part in parts[text] for name in part.features]
    assert choices.features.shape == (120, 10, 30) and choices.features.dtype == torch.float32
    assert choices.offsets.shape == (120, 30) and not choices.offsets.any()
    assert choices.chosen.tolist() == [sample.target for sample in samples] and choices.items is None
    for row, features in enumerate(formulas[text]):
        for place, name in enumerate(names):
            found = choices.features[row, place].numpy()
            assert np.allclose(found, features[name], rtol=1e-5, atol=2e-5), (row, name)


def test_as_many_items_as_the_catalog_has_are_all(
    parts: dict[str, list[Part]], samples: list[Sample], sources: Sources
) -> None:
    whole, same = (draw_choices(parts["tf-idf"], samples, sources.counts, max_items=n) for n in (1 << 14, 30))
    assert torch.equal(whole.features, same.features)
    assert draw_choices(parts["tf-idf"], samples, sources.counts, max_items=29).items is not None


@texts
def test_a_larger_catalog_is_drawn_from(
    text: str, parts: dict[str, list[Part]], samples: list[Sample], formulas: dict[str, Any], sources: Sources
) -> None:
    choices = draw_choices(parts[text], samples, sources.counts, max_items=SHARED)
    width = SHARED + 1 + module.MAX_OWN
    names = [name for part in parts[text] for name in part.features]
    sparse = [name for part in parts[text] for name in part.sparse]
    assert choices.features.shape == (120, 10, width) and choices.offsets.shape == (120, width)
    assert choices.items is not None and choices.items.shape == (120, width)
    assert not choices.chosen.any() and choices.items[:, 0].tolist() == [sample.target for sample in samples]
    assert not choices.offsets[:, 0].any()
    popular = sorted(range(30), key=lambda item: (-float(sources.counts[item]), item))[: SHARED // 2]
    for row, features in enumerate(formulas[text]):
        columns = (choices.offsets[row] > -np.inf).nonzero()[:, 0]
        items = choices.items[row, columns].tolist()
        assert len(set(items)) == len(items)
        offsets = dict(zip(items, choices.offsets[row, columns].tolist(), strict=True))
        own = set(np.flatnonzero(np.any([np.abs(features[name]) > 1e-9 for name in sparse], axis=0)).tolist())
        assert set(popular) | own <= set(items)
        for item, offset in offsets.items():  # 25 others, of which 5 are drawn
            certain = item in popular or item in own or item == samples[row].target
            assert offset == pytest.approx(0.0 if certain else np.log(25 / 5), abs=1e-6)
        for place, name in enumerate(names):
            found = choices.features[row, place, columns].numpy()
            assert np.allclose(found, features[name][items], rtol=1e-5, atol=2e-5), (row, name)


def test_offsets_stand_for_the_whole_catalog(
    parts: dict[str, list[Part]], samples: list[Sample], sources: Sources
) -> None:
    """On average over draws a user chooses among as many items as there are."""
    for chosen in (["popularity", "seen"], ["laser"]):
        some = [part for part in parts["tf-idf"] if part.name in chosen]
        sums = [
            draw_choices(some, samples[:30], sources.counts, seed, max_items=SHARED).offsets.exp().sum(1)
            for seed in range(40)
        ]
        assert float(torch.cat(sums).mean()) == pytest.approx(30, rel=0.05)


def test_every_other_item_is_drawn_as_often(sources: Sources, samples: list[Sample]) -> None:
    times = np.zeros(30)
    for seed in range(200):
        choices = draw_choices([], samples[:1], sources.counts, seed, max_items=SHARED)
        times[real_items(choices, 0)] += 1
    popular = np.argsort(-sources.counts.numpy(), kind="stable")[: SHARED // 2]
    certain = np.isin(np.arange(30), [*popular, samples[0].target])
    assert (times[certain] == 200).all()
    assert np.abs(times[~certain] - 200 * 5 / 25).max() < 4 * np.sqrt(200 * 0.2 * 0.8)


@pytest.mark.parametrize("max_items", [1, 2, 29])
def test_few_or_nearly_all_items(
    max_items: int, parts: dict[str, list[Part]], samples: list[Sample], sources: Sources
) -> None:
    choices = draw_choices(parts["vectors"], samples, sources.counts, max_items=max_items)
    for row in range(len(samples)):
        items = real_items(choices, row)
        assert len(set(items)) == len(items) and items[0] == samples[row].target
    assert choices.features.isfinite().all()


def test_many_items_of_ones_own_are_drawn_from(
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, list[Part]],
    samples: list[Sample],
    formulas: dict[str, Any],
    sources: Sources,
) -> None:
    monkeypatch.setattr(module, "MAX_OWN", 4)
    choices = draw_choices(parts["tf-idf"], samples, sources.counts, max_items=SHARED)
    names = [name for part in parts["tf-idf"] for name in part.features]
    assert choices.items is not None and choices.items.shape == (120, SHARED + 1 + 4)
    for row, features in enumerate(formulas["tf-idf"]):
        items = real_items(choices, row)
        assert len(set(items)) == len(items) and items[0] == samples[row].target
        columns = choices.offsets[row] > -np.inf
        expected = np.stack([features[name][items] for name in names])
        assert np.allclose(choices.features[row][:, columns].numpy(), expected, rtol=1e-5, atol=2e-5)


def test_many_users_are_drawn_from(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, list[Part]], samples: list[Sample], sources: Sources
) -> None:
    whole = draw_choices(parts["tf-idf"], samples, sources.counts)
    monkeypatch.setattr(module, "MAX_VALUES", 20 * 10 * 30)
    some = draw_choices(parts["tf-idf"], samples, sources.counts)
    assert some.features.shape == (20, 10, 30)
    rows = [int((whole.features - row).abs().flatten(1).sum(1).argmin()) for row in some.features]
    # the features of two users may be alike only where both have the same history
    assert torch.allclose(whole.features[rows], some.features, atol=1e-5)
    again, other = (draw_choices(parts["tf-idf"], samples, sources.counts, seed) for seed in (0, 1))
    assert torch.equal(some.features, again.features) and torch.equal(some.chosen, again.chosen)
    assert not torch.equal(some.features, other.features)
    monkeypatch.setattr(module, "MAX_VALUES", 1)
    assert len(draw_choices(parts["tf-idf"], samples, sources.counts).chosen) == 1


def test_the_same_seed_gives_the_same_draw(
    parts: dict[str, list[Part]], samples: list[Sample], sources: Sources
) -> None:
    first, second, other = (
        draw_choices(parts["tf-idf"], samples, sources.counts, seed, max_items=SHARED) for seed in (0, 0, 1)
    )
    for name in ("features", "offsets", "chosen", "items"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.offsets, other.offsets) or not torch.equal(first.features, other.features)


def test_a_last_user_alone_is_read_without_a_warning(
    parts: dict[str, list[Part]], samples: list[Sample], sources: Sources
) -> None:
    """Torch warns of this once a process, unless it is told to do so always."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choices = draw_choices(parts["tf-idf"], samples[: module.USERS_AT_ONCE + 1], sources.counts)
    finally:
        torch.set_warn_always(before)
    assert len(choices.chosen) == module.USERS_AT_ONCE + 1


def test_no_parts_and_no_samples(parts: dict[str, list[Part]], samples: list[Sample], sources: Sources) -> None:
    assert draw_choices([], samples, sources.counts).features.shape == (120, 0, 30)
    assert draw_choices(parts["tf-idf"], [], sources.counts).features.shape == (0, 10, 30)
    assert len(draw_choices(parts["tf-idf"], [], sources.counts, max_items=SHARED).chosen) == 0
