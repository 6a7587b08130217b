"""The hybrid of parts over ids, text and a language model."""

from . import item_knn, laser, last, popularity, seen, sequence, text
from .hybrid import Hybrid
from .part import EmbeddingRecommender, Part, Sources, TextVectors, register_part
from .whitening import Whitening

__all__ = [
    "EmbeddingRecommender",
    "Hybrid",
    "Part",
    "Sources",
    "TextVectors",
    "Whitening",
    "item_knn",
    "laser",
    "last",
    "popularity",
    "register_part",
    "seen",
    "sequence",
    "text",
]
