"""Every part's features against its formula in loops, over histories laid out in every way."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_bituning.data import ItemCatalog, LeaveOneOut
from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import BERT4Rec, IDRecommender, Precomputed, build_recommender
from peft_bituning.recommenders.histories import Histories
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid.part import PARTS, Part, phi

NAMES = ("sequence", "item_knn", "popularity", "seen", "last", "laser")
NEUTRAL = ("sequence", "item_knn", "popularity")  # where nobody bought an item
names = pytest.mark.parametrize("name", NAMES)


def fitted(name: str, sources: Sources) -> Part:
    """Return a part that is there."""
    part = PARTS[name].fit(sources)
    assert part is not None
    return part


def expected(reference: Any, name: str, histories: Sequence[Sequence[int]]) -> np.ndarray:
    """Return a feature by its formula, `[B, I]`."""
    return np.stack([reference.features(history)[name] for history in histories])


@pytest.fixture(scope="module")
def parts(sources: Sources) -> dict[str, Part]:
    return {name: fitted(name, sources) for name in NAMES}


@names
def test_phi_is_its_formula(
    name: str,
    parts: dict[str, Part],
    reference: dict[str, Any],
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    found = phi(parts[name], Histories(*scattered(asked), 30))
    assert found.shape == (len(asked), 30, 1) and found.dtype == torch.float32
    assert parts[name].features == (name,) and parts[name].name == name
    assert np.allclose(found[:, :, 0].numpy(), expected(reference["tf-idf"], name, asked), rtol=1e-5, atol=2e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 29), max_size=9), min_size=1, max_size=4), st.integers(0, 2**32))
def test_phi_is_its_formula_for_any_history(
    parts: dict[str, Part],
    reference: dict[str, Any],
    scattered: Callable[..., tuple[Tensor, Tensor]],
    histories: list[list[int]],
    seed: int,
) -> None:
    read = Histories(*scattered(histories, seed), 30)
    for name, part in parts.items():
        formula = expected(reference["tf-idf"], name, histories)
        assert np.allclose(phi(part, read)[:, :, 0].numpy(), formula, rtol=1e-5, atol=2e-5), name


@names
def test_padding_at_the_left_and_unknown_items_make_no_difference(
    name: str, parts: dict[str, Part], asked: list[list[int]], scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """At the left, at the right, between, and unknown items with a true mask: the same features."""
    width = max(map(len, asked)) + 2
    left, mask = torch.full((len(asked), width), 7), torch.zeros(len(asked), width)
    for row, history in enumerate(asked):
        left[row, width - len(history) :] = torch.tensor(history, dtype=torch.long)
        mask[row, width - len(history) :] = 1
    features = phi(parts[name], Histories(left, mask, 30))
    for item_indices, other in [(left.masked_fill(mask == 0, 999), torch.ones_like(mask)), scattered(asked, 3)]:
        assert torch.allclose(phi(parts[name], Histories(item_indices, other, 30)), features, atol=1e-5)


@pytest.mark.parametrize("name", NEUTRAL)
def test_items_that_nobody_bought_are_neutral(
    name: str,
    parts: dict[str, Part],
    sources: Sources,
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    found = phi(parts[name], Histories(*scattered(asked), 30))[:, :, 0]
    never = [item for item in range(30) if not sources.counts[item]]
    assert {27, 28, 29} <= set(never)
    assert (found[:, never] == 0).all()
    assert found.any()


@pytest.mark.parametrize("name", NEUTRAL)
def test_without_any_event_everything_is_neutral(
    name: str, sources: Sources, scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    nothing = Sources(sources.items, torch.zeros(30), [[], []], sources.sequence)
    assert not phi(fitted(name, nothing), Histories(*scattered([[1, 2], []]), 30)).any()


def test_the_mean_over_bought_items_is_zero(
    parts: dict[str, Part], sources: Sources, asked: list[list[int]], scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    bought = sources.counts > 0
    for name in ("sequence", "popularity"):
        features = phi(parts[name], Histories(*scattered(asked), 30))[:, bought, 0]
        assert torch.allclose(features.mean(1), torch.zeros(len(asked)), atol=1e-5)


@names
def test_no_rows(name: str, parts: dict[str, Part]) -> None:
    nothing = torch.zeros(0, 4, dtype=torch.long)
    if name == "laser":
        assert parts[name].queries(Histories(nothing, nothing, 30)).shape[:2] == (1, 0)
    else:
        assert phi(parts[name], Histories(nothing, nothing, 30)).shape == (0, 30, 1)


@pytest.mark.parametrize("kind", ["bert4rec", "precomputed"])
def test_sequence_of_other_recommenders(
    kind: str,
    sources: Sources,
    split: LeaveOneOut,
    make_reference: Any,
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """BERT4Rec adds a bias to the items, and its scores are not 0 for an empty history."""
    sequence: IDRecommender = Precomputed(np.random.default_rng(0).normal(size=(30, 4)))
    if kind == "bert4rec":
        sequence = build_recommender(kind, 30, hidden_size=8, max_history_length=6, initializer_range=0.5)
        assert isinstance(sequence, BERT4Rec)
        with torch.no_grad():
            sequence.item_bias.copy_(torch.randn(30, generator=torch.Generator().manual_seed(0)))
    given = Sources(sources.items, sources.counts, sources.sequences, sequence)
    reference = make_reference(sources.items, split.train_sequences, sequence)
    found = phi(fitted("sequence", given), Histories(*scattered(asked), 30))[:, :, 0].numpy()
    assert np.allclose(found, expected(reference, "sequence", asked), rtol=1e-5, atol=1e-5)
    assert found[0].any() == (kind == "bert4rec")  # the empty history


def test_sequence_differs_from_a_log_softmax_by_one_number_a_row(
    parts: dict[str, Part], sources: Sources, asked: list[list[int]], scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    batch = scattered(asked)
    bought = sources.counts > 0
    found = phi(parts["sequence"], Histories(*batch, 30))[:, bought, 0]
    assert sources.sequence is not None
    logs = sources.sequence.scores(*batch).log_softmax(1)[:, bought]
    assert torch.allclose(logs - logs[:, :1], found - found[:, :1], atol=1e-4)


def test_laser_reads_embeddings_at_hand(
    parts: dict[str, Part], laser: Any, asked: list[list[int]], scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    users = torch.nn.functional.normalize(torch.randn(len(asked), 8, generator=torch.Generator().manual_seed(0)), dim=1)
    found = phi(parts["laser"], Histories(*scattered(asked), 30, users))[:, :, 0]
    for row in range(len(asked)):
        for item in range(30):
            cosine = float(users[row].double() @ laser.item_embeddings[item].double())
            assert float(found[row, item]) == pytest.approx(cosine / 0.05, abs=1e-4)


def test_which_parts_count_and_need_a_source(sources: Sources, items: ItemCatalog) -> None:
    assert {name for name, part in PARTS.items() if part.counts} == set(NEUTRAL)
    bare = Sources(items, sources.counts, sources.sequences)
    assert all(PARTS[name].fit(bare) is None for name in ("sequence", "laser", "text"))
    with pytest.raises(ConfigurationError, match="item_knn counts in sequences"):
        PARTS["item_knn"].fit(Sources(items, sources.counts))
    for name in ("sequence", "laser"):
        with pytest.raises(ConfigurationError, match=f"part {name} needs its source"):
            PARTS[name].load({}, bare)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_again_from_tensors(
    name: str,
    parts: dict[str, Part],
    sources: Sources,
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Loading has no sequences of events, and gives the same bits."""
    saved = Sources(sources.items, sources.counts, None, sources.sequence, sources.laser, sources.text)
    again = PARTS[name].load(parts[name].tensors(), saved)
    histories = Histories(*scattered(asked), 30)
    assert torch.equal(phi(again, histories), phi(parts[name], histories))


