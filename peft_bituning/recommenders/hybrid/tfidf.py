"""Tf-idf neighbors: for each item those whose words and pairs of words are most like its own.

Shapes: `I` catalog items, `V` words and pairs of words.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from ...data import ItemCatalog
from ..neighbors import NeighborLists

NEIGHBORS = 300


def texts_of(items: ItemCatalog, first: int = 0) -> list[str]:
    """Return what is known of each item as one line, its title first."""
    return [
        "; ".join([row.get("title", ""), *(value for column, value in row.items() if column != "title")]).strip("; ")
        for row in items.attributes[first:]
    ]


def tfidf_neighbors(items: ItemCatalog, num_fitted: int, first: int = 0) -> NeighborLists:
    """Return the nearest items of those from `first` on by the cosine of tf-idf, an item's own first with 1.

    Words are weighed by the first `num_fitted` items, so that an item which is added changes no other's text; those of
    one item alone tell nothing of others and are left out.
    """
    texts = texts_of(items)
    weighed = _weighed(texts, num_fitted)
    if weighed is None:
        return NeighborLists(np.zeros((len(texts) - first, 1), np.int32), np.zeros((len(texts) - first, 1), np.float32))
    return NeighborLists.nearest(weighed[first:], weighed, min(NEIGHBORS, len(texts)))


def _weighed(texts: Sequence[str], num_fitted: int) -> Any:
    """Return the tf-idf of all texts, `[I, V]` sparse rows of length 1; None where no word is in two items."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, dtype=np.float32)
    try:
        vectorizer.fit(texts[:num_fitted])
    except ValueError:  # no word is left
        return None
    return vectorizer.transform(texts)
