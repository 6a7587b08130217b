"""The hybrid's arithmetic against independent numpy: parts, likelihood, weights, files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_bituning.data import ItemCatalog, LeaveOneOut
from peft_bituning.errors import ArtifactError, ConfigurationError
from peft_bituning.metrics import target_ranks
from peft_bituning.recommenders import Hybrid, Precomputed, TextVectors, pad_histories
from peft_bituning.recommenders.histories import Histories
from peft_bituning.recommenders.hybrid import Sources, Whitening, register_part
from peft_bituning.recommenders.hybrid.choices import draw_choices
from peft_bituning.recommenders.hybrid.new_items import fit_new_items
from peft_bituning.recommenders.hybrid.part import PARTS, Part, phi
from peft_bituning.recommenders.hybrid.weights import Choices, fit_supported, fit_weights

WORDS = ["lamp", "brass", "kettle", "steel", "chair", "oak", "rope", "blue"]
ITEMS = ItemCatalog(
    tuple(f"i{item}" for item in range(20)),
    tuple({"title": f"{WORDS[item % 8]} {WORDS[(item * 3 + 1) % 8]}", "brand": WORDS[item % 5]} for item in range(20)),
)
GENERATOR = np.random.default_rng(0)
#: item 19 is bought by nobody
HISTORIES = [GENERATOR.integers(0, 19, GENERATOR.integers(4, 9)).tolist() for _ in range(60)]
ASKED = [[3, 5, 3, 1], [7], [], [19, 2], [0, 1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def split() -> LeaveOneOut:
    return LeaveOneOut(HISTORIES)


@pytest.fixture(scope="module")
def sequence() -> Precomputed:
    return Precomputed(np.random.default_rng(1).normal(size=(20, 6)))


class Adapter:
    """Vectors of length 1 in the place of a trained adapter's."""

    def __init__(self, num_items: int = 20) -> None:
        self.item_embeddings = torch.nn.functional.normalize(torch.randn(num_items, 4, generator=_seeded(2)), dim=1)

    def user_embeddings(self, histories) -> torch.Tensor:
        rows = [self.item_embeddings[row].sum(0) if len(row) else torch.ones(4) for row in histories]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sources(split: LeaveOneOut, sequence: Precomputed, text: object = "tf-idf") -> Sources:
    counts = np.bincount([item for row in split.train_sequences for item in row], minlength=20)
    return Sources(ITEMS, torch.from_numpy(counts).float(), split.train_sequences, sequence, Adapter(), text)


def decays(history: list[int]) -> np.ndarray:
    return 0.7 ** np.arange(len(history))[::-1]


# ---------------------------------------------------------------------- parts


def test_dense_parts_are_their_formulas(split, sequence) -> None:
    given = sources(split, sequence)
    counts, bought = given.counts.numpy(), given.counts.numpy() > 0
    histories = Histories(*pad_histories(ASKED), 20)
    found = {name: phi(PARTS[name].fit(given), histories).numpy() for name in ("sequence", "popularity", "laser")}
    scores = sequence.scores(*pad_histories(ASKED)).numpy()
    for row in range(len(ASKED)):
        expected = np.where(bought, scores[row] - scores[row][bought].mean(), 0.0)
        assert np.allclose(found["sequence"][row, :, 0], expected, atol=1e-5)
        logs = np.log1p(counts)
        assert np.allclose(found["popularity"][row, :, 0], np.where(bought, logs - logs[bought].mean(), 0), atol=1e-6)
    users = given.laser.user_embeddings(ASKED).numpy()
    assert np.allclose(found["laser"][:, :, 0], users @ given.laser.item_embeddings.numpy().T / 0.05, atol=1e-4)
    assert not bought[19] and (found["sequence"][:, 19] == 0).all() and (found["popularity"][:, 19] == 0).all()


def test_seen_and_last(split, sequence) -> None:
    histories = Histories(*pad_histories(ASKED), 20)
    seen, last = (
        phi(PARTS[name].fit(sources(split, sequence)), histories)[:, :, 0].numpy() for name in ("seen", "last")
    )
    for row, history in enumerate(ASKED):
        assert set(np.flatnonzero(seen[row])) == set(history) and set(seen[row]) <= {0.0, 1.0}
        assert np.flatnonzero(last[row]).tolist() == history[-1:]