@pytest.mark.parametrize("name", ["sequence", "item_knn", "popularity", "seen", "last"])
def test_new_items_change_nothing_of_the_others(
    name: str,
    parts: dict[str, Part],
    sources: Sources,
    asked: list[list[int]],
    scattered: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    grown_items = ItemCatalog((*sources.items.item_ids, "new", "newer"), (*sources.items.attributes, {}, {}))
    counts = torch.cat([sources.counts, torch.zeros(2)])
    grown = parts[name].extended(Sources(grown_items, counts, None, sources.sequence), 30)
    item_indices, mask = scattered(asked)
    before, after = (phi(part, Histories(item_indices, mask, n)) for part, n in ((parts[name], 30), (grown, 32)))
    assert torch.allclose(after[:, :30], before, atol=1e-6)
    assert not after[:, 30:].any()


def test_new_items_in_a_history(
    parts: dict[str, Part], sources: Sources, scattered: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """They are near to none, but it is later since the others; SASRec does not see them; they are seen and last."""
    grown_items = ItemCatalog((*sources.items.item_ids, "new", "newer"), (*sources.items.attributes, {}, {}))
    grown_sources = Sources(grown_items, torch.cat([sources.counts, torch.zeros(2)]), None, sources.sequence)

    def features(name: str, history: list[int]) -> Tensor:
        batch = scattered([history])
        return phi(parts[name].extended(grown_sources, 30), Histories(*batch, 32))[0, :, 0]

    assert torch.allclose(features("sequence", [3, 31, 5, 30]), features("sequence", [3, 5]), atol=1e-5)
    assert torch.allclose(features("item_knn", [5, 30]), features("item_knn", [5]), atol=1e-6)  # sd scales alike
    assert features("seen", [3, 31, 3]).nonzero()[:, 0].tolist() == [3, 31]
    assert features("last", [3, 31]).nonzero()[:, 0].tolist() == [31]
