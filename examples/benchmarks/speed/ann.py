"""Approximate indices against the exact one: build, one query, recall. One thread; wants faiss.

python examples/benchmarks/speed/ann.py --items 100000
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies a single query

import torch
from torch import Tensor

from peft_bituning.catalog import ExactIndex, FaissIndex, ItemIndex, measured_recall

WIDTH, RANK, K, QUERIES = 576, 64, 10, 200


def vectors(count: int, seed: int) -> Tensor:
    """Return unit vectors that vary in 64 directions, as item embeddings do, with a tenth of noise."""
    directions = torch.randn(RANK, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, RANK, generator=generator) @ directions / RANK**0.5
    raw += 0.1 * torch.randn(count, WIDTH, generator=generator)
    return torch.nn.functional.normalize(raw, dim=1)


def times(index: ItemIndex, queries: Tensor) -> list[float]:
    """Return process time of each query by itself, seconds."""
    found = []
    for query in queries:
        start = time.process_time()
        index.search(query[None], K)
        found.append(time.process_time() - start)
    return found


def main() -> None:
    """Print one table."""
    import faiss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    count = parser.parse_args().items
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    table, queries = vectors(count, 1), vectors(QUERIES, 2)
    exact = ExactIndex(table)
    print(f"### ann: {K} of {count:,} items of width {WIDTH}, made-up vectors, {QUERIES} queries one at a time\n")
    print("| | build, s | a query, ms, median | recall@10 |\n| --- | --- | --- | --- |")
    for kind in (None, "hnsw", "ivf_flat", "ivf_pq"):
        start = time.process_time()
        index: ItemIndex = exact if kind is None else FaissIndex(table, kind=kind)
        build = time.process_time() - start
        taken = times(index, queries)
        recall = measured_recall(index, exact, queries, K)
        print(f"| {kind or 'exact'} | {build:.1f} | {1000 * statistics.median(taken):.2f} | {recall:.3f} |", flush=True)


if __name__ == "__main__":
    main()
