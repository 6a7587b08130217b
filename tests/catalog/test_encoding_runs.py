"""Encoding that is killed anywhere goes on from its blocks, and two processes make the table that one makes."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_bituning import LaserRecommender
from peft_bituning.catalog import ItemTable

pytestmark = pytest.mark.timeout(900)  # processes of their own

SCRIPT = Path(__file__).with_name("encoding_runs.py")
CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "accelerate"
RUNS: dict[str, Any] = runpy.run_path(str(SCRIPT))
POINTS: dict[str, tuple[Any, int]] = RUNS["points"]()
KINDS = ["ddp", "fsdp2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"}


@pytest.fixture(scope="module")
def expected(trained) -> ItemTable:
    """Return the table of all 26 items, encoded at once."""
    recommender = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    return ItemTable.from_embeddings(RUNS["encoder_of"](recommender).encode_items(26))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, trained) -> dict[str, Any]:
    """Visit every point once, in forks of one process."""
    work = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(SCRIPT), "kills", str(trained.folder), str(trained.base_folder), str(work)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work / "kills.json").read_text())


@pytest.mark.parametrize("point", POINTS)
def test_only_what_is_missing_is_encoded_again(outcomes: dict[str, Any], point: str) -> None:
    found, finished = outcomes[point], POINTS[point][1]
    assert found["signal"] == signal.SIGKILL
    assert found["resumed"] == 0
    assert found["before"] == list(range(finished)) and found["after"] == list(range(7))
    assert sorted(found["items"]) == list(range(4 * finished, 26))
    assert found["files"] == ["blocks-0.jsonl", "item_table.safetensors", "origin.json"]
    assert found["checksum"] == outcomes["undisturbed"]["checksum"]


def test_the_undisturbed_run_was_not_disturbed(outcomes: dict[str, Any]) -> None:
    assert (outcomes["undisturbed"]["signal"], outcomes["undisturbed"]["items"]) == (None, [])


@pytest.fixture(scope="module")
def launched(tmp_path_factory, trained) -> dict[str, Path]:
    """Encode with two processes, launched with the configurations that are shipped."""
    root = tmp_path_factory.mktemp("processes")
    started = []
    for kind in KINDS:
        (root / kind).mkdir()
        settings = ["--config_file", str(CONFIGS / f"{kind}.yaml"), "--main_process_port", "0"]
        places = [str(trained.folder), str(trained.base_folder), str(root / kind)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *settings, str(SCRIPT), "processes", *places]
        log = (root / f"{kind}.log").open("w")
        started.append((kind, subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)))
    for kind, process in started:
        assert process.wait(timeout=840) == 0, (root / f"{kind}.log").read_text()[-3000:]
    return {kind: root / kind for kind, _ in started}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_table_that_one_makes(launched: dict[str, Path], expected: ItemTable, kind: str) -> None:
    shares = [json.loads((launched[kind] / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    assert [share["processes"] for share in shares] == [2, 2]
    assert [share["sharded"] for share in shares] == [kind == "fsdp2"] * 2
    (first, second), (other_first, other_second) = (share["runs"] for share in shares)
    assert first["checksum"] == other_first["checksum"] == second["checksum"] == other_second["checksum"]
    if kind == "ddp":  # every other block each
        assert sorted(first["items"]) == [item for item in range(26) if item // 4 % 2 == 0]
        assert sorted(other_first["items"]) == [item for item in range(26) if item // 4 % 2 == 1]
        assert sorted(second["items"]) == [12, 13, 14, 15] and other_second["items"] == []
    else:  # all blocks together; a process without a batch repeats one, for the other's sake
        assert {*first["items"], *other_first["items"]} == set(range(26))
        assert first["items"] != other_first["items"]
        assert {*second["items"], *other_second["items"]} == {12, 13, 14, 15}
    journals = sorted(path.name for path in (launched[kind] / "table").glob("*.jsonl"))
    assert journals == (["blocks-0.jsonl", "blocks-1.jsonl"] if kind == "ddp" else ["blocks-0.jsonl"])
    table = ItemTable.load(launched[kind] / "table" / "item_table.safetensors", 26)
    assert table.checksum() == first["checksum"]
    # Other batches than those of the whole catalog at once: the order of some sums, and so the last bits, differ.
    assert table.embeddings.numpy() == pytest.approx(expected.embeddings.numpy(), abs=1e-6)
