"""Embeddings as a parquet file, for any vector database."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Features, List, Value

from ..artifacts import whole_file
from ..serving.recommender import LaserRecommender


def export_embeddings(
    recommender: LaserRecommender,
    path: str | Path,
    histories: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> None:
    """Write one row per item of the catalog, or one per user of `histories` (item ids in time order by user id).

    Columns: `id`, `embedding` (D float32 of length 1: their inner product is the score), `base_model`,
    `base_model_revision`, `item_table` (the checksum of the item table: embeddings of users and items fit each other
    where it is the same). An id that is not in the catalog is an `UnknownItemError`.
    """
    if histories is None:
        ids = list(recommender.items.item_ids)
        embeddings = recommender.table.embeddings.cpu().numpy()
    else:
        ids = list(histories)
        given = [list(history) for history in histories.values()]
        embeddings = recommender.encode_users(
            given, batch_size=batch_size, show_progress_bar=show_progress_bar, normalize_embeddings=True
        )
    made_by = {
        "base_model": recommender.base.name,
        "base_model_revision": recommender.base.revision,
        "item_table": recommender.table.checksum(),
    }
    features = {"id": Value("string"), "embedding": List(Value("float32"), length=embeddings.shape[1])}
    features |= {name: Value("string") for name in made_by}
    columns = {"id": ids, "embedding": embeddings, **{name: [value] * len(ids) for name, value in made_by.items()}}
    with whole_file(path) as temporary:
        Dataset.from_dict(columns, features=Features(features)).to_parquet(str(temporary))
