"""Embeddings as a parquet file, for any vector database."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Features, List, Value

from ..artifacts import whole_file
from ..serving.recommender import LaserRecommender
from .hybrid_vectors import checked_parts, hybrid_item_vectors, hybrid_user_vectors


def export_embeddings(
    recommender: LaserRecommender,
    path: str | Path,
    histories: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    parts: str = "laser",
) -> None:
    """Write one row per item of the catalog, or one per user of `histories` (item ids in time order by user id).

    Columns: `id`, `embedding` (float32: the inner product of a user's and an item's is the score), `base_model`,
    `base_model_revision`, `item_table` (the checksum of the item table), with the hybrid `hybrid` (its hash). Users and
    items fit each other where these are the same. An id that is not in the catalog is an `UnknownItemError`.

    Parts: `laser`, embeddings [D] of length 1, or `hybrid`, the hybrid's dense parts laid end to end [d], not of length
    1. What sparse parts give to the few items that they touch (`recommend(..., explain=True)` tells which) is in no
    vector: ask the database for more than k, or rank what it finds by `recommend(..., candidates=)`.
    """
    hybrid = checked_parts(recommender, parts)
    given = None if histories is None else [list(history) for history in histories.values()]
    ids = list(recommender.items.item_ids if histories is None else histories)
    if given is None:
        embeddings = recommender.table.embeddings.cpu().numpy() if hybrid is None else hybrid_item_vectors(hybrid)
    elif hybrid is not None:
        embeddings = hybrid_user_vectors(recommender, hybrid, given, batch_size, show_progress_bar)
    else:
        embeddings = recommender.encode_users(
            given, batch_size=batch_size, show_progress_bar=show_progress_bar, normalize_embeddings=True
        )
    made_by = {
        "base_model": recommender.base.name,
        "base_model_revision": recommender.base.revision,
        "item_table": recommender.table.checksum(),
    }
    if hybrid is not None:
        made_by["hybrid"] = hybrid.content_hash()
    features = {"id": Value("string"), "embedding": List(Value("float32"), length=embeddings.shape[1])}
    features |= {name: Value("string") for name in made_by}
    columns = {"id": ids, "embedding": embeddings, **{name: [value] * len(ids) for name, value in made_by.items()}}
    with whole_file(path) as temporary:
        Dataset.from_dict(columns, features=Features(features)).to_parquet(str(temporary))
