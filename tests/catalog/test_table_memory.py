"""A table of 256 MB is written, checked, mapped, hashed, saved and scored in a fraction of that memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("table_memory.py")
STEPS = {
    "write blocks": 96,  # of 16 MB: the rows, those of length 1, and what is made on the way
    "verify blocks": 16,
    "load": 32,
    "checksum": 16,
    "save": 16,
    "score": 16,
    "score bfloat16": 32,
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("memory"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux' /proc")


def test_a_copy_would_be_seen(figures) -> None:
    assert figures["a copy"] > 240


@pytest.mark.parametrize("step", STEPS)
def test_no_step_holds_a_second_table(figures, step: str) -> None:
    assert figures[step] < STEPS[step]


def test_every_step_is_held_to_a_limit(figures) -> None:
    assert set(figures) == {*STEPS, "a copy"}
