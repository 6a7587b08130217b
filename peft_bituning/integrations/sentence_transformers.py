"""A trained recommender as a `SentenceTransformer`: needs `pip install sentence-transformers`."""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from ..errors import InputError, UnsupportedOperationError
from ..serving.recommender import LaserRecommender


class RecommenderModule(InputModule):
    """Embeds item ids and histories of item ids, in process: the vectors are `LaserRecommender`'s own.

    A string is an item; a list of strings is a user's history, and an empty one a cold start. The trained recommender
    stays on its device.
    """

    def __init__(self, recommender: LaserRecommender) -> None:
        super().__init__()
        self.recommender = recommender
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
        if "items" in features:
            embeddings = self.recommender.encode_items(features["items"], batch_size=len(features["items"]))
        else:
            embeddings = self.recommender.encode_users(features["histories"], batch_size=len(features["histories"]))
        return {**features, "sentence_embedding": torch.from_numpy(embeddings)}

    def get_embedding_dimension(self) -> int:
        """Return D."""
        return int(self.recommender.table.embeddings.shape[1])

    def save(self, *_: Any, **__: Any) -> None:
        """Refuse: a folder of sentence-transformers could not hold adapter, recommender and catalog."""
        raise UnsupportedOperationError(
            "a recommender is not saved as a SentenceTransformer; use LaserRecommender.save_pretrained, and make this "
            "module again from LaserRecommender.from_pretrained"
        )


def as_sentence_transformer(recommender: LaserRecommender) -> SentenceTransformer:
    """Wrap a trained recommender, so that `encode` and `similarity` take item ids and histories."""
    return SentenceTransformer(modules=[RecommenderModule(recommender)], device="cpu")