def test_item_knn(split, sequence) -> None:
    from peft_bituning.recommenders import ItemKNN

    scores = ItemKNN(20).fit(split.train_sequences).scores(*pad_histories(ASKED)).numpy().astype(np.float64)
    found = phi(PARTS["item_knn"].fit(sources(split, sequence)), Histories(*pad_histories(ASKED), 20))[:, :, 0].numpy()
    spread = scores.std(1, keepdims=True)
    expected = np.log1p(0.2 * scores / np.where(spread > 0, spread, 1.0))
    assert np.allclose(found, expected, atol=1e-5)


def test_text_by_tfidf_equals_cosines_of_scikit_learn(split, sequence) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [f"{row['title']}; {row['brand']}" for row in ITEMS.attributes]
    rows = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit_transform(texts).toarray()
    near = rows @ rows.T
    found = phi(PARTS["text"].fit(sources(split, sequence)), Histories(*pad_histories(ASKED), 20)).numpy()
    for row, history in enumerate(ASKED):
        if not history:
            assert not found[row].any()
            continue
        text = decays(history) @ near[history] / decays(history).sum()
        seen = np.isin(np.arange(20), history)
        expected = np.stack([text, near[history[-1]], text * seen, near[history[-1]] * seen], axis=1)
        assert np.allclose(found[row], expected, atol=1e-5)


def test_text_by_vectors(split, sequence) -> None:
    vectors = np.random.default_rng(3).normal(size=(20, 5)).astype(np.float32)
    part = PARTS["text"].fit(sources(split, sequence, TextVectors("mine", vectors)))
    white = Whitening.fit(vectors, 3.0)(vectors)
    found = phi(part, Histories(*pad_histories(ASKED), 20)).numpy()
    for row, history in enumerate(ASKED):
        user = decays(history) @ white[history] if history else np.zeros(white.shape[1])
        user = user / max(np.linalg.norm(user), 1e-12)
        last = white[history[-1]] if history else np.zeros(white.shape[1])
        seen = np.isin(np.arange(20), history)
        expected = np.stack([white @ user, white @ last, white @ user * seen, white @ last * seen], axis=1)
        assert np.allclose(found[row], expected, atol=1e-5)


def test_whitening() -> None:
    vectors = np.random.default_rng(4).normal(size=(50, 4)) @ np.diag([5.0, 1.0, 0.3, 0.1]) + 7
    whitening = Whitening.fit(vectors, 0.0)
    directions = (vectors - vectors.mean(0)) @ whitening.map
    assert np.allclose(directions.T @ directions, np.eye(4) * directions.var(0).mean() * 50, atol=1e-3)
    lengths = np.linalg.norm(whitening(vectors), axis=1)
    assert np.allclose(lengths, 1, atol=1e-5)
    assert not whitening(np.zeros((1, 4))).any()
    centred = vectors - vectors.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    white = Whitening.fit(vectors, 1e6)(vectors)
    assert np.allclose(white @ white.T, unit @ unit.T, atol=1e-3)
    with pytest.raises(ConfigurationError, match="shrinkage must be a finite number >= 0, got -1"):
        Whitening.fit(vectors, -1)


# ---------------------------------------------------------------------- weights


def planted(weights: list[float], users: int = 4000, items: int = 12) -> Choices:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(users, len(weights), items)).astype(np.float32)
    logits = np.einsum("f,ufk->uk", np.array(weights), features.astype(np.float64))
    chosen = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    return Choices(torch.from_numpy(features), torch.zeros(users, items), torch.from_numpy(chosen))


def test_the_loss_and_its_slopes() -> None:
    choices, point = planted([0.5, -1.0], users=30), np.array([0.3, 0.2])
    value, gradient, hessian = choices.loss(point)
    features = choices.features.double().numpy()
    logits = np.einsum("f,ufk->uk", point, features)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -logs[np.arange(30), choices.chosen.numpy()].sum() + 0.5e-3 * (point**2).sum()
    assert value == pytest.approx(expected, rel=1e-10)
    step = 1e-5
    for place in range(2):
        ahead, behind = (choices.loss(point + sign * step * np.eye(2)[place]) for sign in (1, -1))
        assert gradient[place] == pytest.approx((ahead[0] - behind[0]) / (2 * step), rel=1e-5)
        assert np.allclose(hessian[place], (ahead[1] - behind[1]) / (2 * step), rtol=1e-5)


