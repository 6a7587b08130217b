"""Nearest items by cosine in large catalogs: faiss finds them, the table scores them. Needs `pip install faiss-cpu`.

Shapes: `B` queries, `D` width, `I` catalog items, `k` results, `F` found by faiss.
"""

from collections.abc import Callable, Collection, Sequence
from math import isqrt
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from .index import (
    ExactIndex,
    ItemIndex,
    check_embeddings,
    checked_candidates,
    checked_queries,
    normalised,
    padded,
    stable_top_k,
)

ROWS_A_TIME = 16_384  # of the table, while the index is built
MAX_GATHERED = 1 << 24  # numbers of found embeddings held at once: 64 MiB
MAX_PARAMETER = 1 << 16
CENTROIDS_A_BYTE = 256
ROWS_A_CENTROID = 39  # faiss's own least for k-means


class FaissIndex:
    """A table of item embeddings that answers top-k queries approximately, with exact scores.

    `hnsw` walks a graph of neighbours: the best recall, all rows in memory beside the graph. `ivf_flat` looks into
    the `nprobe` nearest of `nlist` clusters of rows. `ivf_pq` does so with rows of `code_size` bytes, the lightest,
    and lets the table decide among `refine` times k of them.

    What faiss finds is scored anew against the embeddings, in float32, and sorted as `ExactIndex` sorts: an item may be
    missing, but no score is approximate, and ties among the found go to the lower catalog index. The same embeddings,
    parameters and seed give the same index.

    Args:
        embeddings: `[I, D]` item embeddings of any length, in any float type; they are kept as they are and may be
            mapped from a file.
        kind: `hnsw`, `ivf_flat` or `ivf_pq`.
        seed: Of the graph's levels or of the clusters.
        **parameters: In place of the defaults by I and D, which `parameters` holds afterwards. `hnsw`: `M` (neighbours
            an item), `efConstruction`, `efSearch` (candidates kept while building and searching). `ivf_flat`:
            `nlist`, `nprobe` (more than `nlist` is all). `ivf_pq`: these, `code_size` (bytes an item, a divisor of D)
            and `refine`.

    Raises:
        InputError: The shape is not `[I, D]`, or a row is not finite (the first such rows are named).
        ConfigurationError: faiss is not installed, the kind or a parameter is unknown or out of its range, or there
            are too few items for `ivf_pq`.
    """

    def __init__(self, embeddings: Tensor, kind: str = "hnsw", seed: int = 0, **parameters: int) -> None:
        faiss = _import_faiss()
        check_embeddings(embeddings)
        self.embeddings = embeddings.detach()
        self.kind = kind
        self.parameters = _parameters(kind, embeddings.shape[0], embeddings.shape[1], parameters)
        build: Callable[..., Any] = {"hnsw": self._hnsw, "ivf_flat": self._ivf, "ivf_pq": self._ivf}[kind]
        self.faiss_index = build(faiss, seed)
        for first in range(0, len(self), ROWS_A_TIME):
            rows = normalised("embeddings", self.embeddings[first : first + ROWS_A_TIME], first)
            self.faiss_index.add(rows.cpu().numpy())

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.embeddings)

    @torch.no_grad()
    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Sequence[Collection[int]] | None = None,
        candidates: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find k items of great cosine for each query, as `ExactIndex.search` does.

        Candidates are searched exactly, among their rows alone; so is the whole catalog for queries that faiss finds
        fewer than k items for although more are left, and where k and the excluded are half of the catalog.

        Args:
            queries: `[B, D]`.
            k: Number of results.
            exclude: For each query the catalog indices to leave out; so many more are asked of faiss.
            candidates: Only these catalog indices are searched, for all queries; `None` is the whole catalog.

        Returns:
            Scores `[B, k]` (float32, descending) and catalog indices `[B, k]` (int64). Where fewer than k items are
            left, the rest holds score -inf and index -1.

        Raises:
            InputError: Shapes do not fit, an index lies outside the catalog, or a query is not finite.
            ConfigurationError: `k` is below 1.
        """
        queries = checked_queries(self.embeddings, queries, k, exclude)
        left_out = [np.array([], dtype=np.int64)] * len(queries)
        if exclude is not None:
            left_out = [np.unique(np.array(list(row), dtype=np.int64)) for row in exclude]
        if candidates is not None:
            return self._exact(queries, k, left_out, checked_candidates(self.embeddings, candidates))
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
            everything = torch.arange(len(self), device=queries.device)
            few = [left_out[row] for row in pending]
            scores[pending], indices[pending] = self._exact(queries[pending], k, few, everything)
        return scores, indices

    def _scored(self, queries: Tensor, found: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """Score what was found `[B, F]`, -1 for nothing, and keep the k best."""
        ascending = torch.from_numpy(np.sort(found, axis=1)).to(queries.device)
        rows_a_time = max(1, MAX_GATHERED // (found.shape[1] * queries.shape[1]))
        scores, indices = [], []
        for first in range(0, len(queries), rows_a_time):
            places = ascending[first : first + rows_a_time]
            rows = normalised("embeddings", self.embeddings[places.clamp_min(0).flatten()])  # [B F, D]
            # each cosine summed alike, so that equal embeddings have equal scores
            cosines = (rows.view(*places.shape, -1) * queries[first : first + rows_a_time, None]).sum(2)  # [B, F]
            best, columns = stable_top_k(cosines.masked_fill_(places < 0, float("-inf")), min(k, places.shape[1]))
            best, places = padded(best, places.gather(1, columns), k)
            scores.append(best)
            indices.append(places)
        return torch.cat(scores), torch.cat(indices)

    def _exact(self, queries: Tensor, k: int, left_out: Sequence[np.ndarray], columns: Tensor) -> tuple[Tensor, Tensor]:
        """Search the rows of some items, ascending, chunk by chunk."""
        scores = queries.new_empty(len(queries), 0)
        indices = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for first in range(0, len(columns), ROWS_A_TIME):
            chunk = columns[first : first + ROWS_A_TIME]
            items = chunk.cpu().numpy()
            excluded = [np.flatnonzero(np.isin(items, row)).tolist() if len(row) else [] for row in left_out]
            best, places = ExactIndex(self.embeddings[chunk]).search(queries, k, excluded)
            places = chunk[places].masked_fill(places < 0, -1)
            # what was found before stands first: ties go to the lower index
            scores, order = torch.cat([scores, best], dim=1).sort(dim=1, descending=True, stable=True)
            scores, indices = scores[:, :k], torch.cat([indices, places], dim=1).gather(1, order[:, :k])
        return padded(scores, indices, k)

    def _efforts(self, wanted: int) -> list[Any]:
        """Return faiss's search settings, to be tried in turn until there is enough."""
        faiss = _import_faiss()
        if self.kind == "hnsw":
            return [faiss.SearchParametersHNSW(efSearch=max(self.parameters["efSearch"], wanted))]
        efforts, nprobe = [], self.parameters["nprobe"]
        while nprobe < self.parameters["nlist"]:
            efforts.append(faiss.SearchParametersIVF(nprobe=nprobe))
            nprobe *= 4
        return [*efforts, faiss.SearchParametersIVF(nprobe=self.parameters["nlist"])]

    def _hnsw(self, faiss: Any, seed: int) -> Any:
        index = faiss.IndexHNSWFlat(self.embeddings.shape[1], self.parameters["M"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.parameters["efConstruction"]
        index.hnsw.rng = faiss.RandomGenerator(seed)
        return index

    def _ivf(self, faiss: Any, seed: int) -> Any:
        width, nlist = self.embeddings.shape[1], self.parameters["nlist"]
        clusters = faiss.IndexFlatIP(width)
        if self.kind == "ivf_flat":
            index = faiss.IndexIVFFlat(clusters, width, nlist, faiss.METRIC_INNER_PRODUCT)
        else:
            code_size = self.parameters["code_size"]
            index = faiss.IndexIVFPQ(clusters, width, nlist, code_size, 8, faiss.METRIC_INNER_PRODUCT)
            index.pq.cp.seed = seed
            index.pq.cp.min_points_per_centroid = 1  # or it warns, once a byte, of what `nlist` took care of
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1
        sample = min(len(self), max(64 * nlist, 256 * CENTROIDS_A_BYTE))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = order[:sample].sort().values.to(self.embeddings.device)
        index.train(normalised("embeddings", self.embeddings[chosen]).cpu().numpy())
        return index


def measured_recall(index: ItemIndex, exact: ItemIndex, queries: Tensor, k: int = 10) -> float:
    """Measure how much of the exact top k an index finds.

    `recall@k = mean over queries of |found and exact| / |exact|`

    Args:
        index: The index to be measured.
        exact: An `ExactIndex` over the same embeddings.
        queries: `[B, D]`, at least one; users, best of all.
        k: Number of results.

    Returns:
        The mean, from 0 to 1.

    Raises:
        ConfigurationError: There is no query.
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
    unknown = sorted(given.keys() - kinds[kind].keys())
    if unknown:
        raise ConfigurationError(
            f"parameters of {kind} must be among {', '.join(kinds[kind])}, got {', '.join(unknown)}"
        )
    parameters = {**kinds[kind], **given}
    limits = {"nlist": num_items, "code_size": width}
    for name, value in parameters.items():
        least, most = 2 if name == "M" else 1, limits.get(name, MAX_PARAMETER)
        if not least <= value <= most:
            raise ConfigurationError(f"{name} must be from {least} to {most}, got {value!r}")
    if "nprobe" in parameters:
        parameters["nprobe"] = min(parameters["nprobe"], parameters["nlist"])
    if kind == "ivf_pq":
        if width % parameters["code_size"]:
            raise ConfigurationError(f"code_size must divide the width {width}, got {parameters['code_size']!r}")
        if num_items < CENTROIDS_A_BYTE:
            raise ConfigurationError(
                f"ivf_pq must have at least {CENTROIDS_A_BYTE} items to learn its codes from, got {num_items}; "
                "take ExactIndex"
            )
    return parameters
