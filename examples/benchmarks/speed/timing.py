"""Process time of several ways to do one thing, one thread, in turns, so that a slow minute hits all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Args:
        name: what was timed.
        seconds: process time of each round.
        flops: floating-point operations that the task needs at the least; None where that says nothing.
        exactness: how far the result is from the reference, in words.
    """

    name: str
    seconds: list[float]
    flops: float | None = None
    exactness: str = ""

    @property
    def median(self) -> float:
        """Median of the rounds, seconds."""
        return statistics.median(self.seconds)


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each way once a round, after one round that does not count.

    Args:
        ways: what to time, by name.
        rounds: how often.

    Returns:
        Process time of each round by name, seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()
            start = time.process_time()
            way()
            if number:
                found[name].append(time.process_time() - start)
    return found


def print_table(title: str, rows: list[Row], limit: float, base: str | None = None) -> None:
    """Print a benchmark's rows as Markdown.

    Args:
        title: what was done, with its sizes.
        rows: the lines.
        limit: the machine's measured float32 matmul rate, FLOP/s.
        base: name of the row that the others are compared with; None is the first.
    """
    reference = next(row for row in rows if row.name == (base or rows[0].name))
    print(f"\n### {title}\n")
    print("| | ms, median | range | times faster | of the matmul limit | exactness |\n" + "| --- " * 6 + "|")
    for row in rows:
        low, high = (1000 * value for value in (min(row.seconds), max(row.seconds)))
        share = "" if row.flops is None else f"{row.flops / row.median / limit:.0%}"
        faster = reference.median / row.median
        print(
            f"| {row.name} | {1000 * row.median:,.1f} | {low:,.1f} to {high:,.1f} | {faster:.2f} | {share} "
            f"| {row.exactness} |"
        )


def relative(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Return the relative error of a result in words."""
    return f"{float((found.double() - expected.double()).norm() / expected.double().norm()):.0e}"