def test_planted_weights_are_found_and_the_same_twice() -> None:
    choices = planted([0.8, -1.5, 0.0])
    first, second = (fit_weights(choices, ["a", "b", "c"]) for _ in range(2))
    assert first.weights == second.weights
    assert np.allclose(list(first.weights.values()), [0.8, -1.5, 0.0], atol=0.08)
    assert np.abs(choices.loss(np.array(list(first.weights.values())))[1]).max() < 0.1


def test_parts_that_the_data_do_not_support_go() -> None:
    choices = planted([0.8, 0.0, -0.7])
    fit = fit_supported(choices, {"real": ["a"], "noise": ["b"], "laser": ["c"]}, ["laser"])
    assert "a" in fit.weights and "c" not in fit.weights  # though c is worth much, it may only raise an item
    assert set(fit_supported(choices, {"real": ["a"], "noise": ["b"], "other": ["c"]}).weights) == {"a", "c"}
    assert fit_supported(choices.among([1]), {"noise": ["b"]}).weights == {}


def test_a_weight_without_bound_stays_finite() -> None:
    features = torch.zeros(200, 1, 5)
    features[:, 0, 4] = 1  # never chosen
    choices = Choices(features, torch.zeros(200, 5), torch.randint(4, (200,), generator=_seeded(0)))
    (weight,) = fit_supported(choices, {"seen": ["seen"]}).weights.values()
    assert np.isfinite(weight) and weight < -5


def test_drawn_choices(split, sequence) -> None:
    given = sources(split, sequence)
    parts = [PARTS[name].fit(given) for name in ("sequence", "seen", "item_knn")]
    samples = split.samples("valid")
    whole = draw_choices(parts, samples, given.counts)
    assert whole.features.shape == (len(samples), 3, 20) and not whole.offsets.any()
    assert whole.chosen.tolist() == [sample.target for sample in samples]
    drawn = draw_choices(parts, samples, given.counts, max_items=8)
    again = draw_choices(parts, samples, given.counts, max_items=8)
    assert torch.equal(drawn.features, again.features) and torch.equal(drawn.offsets, again.offsets)
    assert not drawn.chosen.any()
    for row, sample in enumerate(samples):
        assert torch.allclose(drawn.features[row, :, 0], whole.features[row, :, sample.target], atol=1e-5)
    # uniform draws stand for those that are left out: about I items in all
    assert float(drawn.offsets.exp().sum(1).mean()) == pytest.approx(20, rel=0.25)


# ---------------------------------------------------------------------- the hybrid


@pytest.mark.parametrize("text", ["tf-idf", "vectors", None])
def test_scores_are_the_weighted_features(split, sequence, text) -> None:
    given = np.random.default_rng(6).normal(size=(20, 5)) if text == "vectors" else text
    hybrid = Hybrid.fit(split, items=ITEMS, sequence=sequence, laser=Adapter(), text=given)
    hybrid = Hybrid(
        hybrid.fitted_parts, {name: 0.5 - place for place, name in enumerate(_features(hybrid))}, hybrid.sources
    )
    asked = pad_histories(ASKED)
    expected = sum(
        np.einsum("bif,f->bi", phi(part, hybrid.histories(*asked)), [hybrid.weights[name] for name in part.features])
        for part in hybrid.parts
    )
    scores = hybrid.scores(*asked).numpy()
    assert np.allclose(scores, expected, atol=1e-3)
    shares = hybrid.contributions(*asked)
    assert set(shares) == {part.name for part in hybrid.parts}
    assert np.allclose(sum(shares.values()).numpy(), scores, atol=1e-3)


def _features(hybrid: Hybrid) -> list[str]:
    return [name for part in hybrid.fitted_parts for name in part.features]


def test_weights_never_see_the_test_and_counts_take_in_validation(split, sequence) -> None:
    other = LeaveOneOut([[*row[:-1], (row[-1] + 1) % 19] for row in HISTORIES])
    here, there = (Hybrid.fit(each, items=ITEMS, sequence=sequence) for each in (split, other))
    assert here.weights == there.weights
    known = np.bincount([item for row in split.known_sequences for item in row], minlength=20)
    assert here.sources.counts.tolist() == known.tolist()


