"""The ten best items of a hybrid: dense parts in one search and cells apart, against the whole matrix of scores."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from memory import measure
from rank import WIDTH, K
from timing import Row, in_turns, print_table
from torch import Tensor

from peft_bituning.catalog import ExactIndex
from peft_bituning.catalog.hybrid_index import HybridIndex
from peft_bituning.data import ItemCatalog
from peft_bituning.recommenders import Hybrid, Precomputed
from peft_bituning.recommenders.histories import Histories
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid.part import PARTS
from peft_bituning.recommenders.neighbors import NeighborLists

NEIGHBORS, EVENTS, SEQUENCE_WIDTH = 100, 20, 64
WEIGHTS = {"sequence": 0.3, "popularity": 0.3, "laser": 0.1, "item_knn": 1.5, "seen": -2.0, "last": -0.5, "text": 5.0}


class Embeddings:
    """Vectors of length 1 in the place of an adapter's."""

    def __init__(self, items: int, generator: torch.Generator) -> None:
        self.item_embeddings = F.normalize(torch.randn(items, WIDTH, generator=generator), dim=1)

    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Return the vectors of the last items."""
        return self.item_embeddings[[history[-1] for history in histories]]


def made_up(items: int) -> Hybrid:
    """Make a hybrid of all parts over random vectors and neighbors."""
    generator = torch.Generator().manual_seed(0)
    catalog = ItemCatalog(tuple(map(str, range(items))), ({},) * items)
    known = Precomputed(torch.randn(items, SEQUENCE_WIDTH, generator=generator))
    counts = torch.randint(1, 100, (items,), generator=generator).float()
    sources = Sources(catalog, counts, None, known, Embeddings(items, generator))
    near = torch.randint(items, (items, NEIGHBORS), generator=generator, dtype=torch.int32).numpy()
    lists = NeighborLists(near, torch.rand(items, NEIGHBORS, generator=generator).numpy())
    tensors = {"item_knn": lists.tensors(), "text": {**lists.tensors(), "fitted": torch.tensor(items)}}
    return Hybrid([part.load(tensors.get(name, {}), sources) for name, part in PARTS.items()], WEIGHTS, sources)


def run(items: int, queries: int, rounds: int, has_proc: bool) -> None:
    """Print one table of seconds and one of memory.

    Args:
        items: I.
        queries: how many at once.
        rounds: how often each way is timed.
        has_proc: whether memory can be measured here.
    """
    hybrid = made_up(items)
    indices = torch.randint(items, (queries, EVENTS), generator=torch.Generator().manual_seed(1))
    histories = Histories(indices, torch.ones_like(indices).bool(), items)
    users = hybrid.sources.laser.user_embeddings(indices.tolist()) if hybrid.sources.laser else torch.zeros(0)
    index, alone = HybridIndex(hybrid), ExactIndex(hybrid.sources.laser.item_embeddings)  # type: ignore[union-attr]
    found: dict[str, Tensor] = {}

    def plain() -> None:
        found["plain"] = hybrid.scores(indices, histories.mask).topk(K, dim=1).indices

    def ours() -> None:
        found["ours"] = index.search(histories, K)[1]

    ways = {
        "the whole matrix of scores, topk": plain,
        "ours: one search and cells apart": ours,
        "the adapter alone (`rank`)": lambda: alone.search(users, K),
    }
    seconds = in_turns(ways, rounds)
    same = float((found["plain"] == found["ours"]).float().mean())
    rows = [
        Row(name, taken, None, f"same lists {same:.3f}" if "ours" in name else "") for name, taken in seconds.items()
    ]
    print_table(f"hybrid: {K} of {items:,} items, {queries} a time, histories of {EVENTS}", rows, 1.0)
    if has_proc:
        print("\n| | MB beyond what was there |\n| --- | --- |")
        for name, way in list(ways.items())[:2]:
            print(f"| {name} | {measure(way):,.0f} |", flush=True)
