"""A trained recommender as a `SentenceTransformer`: needs `pip install sentence-transformers`."""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from ..errors import InputError, UnsupportedOperationError
from ..serving.recommender import LaserRecommender
from .hybrid_vectors import checked_parts, hybrid_item_vectors, hybrid_user_vectors


class RecommenderModule(InputModule):
    """Embeds item ids and histories of item ids, in process: the vectors are `LaserRecommender`'s own.

    A string is an item; a list of strings is a user's history, and an empty one a cold start. The trained recommender
    stays on its device. Of `parts`, `laser` are its embeddings, and `hybrid` the hybrid's dense parts laid end to end.
    """

    def __init__(self, recommender: LaserRecommender, parts: str = "laser") -> None:
        super().__init__()
        self.recommender = recommender
        self.hybrid = checked_parts(recommender, parts)
        self.tokenizer = recommender.base.tokenizer

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tell items from histories; both at once, or a prompt, are an `InputError`."""
        if prompt:
            raise InputError(f"prompt must be empty, the recommender has its own template, got {prompt!r}")
        are_items = {isinstance(each, str) for each in inputs}
        if len(are_items) > 1:
            raise InputError("inputs must be all items (strings) or all histories (lists of strings), got both")
        return {"items" if are_items == {True} else "histories": list(inputs)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Embed a batch from `preprocess`: the same with `sentence_embedding` [B, D]."""
        given = features["items" if "items" in features else "histories"]
        if "items" not in features and self.hybrid is not None:
            embeddings = hybrid_user_vectors(self.recommender, self.hybrid, given, len(given))
        elif "items" not in features:
            embeddings = self.recommender.encode_users(given, batch_size=len(given))
        elif self.hybrid is not None:
            embeddings = hybrid_item_vectors(self.hybrid, self.recommender.items.indices_of(given))
        else:
            embeddings = self.recommender.encode_items(given, batch_size=len(given))
        return {**features, "sentence_embedding": torch.from_numpy(embeddings)}

    def get_embedding_dimension(self) -> int:
        """Return D, or the width of the hybrid's vectors."""
        vectors = self.recommender.table.embeddings if self.hybrid is None else self.hybrid.item_vectors
        return int(vectors.shape[1])

    def save(self, *_: Any, **__: Any) -> None:
        """Refuse: a folder of sentence-transformers could not hold adapter, recommender and catalog."""
        raise UnsupportedOperationError(
            "a recommender is not saved as a SentenceTransformer; use LaserRecommender.save_pretrained, and make this "
            "module again from LaserRecommender.from_pretrained"
        )


def as_sentence_transformer(recommender: LaserRecommender, parts: str = "laser") -> SentenceTransformer:
    """Wrap a trained recommender, so that `encode` and `similarity` take item ids and histories.

    With `parts="hybrid"` the similarity is the inner product, of the hybrid's dense parts: see `export_embeddings`.
    """
    model = SentenceTransformer(modules=[RecommenderModule(recommender, parts)], device="cpu")
    if parts == "hybrid":
        model.similarity_fn_name = "dot"
    return model
