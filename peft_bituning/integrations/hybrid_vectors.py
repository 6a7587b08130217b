"""The hybrid's dense parts as one vector per item and one per user, for other libraries.

Shapes: `M` items or users, `d` width of all dense parts laid end to end.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..data.collator import pad_histories
from ..errors import ConfigurationError
from ..recommenders import Hybrid
from ..recommenders.histories import Histories
from ..serving.recommender import LaserRecommender

PARTS = ("laser", "hybrid")


def checked_parts(recommender: LaserRecommender, parts: str) -> Hybrid | None:
    """Return the hybrid where its vectors are asked for; a ConfigurationError says that there are no such parts."""
    if parts not in PARTS or (parts == "hybrid" and recommender.hybrid is None):
        raise ConfigurationError(f"parts must be 'laser', or 'hybrid' where there is one, got {parts!r}")
    return recommender.hybrid if parts == "hybrid" else None


def hybrid_item_vectors(hybrid: Hybrid, items: Sequence[int] | None = None) -> np.ndarray:
    """Return the vectors `[M, d]` of items by their catalog indices, or of all."""
    vectors = hybrid.item_vectors
    return (vectors if items is None else vectors[list(items)]).numpy()


@torch.no_grad()
def hybrid_user_vectors(
    recommender: LaserRecommender,
    hybrid: Hybrid,
    histories: Sequence[Sequence[str]],
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> np.ndarray:
    """Return the vectors `[M, d]` of users, whose inner products with the items' are the dense parts' scores."""
    users = None
    if any(part.name == "laser" for part in hybrid.parts):
        users = torch.from_numpy(recommender.encode_users(histories, batch_size, show_progress_bar, True))
    indices = [recommender.items.indices_of([str(item) for item in history]) for history in histories]
    return hybrid.queries(Histories(*pad_histories(indices), hybrid.num_items, users)).numpy()
