"""The ten nearest items of each query, exactly: ours, torch, faiss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Row, in_turns, print_table
from torch import Tensor

from peft_bituning.catalog import ExactIndex
from peft_bituning.matmul import fast_cpu_matmul

WIDTH, K = 576, 10


def run(limit: float, items: int, queries: int, rounds: int) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        items: I.
        queries: how many at once.
        rounds: how often each way is timed.
    """
    generator = torch.Generator().manual_seed(0)
    table = F.normalize(torch.randn(items, WIDTH, generator=generator), dim=-1)
    users = F.normalize(torch.randn(queries, WIDTH, generator=generator), dim=-1)
    seen = torch.randint(0, items, (queries, 50), generator=generator).tolist()
    index = ExactIndex(table)
    found: dict[str, Tensor] = {}

    def textbook() -> None:
        found["torch matmul + topk"] = (users @ table.T).topk(K, dim=1).indices

    def ours() -> None:
        found["ours: chunks, running top-k"] = index.search(users, K)[1]

    def fast() -> None:
        with fast_cpu_matmul():
            found["ours, probed matmul"] = index.search(users, K)[1]

    def filtered() -> None:
        index.search(users, K, exclude=seen)

    ways: dict[str, Callable[[], object]] = {
        "torch matmul + topk": textbook,
        "ours: chunks, running top-k": ours,
        "ours, probed matmul": fast,
        "ours, 50 seen items left out": filtered,
    }
    flat = _faiss(table)
    if flat is not None:
        ways["faiss Flat"] = lambda: found.update({"faiss Flat": flat(users)})
    seconds = in_turns(ways, rounds)
    exact = found["torch matmul + topk"]
    rows = [
        Row(name, taken, 2.0 * queries * items * WIDTH, _recall(found[name], exact) if name in found else "")
        for name, taken in seconds.items()
    ]
    print_table(f"rank: {K} of {items:,} items of width {WIDTH}, {queries} a time", rows, limit)


def _recall(found: Tensor, exact: Tensor) -> str:
    same = [len(set(one) & set(two)) / K for one, two in zip(found.tolist(), exact.tolist(), strict=True)]
    return f"recall {sum(same) / len(same):.3f}"


def _faiss(table: Tensor) -> Callable[[Tensor], Tensor] | None:
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(table.shape[1])
    index.add(table.numpy())
    return lambda users: torch.from_numpy(index.search(users.numpy(), K)[1])