def test_without_laser_is_the_hybrid_that_never_had_it(split, sequence) -> None:
    with_it = Hybrid.fit(split, items=ITEMS, sequence=sequence, laser=Adapter())
    never = Hybrid.fit(split, items=ITEMS, sequence=sequence)
    assert with_it.without("laser").weights == pytest.approx(never.weights, abs=1e-6)
    with pytest.raises(ConfigurationError, match="only 'laser' can be left out"):
        with_it.without("text")


def test_a_part_of_ones_own(split, sequence) -> None:
    class Parity(Part):
        dense = ("parity",)

        @classmethod
        def fit(cls, sources: Sources) -> "Parity":
            part = cls()
            part.item_vectors = (torch.arange(len(sources.items)) % 2).float()[:, None]
            return part

        def queries(self, histories: Histories) -> torch.Tensor:
            return torch.ones(1, len(histories), 1)

    register_part("parity")(Parity)
    try:
        even = LeaveOneOut([[*row[:-2], row[-2] // 2 * 2, row[-1]] for row in HISTORIES])
        hybrid = Hybrid.fit(even, items=ITEMS, parts=["parity", "seen"], text=None)
        assert hybrid.weights["parity"] < -1
        with pytest.raises(ConfigurationError, match="a part's name must be free, got 'parity'"):
            register_part("parity")(Parity)
    finally:
        del PARTS["parity"]


def test_what_is_refused(split, sequence) -> None:
    with pytest.raises(ConfigurationError, match="parts must be among .*, got nothing"):
        Hybrid.fit(split, items=ITEMS, parts=["nothing"])
    with pytest.raises(ConfigurationError, match="sequence must know the catalog's 20 items, got 4"):
        Hybrid.fit(split, items=ITEMS, sequence=Precomputed(np.ones((4, 2))))
    with pytest.raises(ConfigurationError, match="text must be 'tf-idf', vectors .* got 'poems'"):
        Hybrid.fit(split, items=ITEMS, text="poems")
    with pytest.raises(ConfigurationError, match="text must have 20 vectors, one per item, got 3"):
        Hybrid.fit(split, items=ITEMS, text=np.ones((3, 2)))


# ---------------------------------------------------------------------- new items


def test_new_items_have_an_offset_and_a_scale(split, sequence) -> None:
    held = LeaveOneOut(HISTORIES, held_out_items=[2, 5])
    hybrid = Hybrid.fit(held, items=ITEMS, sequence=sequence, laser=Adapter())
    weights = {**dict.fromkeys(_features(hybrid), 0.5), "new_offset": 2.0, "new_scale": 3.0}
    hybrid = Hybrid(hybrid.fitted_parts, weights, hybrid.sources)
    assert hybrid.new.nonzero()[:, 0].tolist() == [2, 5]
    asked = pad_histories(ASKED)
    plain = sum(0.5 * phi(part, hybrid.histories(*asked)).sum(2).numpy() for part in hybrid.parts)
    expected = np.where(hybrid.new.numpy(), 2 + 3 * plain, plain)
    assert np.allclose(hybrid.scores(*asked).numpy(), expected, atol=1e-3)
    shares = hybrid.contributions(*asked)
    assert np.allclose(sum(shares.values()).numpy(), expected, atol=1e-3)
    assert set(shares["new"].unique().tolist()) == {0.0, 2.0}
    vectors = hybrid.queries(hybrid.histories(*asked)) @ hybrid.item_vectors.T
    cells = hybrid.cells(hybrid.histories(*asked))
    vectors[torch.from_numpy(cells.rows), torch.from_numpy(cells.items)] += torch.from_numpy(cells.values).float()
    assert np.allclose(vectors.numpy(), expected, atol=1e-3)


def test_the_numbers_of_new_items_are_of_maximum_likelihood(split, sequence) -> None:
    given = sources(split, sequence)
    parts = [PARTS[name].fit(given) for name in ("item_knn", "laser")]
    choices = draw_choices(parts, split.samples("valid"), given.counts)
    weights = {"item_knn": 1.5, "laser": 0.1}
    found = fit_new_items(choices, parts, weights, 20, seed=1)
    new = np.zeros(20, dtype=bool)
    new[np.random.default_rng(1).choice(20, 2, replace=False)] = True
    features, targets = choices.features.double().numpy(), choices.chosen.numpy()

    def loss(offset: float, scale: float) -> float:
        told = 0.1 * features[:, 1]
        logits = np.where(new, offset + scale * told, 1.5 * features[:, 0] + told)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-logs[np.arange(len(targets)), targets].sum() + 0.5e-3 * (offset**2 + scale**2))

    if found:
        best = loss(found["new_offset"], found["new_scale"])
        assert all(
            loss(found["new_offset"] + a, found["new_scale"] + b) > best
            for a, b in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1))
        )
    assert fit_new_items(choices, parts, {"item_knn": 1.5}, 20) == {}  # nothing tells of them


