"""Batches of rows of token ids."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

ResultT = TypeVar("ResultT")


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, left: bool = False
) -> dict[str, Tensor]:
    """Put rows of token ids into `input_ids` and `attention_mask` [B, T].

    Args:
        rows: B rows, at least one token each.
        pad_token_id: what fills shorter rows; its value is inert.
        device: where the tensors go.
        left: padding before the rows, as generation wants it; else after them.
    """
    ids = fill_rows(rows, pad_token_id, left)
    mask = fill_rows([[1] * len(row) for row in rows], 0, left)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def fill_rows(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Fill rows up with a value to the length of the longest -> [B, T] int64 on the CPU."""
    width = max(map(len, rows))
    if left:
        return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows], dtype=torch.long)


def run_in_batches(
    run: Callable[[list[int]], Sequence[ResultT]],
    lengths: Sequence[int],
    batch_size: int,
    progress: bool = False,
    description: str = "",
) -> list[ResultT]:
    """Run rows by number in batches of similar length, the longest first; return one result per row, in order."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    results: dict[int, ResultT] = {}
    with tqdm(total=len(order), desc=description, unit="row", disable=not progress, leave=False) as bar:
        for batch in batches:
            results.update(zip(batch, run(batch), strict=True))
            bar.update(len(batch))
    return [results[row] for row in range(len(lengths))]
