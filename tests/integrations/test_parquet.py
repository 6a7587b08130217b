"""Exported embeddings come back with ids, lengths and where they came from."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from peft_bituning.errors import ConfigurationError, UnknownItemError
from peft_bituning.integrations.parquet import export_embeddings


def test_items(trained, tmp_path: Path) -> None:
    recommender = trained.recommender
    export_embeddings(recommender, tmp_path / "items.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "items.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == list(recommender.items.item_ids)  # "007" stays "007"
    found = np.array(rows["embedding"][:], dtype=np.float32)
    assert np.array_equal(found, recommender.table.embeddings.numpy())
    assert set(rows["item_table"]) == {recommender.table.checksum()}
    assert set(rows["base_model"]) == {"tiny-llama"} and set(rows["base_model_revision"]) == {None}


def test_users(trained, tmp_path: Path) -> None:
    histories = {"u1": ("007", "8"), "2": (), "u3": ["c1"]}
    export_embeddings(trained.recommender, tmp_path / "users.parquet", histories, batch_size=2)
    rows = Dataset.from_parquet(str(tmp_path / "users.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == ["u1", "2", "u3"]
    users, items = np.array(rows["embedding"][:]), trained.recommender.table.embeddings.numpy()
    best = trained.recommender.items.item_ids[int((items @ users[0]).argmax())]
    assert best == trained.recommender.recommend([["007", "8"]], k=1, filter_seen=False, parts="laser")[0][0][0]
    with pytest.raises(UnknownItemError, match="nobody"):
        export_embeddings(trained.recommender, tmp_path / "bad.parquet", {"u": ["nobody"]})
    assert [path.name for path in tmp_path.glob("*.parquet*")] == ["users.parquet"]


def test_the_hybrids_vectors(trained, tmp_path: Path) -> None:
    recommender, histories = trained.recommender, {"u1": ["007", "8"], "2": []}
    export_embeddings(recommender, tmp_path / "items.parquet", parts="hybrid")
    export_embeddings(recommender, tmp_path / "users.parquet", histories, parts="hybrid")
    cache = str(tmp_path / "cache")
    items, users = (
        Dataset.from_parquet(str(tmp_path / f"{each}.parquet"), cache_dir=cache) for each in ("items", "users")
    )
    assert set(items["hybrid"]) == set(users["hybrid"]) == {recommender.hybrid.content_hash()}
    scores = np.array(users["embedding"][:]) @ np.array(items["embedding"][:]).T
    dense = {part.name for part in recommender.hybrid.parts if part.dense and not part.sparse}
    for row, history in enumerate(histories.values()):
        for item, _, shares in recommender.recommend([history], k=12, filter_seen=False, explain=True)[0]:
            expected = sum(share for name, share in shares.items() if name in dense)
            assert scores[row, items["id"][:].index(item)] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigurationError, match="parts must be 'laser', or 'hybrid'"):
        export_embeddings(recommender, tmp_path / "bad.parquet", parts="text")
