"""A run that is killed anywhere and resumed ends as if it had never been killed."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # the fixture kills and resumes 31 runs

SCRIPT = Path(__file__).with_name("killed_runs.py")
POINTS: dict[str, tuple[Any, int, signal.Signals, int]] = runpy.run_path(str(SCRIPT))["POINTS"]
KILLS = [name for name, point in POINTS.items() if point[2] == signal.SIGKILL]
INTERRUPTS = [name for name, point in POINTS.items() if point[2] == signal.SIGINT]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Run every point once, in forks of one process."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny_base_folder), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def outcomes(work: Path) -> dict[str, Any]:
    return {
        name: outcome for file in work.glob("outcomes-*.json") for name, outcome in json.loads(file.read_text()).items()
    }


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> dict[str, Any]:
    return json.loads((work / "undisturbed.json").read_text())


def _check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["log_history"]) == len(expected["log_history"]) == 12
    for record, wanted in zip(found["log_history"], expected["log_history"], strict=True):
        assert record == pytest.approx(wanted, abs=1e-6)
    assert found["table"] == pytest.approx(expected["table"], abs=1e-6)
    for row, wanted in zip(found["rows"], expected["rows"], strict=True):
        assert row["name"] == wanted["name"]
        for mode in ("unfiltered", "filtered"):
            assert row["test"][mode] == pytest.approx(wanted["test"][mode], abs=1e-6)
    assert found["epochs"] == expected["epochs"]


def test_enough_points() -> None:
    assert len(KILLS) >= 20


def test_the_undisturbed_run_draws_at_random(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["updates"] == 12
    losses = [record["loss"] for record in undisturbed["log_history"]]
    assert len(set(losses)) == 12
    assert undisturbed["left"] == []


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_resumed(point: str, work: Path, outcomes: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    outcome = outcomes[point]
    assert outcome["signal"] == signal.SIGKILL
    assert outcome["resumed"] == 0
    found = json.loads((work / outcome["file"]).read_text())
    assert found["updates"] == POINTS[point][3]
    assert found["left"] == []
    _check_same(found, undisturbed)


@pytest.mark.parametrize("point", INTERRUPTS)
def test_interrupted_and_resumed(point: str, work: Path, outcomes: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    outcome = outcomes[point]
    assert outcome["code"] == 130  # KeyboardInterrupt came out of `fit`, nothing caught it
    assert outcome["resumed"] == 0
    found = json.loads((work / outcome["file"]).read_text())
    assert found["updates"] == POINTS[point][3]
    _check_same(found, undisturbed)