def test_held_out_items_are_not_buried() -> None:
    """Everybody buys one after the other of items whose words are alike: what is new is found by its words."""
    titles = [f"{WORDS[item % 8]}" for item in range(160)]
    items = ItemCatalog(tuple(map(str, range(160))), tuple({"title": title} for title in titles))
    generator = np.random.default_rng(0)
    histories = []
    for _ in range(400):
        alike = int(generator.integers(8)) + 8 * generator.permutation(20)
        histories.append(alike[:6].tolist())
    split = LeaveOneOut(histories, held_out_items=range(0, 160, 9))
    hybrid = Hybrid.fit(split, items=items)
    samples = [sample for sample in split.samples("test") if sample.target in split.held_out_items]
    scores = hybrid.scores(*pad_histories([sample.history for sample in samples])).numpy()
    ranks = target_ranks(
        scores, np.array([sample.target for sample in samples]), [sample.history for sample in samples]
    )
    assert np.median(ranks) <= 21  # among the twenty that are alike


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("text", ["tf-idf", "vectors"])
def test_saved_and_loaded(split, sequence, text, tmp_path: Path) -> None:
    given = np.random.default_rng(6).normal(size=(20, 5)) if text == "vectors" else text
    hybrid = Hybrid.fit(split, items=ITEMS, sequence=sequence, text=given)
    hybrid = Hybrid(hybrid.fitted_parts, dict.fromkeys(_features(hybrid), 0.7), hybrid.sources)
    hybrid.save_pretrained(tmp_path)
    loaded = Hybrid.from_pretrained(tmp_path, ITEMS)
    asked = pad_histories(ASKED)
    assert torch.equal(loaded.scores(*asked), hybrid.scores(*asked))
    assert loaded.content_hash() == hybrid.content_hash() and loaded.text_model == hybrid.text_model
    with pytest.raises(ArtifactError, match="the ID recommender is not the one"):
        Hybrid.from_pretrained(tmp_path, ITEMS, sequence=Precomputed(np.ones((20, 6))))
    smaller = ItemCatalog(ITEMS.item_ids[:9], ITEMS.attributes[:9])
    with pytest.raises(ArtifactError, match="must be of 9 items"):
        Hybrid.from_pretrained(tmp_path, smaller)


@pytest.mark.parametrize("file", ["hybrid.json", "hybrid.safetensors"])
def test_damaged_files(split, sequence, file, tmp_path: Path) -> None:
    Hybrid.fit(split, items=ITEMS, sequence=sequence).save_pretrained(tmp_path)
    content = (tmp_path / file).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"[]"):
        (tmp_path / file).write_bytes(damaged)
        with pytest.raises(ArtifactError):
            Hybrid.from_pretrained(tmp_path, ITEMS)
    (tmp_path / file).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Hybrid.from_pretrained(tmp_path, ITEMS)


def test_lists_of_another_catalog(split, sequence, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hybrid = Hybrid.fit(split, items=ITEMS, sequence=sequence)
    Hybrid(hybrid.fitted_parts, {"item_knn": 1.0}, hybrid.sources).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "hybrid.safetensors")
    tensors["item_knn.items"] = tensors["item_knn.items"] + 100
    save_file(tensors, tmp_path / "hybrid.safetensors")
    with pytest.raises(ArtifactError, match="neighbor lists must name items of the catalog"):
        Hybrid.from_pretrained(tmp_path, ITEMS)
    settings = json.loads((tmp_path / "hybrid.json").read_text())
    assert settings["parts"] == ["item_knn"]
