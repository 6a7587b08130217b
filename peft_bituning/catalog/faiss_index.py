"""Nearest items by cosine in large catalogs: faiss finds them, the table scores them. Needs `pip install faiss-cpu`."""

from collections.abc import Collection, Iterator, Sequence
from math import isqrt
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from .index import ItemIndex, TopK, best_of, cosines, normalised

ROWS_A_TIME = 16_384  # of the table, while the index is built
MAX_GATHERED = 1 << 24  # numbers of found embeddings held at once: 64 MiB
MAX_PARAMETER = 1 << 16
CENTROIDS_A_BYTE = 256
ROWS_A_CENTROID = 39  # faiss's own least for k-means

FACTORY_STRINGS = {"hnsw": "HNSW{M},Flat", "ivf_flat": "IVF{nlist},Flat", "ivf_pq": "IVF{nlist},PQ{code_size}"}


class FaissIndex(ItemIndex):
    """A table of item embeddings that answers top-k queries approximately, with exact scores.

    `hnsw` walks a graph of neighbours: the best recall, all rows in memory beside the graph. `ivf_flat` looks into
    the `nprobe` nearest of `nlist` clusters of rows. `ivf_pq` does so with rows of `code_size` bytes, the lightest,
    and lets the table decide among `refine` times k of them.

    What faiss finds is scored anew against the embeddings, in float32, and sorted as `ExactIndex` sorts: an item may be
    missing, but no score is approximate, and ties among the found go to the lower catalog index. The same embeddings,
    parameters and seed give the same index. Candidates are searched exactly; so is the whole catalog for queries that
    faiss finds fewer than k items for although more are left, and where k and the excluded are half of the catalog.

    Args:
        embeddings: `[I, D]` item embeddings of any length and float type, kept as they are, also mapped from a file.
        kind: `hnsw`, `ivf_flat` or `ivf_pq`.
        seed: Of the graph's levels or of the clusters.
        **parameters: In place of the defaults by I and D, which `parameters` holds afterwards. `hnsw`: `M` (neighbours
            an item), `efConstruction`, `efSearch` (candidates kept while building and searching). `ivf_flat`:
            `nlist`, `nprobe` (more than `nlist` is all). `ivf_pq`: these, `code_size` (bytes an item, a divisor of D)
            and `refine`.

    Raises:
        InputError: The shape is not `[I, D]`, or a row is not finite (the first such rows are named).
        ConfigurationError: faiss is missing, `kind` or a parameter is out of its range, or I too small for `ivf_pq`.
    """

    def __init__(self, embeddings: Tensor, kind: str = "hnsw", seed: int = 0, **parameters: int) -> None:
        super().__init__(embeddings)
        self.kind = kind
        self.parameters = _parameters(kind, embeddings.shape[0], embeddings.shape[1], parameters)
        self.faiss_index = self._empty_index(seed)
        for first in range(0, len(self), ROWS_A_TIME):
            rows = normalised("embeddings", self.embeddings[first : first + ROWS_A_TIME], first)
            self.faiss_index.add(rows.cpu().numpy())

    def _search(self, queries: Tensor, k: int, exclude: Sequence[Collection[int]], items: Tensor | None) -> TopK:
        if items is not None:
            return super()._search(queries, k, exclude, items)
        left_out = [np.unique(np.array(list(row), dtype=np.int64)) for row in exclude]
        scores = queries.new_full((len(queries), k), float("-inf"))
        indices = torch.full((len(queries), k), -1, dtype=torch.long, device=queries.device)
        wanted = self.parameters.get("refine", 1) * k + max(map(len, left_out), default=0)
        pending = np.arange(len(queries))  # queries that have too few yet
        for settings in self._efforts(wanted) if 2 * wanted <= len(self) else ():
            if len(pending):
                _, found = self.faiss_index.search(queries[pending].cpu().numpy(), wanted, params=settings)
                for place, row in enumerate(pending):
                    if len(left_out[row]):
                        found[place, np.isin(found[place], left_out[row])] = -1
                scores[pending], indices[pending] = self._scored(queries[pending], found, k)
                possible = np.array([min(k, len(self) - len(left_out[row])) for row in pending])
                pending = pending[(found >= 0).sum(1) < possible]
        if len(pending):
            few = [exclude[int(row)] for row in pending]
            scores[pending], indices[pending] = super()._search(queries[pending], k, few, None)
        return scores, indices

    def _blocks(self, queries: Tensor, items: Tensor | None) -> Iterator[TopK]:
        everything = torch.arange(len(self), device=queries.device)
        for rows in (everything if items is None else items).split(ROWS_A_TIME):
            yield cosines(queries, normalised("embeddings", self.embeddings[rows])), rows

    def _scored(self, queries: Tensor, found: np.ndarray, k: int) -> TopK:
        """Score the F items found for each query, `[B, F]`, -1 for nothing, and keep the k best."""
        ascending = torch.from_numpy(np.sort(found, axis=1)).to(queries.device)
        rows_a_time = max(1, MAX_GATHERED // (found.shape[1] * queries.shape[1]))
        parts = []
        for first in range(0, len(queries), rows_a_time):
            places = ascending[first : first + rows_a_time]
            rows = normalised("embeddings", self.embeddings[places.clamp_min(0).flatten()])  # [B F, D]
            # each cosine summed alike, so that equal embeddings have equal scores
            scores = (rows.view(*places.shape, -1) * queries[first : first + rows_a_time, None]).sum(2)  # [B, F]
            parts.append(best_of(scores.masked_fill_(places < 0, float("-inf")), places, k))
        return torch.cat([scores for scores, _ in parts]), torch.cat([indices for _, indices in parts])

    def _efforts(self, wanted: int) -> list[Any]:
        """Return faiss's search settings, to be tried in turn until there is enough."""
        faiss = _import_faiss()
        if self.kind == "hnsw":
            return [faiss.SearchParametersHNSW(efSearch=max(self.parameters["efSearch"], wanted))]
        nprobe, nlist = self.parameters["nprobe"], self.parameters["nlist"]
        probed = [nprobe * 4**step for step in range(nlist.bit_length()) if nprobe * 4**step < nlist]
        return [faiss.SearchParametersIVF(nprobe=clusters) for clusters in [*probed, nlist]]

    def _empty_index(self, seed: int) -> Any:
        """Make faiss's index; its clusters are trained, but it holds no row yet."""
        faiss = _import_faiss()
        factory = FACTORY_STRINGS[self.kind].format(**self.parameters)
        index = faiss.index_factory(self.embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if self.kind == "hnsw":
            index.hnsw.efConstruction = self.parameters["efConstruction"]
            index.hnsw.rng = faiss.RandomGenerator(seed)
            return index
        clusterings = [index.cp]
        if self.kind == "ivf_pq":
            clusterings.append(index.pq.cp)
            index.do_polysemous_training = False  # the codes' order, which only Hamming distances would use
        for clustering in clusterings:
            clustering.seed = seed
            clustering.min_points_per_centroid = 1  # or it warns, once a byte, of what `nlist` took care of
        sample = min(len(self), max(64 * index.nlist, 256 * CENTROIDS_A_BYTE))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = order[:sample].sort().values.to(self.embeddings.device)
        index.train(normalised("embeddings", self.embeddings[chosen]).cpu().numpy())
        return index


def measured_recall(index: ItemIndex, exact: ItemIndex, queries: Tensor, k: int = 10) -> float:
    """Measure how much of the exact top k an index finds, from 0 to 1.

    `recall@k = mean over queries of |found and exact| / |exact|`

    Args:
        index: The index to be measured.
        exact: An `ExactIndex` over the same embeddings.
        queries: `[B, D]`, at least one, or it is a `ConfigurationError`; users, best of all.
        k: Number of results.
    """
    if not len(queries):
        raise ConfigurationError("queries must have at least one row to measure recall, got none")
    lists = zip(index.search(queries, k)[1].tolist(), exact.search(queries, k)[1].tolist(), strict=True)
    shares = [len(set(found) & set(true) - {-1}) / len(set(true) - {-1}) for found, true in lists]
    return sum(shares) / len(shares)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigurationError(
            f"FaissIndex needs faiss ({error}); pip install faiss-cpu, or keep ExactIndex, which needs nothing"
        ) from error
    return faiss


def _parameters(kind: str, num_items: int, width: int, given: dict[str, int]) -> dict[str, int]:
    """Return the parameters of a kind: what was given over the defaults."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigurationError(f"{name} must be an integer, got {value!r}")
    nlist = given.get("nlist", max(1, min(4 * isqrt(num_items), num_items // ROWS_A_CENTROID)))
    clusters = {"nlist": nlist, "nprobe": min(nlist, max(16, nlist // 8))}
    # a byte for four numbers or more
    code_size = max(size for size in range(1, max(1, width // 4) + 1) if width % size == 0)
    kinds = {
        "hnsw": {"M": 32, "efConstruction": 200, "efSearch": 128},
        "ivf_flat": clusters,
        "ivf_pq": {**clusters, "code_size": code_size, "refine": 20},
    }
    if kind not in kinds:
        raise ConfigurationError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    if unknown := sorted(given.keys() - kinds[kind].keys()):
        names = ", ".join(kinds[kind])
        raise ConfigurationError(f"parameters of {kind} must be among {names}, got {', '.join(unknown)}")
    parameters = {**kinds[kind], **given}
    limits = {"M": (2, MAX_PARAMETER), "nlist": (1, num_items), "code_size": (1, width)}
    for name, value in parameters.items():
        least, most = limits.get(name, (1, MAX_PARAMETER))
        if not least <= value <= most:
            raise ConfigurationError(f"{name} must be from {least} to {most}, got {value!r}")
    if "nprobe" in parameters:
        parameters["nprobe"] = min(parameters["nprobe"], parameters["nlist"])
    if width % parameters.get("code_size", 1):
        raise ConfigurationError(f"code_size must divide the width {width}, got {parameters['code_size']!r}")
    if kind == "ivf_pq" and num_items < CENTROIDS_A_BYTE:
        raise ConfigurationError(
            f"ivf_pq must have at least {CENTROIDS_A_BYTE} items to learn its codes from, got {num_items}; take "
            "ExactIndex"
        )
    return parameters
