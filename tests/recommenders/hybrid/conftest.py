"""A small made-up shop, and every feature of the hybrid by its formula: loops over items, nothing of the package's."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_bituning.data import ItemCatalog, LeaveOneOut
from peft_bituning.recommenders import IDRecommender, build_recommender, fit_recommender
from peft_bituning.recommenders.hybrid import Sources, TextVectors

KINDS = ("lamp", "kettle", "rope", "chair", "glove")
KINDS_BOUGHT = 27  # items 28 and 29 are bought by nobody, 27 is the validation item of one user
BRANDS = ("Acme", "Bolt & Son", "Corvo", "Delta")
MAKES = ("brass", "Steel", "blue", "oak", "a blue", "old rope")
DECAY = 0.7
UNKNOWN = (-1, -30, 1000, 2**40)


class FakeLaser:
    """What the hybrid reads of a trained adapter: vectors of length 1; users are near to what they bought."""

    def __init__(self, item_embeddings: Tensor) -> None:
        self.item_embeddings = item_embeddings

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        users = torch.zeros(len(histories), self.item_embeddings.shape[1])
        for row, history in enumerate(histories):
            users[row, 0] = 0.1  # so that an empty history has a direction, too
            for age, item in enumerate(reversed(history)):
                users[row] += 0.5**age * self.item_embeddings[item]
        return torch.nn.functional.normalize(users, dim=1)

    @classmethod
    def of(cls, num_items: int, seed: int = 0) -> "FakeLaser":
        """Items of one kind are near to each other; more items of the same seed begin with the same ones."""
        noise = np.stack([np.random.default_rng([seed, item]).normal(size=8) for item in range(num_items)])
        vectors = torch.from_numpy(noise).float() * 0.4
        vectors[torch.arange(num_items), torch.arange(num_items) % len(KINDS)] += 1.0
        return cls(torch.nn.functional.normalize(vectors, dim=1))


class Reference:
    """All features of a history, by name, each `[I]` float64.

    Args:
        items: the catalog; its first `num_known` items were there when the parts were fitted.
        sequences: the events that are counted.
        sequence: the ID recommender, or None.
        laser: the adapter, or None.
        vectors: raw vectors of the texts `[I, d]`; None for tf-idf.
        shrinkage: of the whitening.
        num_known: see above; None is all.
    """

    def __init__(
        self,
        items: ItemCatalog,
        sequences: Sequence[Sequence[int]],
        sequence: IDRecommender | None = None,
        laser: FakeLaser | None = None,
        vectors: np.ndarray | None = None,
        shrinkage: float = 3.0,
        num_known: int | None = None,
    ) -> None:
        self.num_items, self.num_known = len(items), len(items) if num_known is None else num_known
        self.sequences, self.sequence, self.laser = sequences, sequence, laser
        self.counts = [sum(list(row).count(item) for row in sequences) for item in range(self.num_items)]
        self.bought = [item for item in range(self.num_items) if self.counts[item]]
        self.texts = None if vectors is None else self.whitened(np.asarray(vectors, dtype=np.float64), shrinkage)
        self.word_vectors = self.weighed_words(items)
        self.together = self.bought_together()

    def whitened(self, vectors: np.ndarray, shrinkage: float) -> np.ndarray:
        """Whiten by the known items' singular vectors."""
        known = vectors[: self.num_known]
        mean = known.mean(0)
        _, strength, directions = np.linalg.svd(known - mean, full_matrices=False)
        kept = strength > strength[0] * 1e-5
        strength, directions = strength[kept], directions[kept]
        white = (vectors - mean) @ directions.T / np.sqrt(strength**2 + shrinkage * (strength**2).mean())
        for row, vector in enumerate(vectors):
            white[row] = white[row] / np.linalg.norm(white[row]) if vector.any() else 0.0
        return white

    def weighed_words(self, items: ItemCatalog) -> list[dict[str, float]]:
        """Weigh words and pairs of words: (1 + log tf) (1 + log((1 + I) / (1 + df))), to length 1."""
        found: list[Counter[str]] = []
        for row in items.attributes:
            text = "; ".join([row.get("title", ""), *(row[column] for column in row if column != "title")])
            words = re.findall(r"\w\w+", text.lower())
            found.append(Counter([*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))]))
        frequency = Counter(word for counted in found[: self.num_known] for word in counted)
        weighed = []
        for counted in found:
            weights = {
                word: (1 + np.log(count)) * (1 + np.log((1 + self.num_known) / (1 + frequency[word])))
                for word, count in counted.items()
                if frequency[word] >= 2
            }
            length = np.sqrt(sum(value**2 for value in weights.values()))
            weighed.append({word: value / length for word, value in weights.items()})
        return weighed

    def word_cosine(self, item: int, other: int) -> float:
        """Cosine of the words of two items."""
        mine, its = self.word_vectors[item], self.word_vectors[other]
        return sum(value * its.get(word, 0.0) for word, value in mine.items())

    def bought_together(self) -> np.ndarray:
        """Cosine `[I, I]` of who bought two known items: sqrt(count) log(I / (1 + number of items of the user))."""
        rows = np.zeros((self.num_items, len(self.sequences)))
        for user, sequence in enumerate(self.sequences):
            for item in set(sequence):
                rows[item, user] = np.sqrt(list(sequence).count(item)) * max(
                    np.log(self.num_known / (1 + len(set(sequence)))), 0
                )
        found = np.zeros((self.num_items, self.num_items))
        for item in range(self.num_items):
            for other in range(self.num_items):
                lengths = np.linalg.norm(rows[item]) * np.linalg.norm(rows[other])
                if item != other and lengths > 0:
                    found[item, other] = rows[item] @ rows[other] / lengths
        return found

    def features(self, history: Sequence[int]) -> dict[str, np.ndarray]:
        """Return every feature of one history of catalog indices."""
        history = list(history)
        everything = range(self.num_items)
        found = {
            "seen": np.array([float(item in history) for item in everything]),
            "last": np.array([float(history[-1:] == [item]) for item in everything]),
            "popularity": self._neutral_unless_bought([np.log(1 + count) for count in self.counts]),
            "item_knn": self._item_knn(history),
            **self._text(history),
        }
        if self.sequence is not None:
            known = [item for item in history if item < self.sequence.num_items]
            row = torch.tensor([known or [0]], dtype=torch.long)
            scores = np.zeros(self.num_items)
            scores[: self.sequence.num_items] = (
                self.sequence.scores(row, torch.full_like(row, bool(known)))[0].double().numpy()
            )
            found["sequence"] = self._neutral_unless_bought(scores)
        if self.laser is not None:
            user = self.laser.user_embeddings([history])[0].double().numpy()
            found["laser"] = np.array([float(user @ item.double().numpy()) for item in self.laser.item_embeddings])
            found["laser"] /= 0.05
        return found

    def score(self, history: Sequence[int], weights: dict[str, float]) -> np.ndarray:
        """Return the weighted sum of the features that have a weight; see `peft_bituning.recommenders.Hybrid`."""
        features = self.features(history)
        return sum((weights[name] * values for name, values in features.items() if name in weights), np.zeros(1))

    def _neutral_unless_bought(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        mean = sum(values[item] for item in self.bought) / len(self.bought)
        return np.array([values[item] - mean if self.counts[item] else 0.0 for item in range(self.num_items)])

    def _item_knn(self, history: list[int]) -> np.ndarray:
        scores = np.zeros(self.num_items)
        for age, item in enumerate(reversed(history)):
            scores += DECAY**age * self.together[item]
        spread = scores[: self.num_known].std()
        return np.log(1 + 0.2 * scores / spread) if spread > 0 else scores

    def _text(self, history: list[int]) -> dict[str, np.ndarray]:
        whole, last = np.zeros(self.num_items), np.zeros(self.num_items)
        if history and self.texts is None:
            total = sum(DECAY**age for age in range(len(history)))
            for other in range(self.num_items):
                for age, item in enumerate(reversed(history)):
                    whole[other] += DECAY**age * self.word_cosine(item, other) / total
                last[other] = self.word_cosine(history[-1], other)
        elif history and self.texts is not None:
            user = sum(DECAY**age * self.texts[item] for age, item in enumerate(reversed(history)))
            length = np.linalg.norm(user)
            whole = self.texts @ user / (length if length > 1e-12 else 1.0)
            last = self.texts @ self.texts[history[-1]]
        seen = np.array([item in history for item in range(self.num_items)])
        return {"text": whole, "text_last": last, "text_seen": whole * seen, "text_last_seen": last * seen}


def _record(item: int) -> dict[str, str]:
    """Return an item's attributes: some lack a title, a brand, both, or words that any other item has."""
    if item == 22:
        return {}
    if item == 26:
        return {"title": "Zyx qwerty"}
    if item == 13:
        return {"brand": BRANDS[0]}
    row = {"title": f"{MAKES[item // len(KINDS)]} {KINDS[item % len(KINDS)]}"}
    return row if item % 7 == 3 else {"brand": BRANDS[item % len(BRANDS)], **row}


@pytest.fixture(scope="session")
def items() -> ItemCatalog:
    """Return 30 items of five kinds."""
    return ItemCatalog(tuple(f"i{item}" for item in range(30)), tuple(_record(item) for item in range(30)))


@pytest.fixture(scope="session")
def histories() -> list[list[int]]:
    """Return 60 users who buy things again, things of one kind, and what is popular; then three of too few events."""
    generator = np.random.default_rng(7)
    popular = 1 / np.arange(1, KINDS_BOUGHT + 1)
    found = []
    for user in range(60):
        events: list[int] = []
        while len(events) < 4 + user % 8:
            draw = generator.random()
            item = int(generator.choice(KINDS_BOUGHT, p=popular / popular.sum()))
            if events and draw < 0.3:
                item = int(generator.choice(events))
            elif draw < 0.7:
                item = user % len(KINDS) + len(KINDS) * int(generator.integers(6))
            if item < KINDS_BOUGHT:
                events.append(item)
        found.append(events)
    found[0][-2] = KINDS_BOUGHT
    return [*found, [3], [], [8, 8]]


@pytest.fixture(scope="session")
def split(histories: list[list[int]]) -> LeaveOneOut:
    """Return who is trained, validated and tested on what."""
    return LeaveOneOut(histories)


@pytest.fixture(scope="session")
def sequence(split: LeaveOneOut, items: ItemCatalog) -> IDRecommender:
    """Return a briefly trained SASRec that reads at most six items."""
    model = build_recommender(
        "sasrec",
        len(items),
        hidden_size=8,
        num_hidden_layers=1,
        max_history_length=6,
        initializer_range=0.3,
        dropout=0.1,
        attention_dropout=0.1,
    )
    fit_recommender(model, split.train_sequences, epochs=8, learning_rate=5e-3)
    return model


@pytest.fixture(scope="session")
def make_laser() -> Callable[..., FakeLaser]:
    """Return what makes an adapter: `make_laser(num_items, seed)`."""
    return FakeLaser.of


@pytest.fixture(scope="session")
def laser(items: ItemCatalog) -> FakeLaser:
    """Return the adapter of the 30 items."""
    return FakeLaser.of(len(items))


@pytest.fixture(scope="session")
def vectors(items: ItemCatalog) -> np.ndarray:
    """Return raw text vectors `[30, 6]`: directions of unlike strength around a mean; item 22 has no text."""
    found = np.random.default_rng(3).normal(size=(len(items), 6)) * [6.0, 3.0, 1.0, 0.5, 0.3, 0.1] + 2.0
    found[np.arange(len(items)), np.arange(len(items)) % len(KINDS)] += 4.0
    found[22] = 0.0
    return found.astype(np.float32)


@pytest.fixture(scope="session")
def sources(split: LeaveOneOut, items: ItemCatalog, sequence: IDRecommender, laser: FakeLaser) -> Sources:
    """Return what parts are made from when the weights are fitted: training events alone, texts by tf-idf."""
    known = split.train_sequences
    counts = [sum(row.count(item) for row in known) for item in range(len(items))]
    return Sources(items, torch.tensor(counts).float(), known, sequence, laser, "tf-idf")


@pytest.fixture(scope="session")
def with_text(sources: Sources, vectors: np.ndarray) -> Callable[[str], Sources]:
    """Return the sources with texts of a kind: `tf-idf` or `vectors`."""

    def make(text: str) -> Sources:
        given = TextVectors("made up", vectors) if text == "vectors" else text
        return Sources(
            sources.items, sources.counts, sources.sequences, sources.sequence, sources.laser, given, sources.shrinkage
        )

    return make


@pytest.fixture(scope="session")
def make_reference() -> type[Reference]:
    """Return the class of features by their formulas."""
    return Reference


@pytest.fixture(scope="session")
def reference(
    items: ItemCatalog, split: LeaveOneOut, sequence: IDRecommender, laser: FakeLaser, vectors: np.ndarray
) -> dict[str, Reference]:
    """Return the features by their formulas when the weights are fitted, by kind of texts."""
    known = split.train_sequences
    return {
        "tf-idf": Reference(items, known, sequence, laser),
        "vectors": Reference(items, known, sequence, laser, vectors),
    }


@pytest.fixture(scope="session")
def asked() -> list[list[int]]:
    """Return histories: empty, one item, repeats, longer than SASRec reads, of items that nobody bought or has text."""
    return [
        [],
        [4],
        [28],
        [22],
        [5, 5, 5],
        [1, 2, 1, 29, 3],
        [26, 22],
        [0, 27, 13],
        [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9],
        list(range(30)),
        [],
    ]


@pytest.fixture(scope="session")
def scattered() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what lays histories out with padding at both sides, holes, and items outside the catalog.

    `scattered(histories, seed)` gives `[B, N]` indices and mask; what is masked holds items of the catalog, too.
    """

    def lay_out(histories: Sequence[Sequence[int]], seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng(seed)
        width = max([0, *map(len, histories)]) + 5
        item_indices = np.zeros((len(histories), width), dtype=np.int64)
        mask = np.zeros((len(histories), width), dtype=bool)
        for row, history in enumerate(histories):
            item_indices[row] = generator.integers(0, 25, width)
            columns = np.sort(generator.choice(width, len(history), replace=False))
            item_indices[row, columns], mask[row, columns] = history, True
            for column in np.flatnonzero(~mask[row])[::2]:  # every other place beside them is an unknown item
                item_indices[row, column], mask[row, column] = generator.choice(UNKNOWN), True
        return torch.from_numpy(item_indices), torch.from_numpy(mask)

    return lay_out
