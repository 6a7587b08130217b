"""A recommender as a SentenceTransformer gives the recommender's own vectors."""

from pathlib import Path

import numpy as np
import pytest

from peft_bituning.errors import ConfigurationError, InputError, UnknownItemError, UnsupportedOperationError

pytest.importorskip("sentence_transformers")
from peft_bituning.integrations.sentence_transformers import as_sentence_transformer  # noqa: E402

HISTORIES = [["007", "8", "b2"], ["c1"], [], ["b3", "b4"], ["b9", "c0", "007", "b8", "b7"]]


def test_histories(trained) -> None:
    model = as_sentence_transformer(trained.recommender)
    expected = trained.recommender.encode_users(HISTORIES)
    assert np.allclose(model.encode(HISTORIES, batch_size=2), expected, atol=1e-5)
    lengths = np.linalg.norm(model.encode(HISTORIES, normalize_embeddings=True), axis=1)
    assert lengths == pytest.approx(np.ones(5), abs=1e-5)
    assert model.get_embedding_dimension() == expected.shape[1] == 32


def test_items(trained) -> None:
    model = as_sentence_transformer(trained.recommender)
    expected = trained.recommender.encode_items(["007", "c1", "8"])
    assert np.allclose(model.encode(["007", "c1", "8"]), expected, atol=1e-5)
    assert np.allclose(model.encode("007"), expected[0], atol=1e-5)


def test_similarity_ranks_as_recommend_does(trained) -> None:
    model = as_sentence_transformer(trained.recommender)
    ids = list(trained.recommender.items.item_ids)
    scores = model.similarity(model.encode(HISTORIES[:1]), model.encode(ids))[0]
    best = [ids[place] for place in scores.argsort(descending=True)[:5].tolist()]
    assert best == [
        item for item, _ in trained.recommender.recommend(HISTORIES[:1], k=5, filter_seen=False, parts="laser")[0]
    ]


def test_what_is_refused(trained, tmp_path: Path) -> None:
    model = as_sentence_transformer(trained.recommender)
    with pytest.raises(InputError, match="all items .* or all histories .*, got both"):
        model.encode(["007", ["8"]])
    with pytest.raises(InputError, match="prompt must be empty"):
        model.encode([["007"]], prompt="query: ")
    with pytest.raises(UnknownItemError, match="nobody"):
        model.encode([["nobody"]])
    with pytest.raises(UnsupportedOperationError, match="LaserRecommender.save_pretrained"):
        model.save(str(tmp_path / "saved"))


def test_the_hybrids_vectors(trained) -> None:
    recommender = trained.recommender
    model = as_sentence_transformer(recommender, parts="hybrid")
    ids = list(recommender.items.item_ids)
    scores = model.similarity(model.encode(HISTORIES), model.encode(ids)).numpy()
    dense = {part.name for part in recommender.hybrid.parts if part.dense and not part.sparse}
    for row, history in enumerate(HISTORIES):
        explained = recommender.recommend([history], k=12, filter_seen=False, explain=True)[0]
        for item, _, shares in explained:
            expected = sum(share for name, share in shares.items() if name in dense)
            assert scores[row, ids.index(item)] == pytest.approx(expected, abs=1e-4)
    assert model.get_embedding_dimension() == model.encode(ids).shape[1]
    with pytest.raises(ConfigurationError, match="parts must be 'laser', or 'hybrid'"):
        as_sentence_transformer(recommender, parts="text")
