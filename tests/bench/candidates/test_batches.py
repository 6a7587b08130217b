"""Rows as batches, and results in the order of the rows."""

import torch
from bench.candidates.batches import fill_rows, pad_rows, run_in_batches


def test_padding() -> None:
    rows, cpu = [[5, 6, 7], [8]], torch.device("cpu")
    right, left = pad_rows(rows, 9, cpu), pad_rows(rows, 9, cpu, left=True)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]] and left["input_ids"].tolist() == [
        [5, 6, 7],
        [9, 9, 8],
    ]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert fill_rows(rows, -100).tolist() == [[5, 6, 7], [8, -100, -100]]


def test_results_are_in_order() -> None:
    seen: list[list[int]] = []

    def run(numbers: list[int]) -> list[str]:
        seen.append(numbers)
        return [f"row {number}" for number in numbers]

    assert run_in_batches(run, [3, 9, 1, 9, 4], 2) == [f"row {number}" for number in range(5)]
    assert seen == [[1, 3], [4, 0], [2]]  # the longest first: what is too much shows at once
    assert run_in_batches(run, [], 2) == []
