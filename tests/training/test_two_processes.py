"""Two processes train as one does at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from peft_bituning import LaserRecommender

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> dict[int, Path]:
    """Train on one process and on two, four rows an update."""
    root = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"}
    started = []
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if count == 2 else []
        command = [
            sys.executable,
            *launcher,
            str(SCRIPT),
            str(tiny_base_folder),
            str(root / str(count)),
            str(4 // count),
        ]
        log = (root / f"{count}.log").open("w")
        started.append((count, subprocess.Popen(command, env=environment, stdout=log, stderr=log)))
    for count, process in started:
        assert process.wait(timeout=240) == 0, (root / f"{count}.log").read_text()[-3000:]
    return {count: root / str(count) for count in (1, 2)}


@pytest.fixture(scope="module")
def results(folders: dict[int, Path]) -> dict[int, dict[str, Any]]:
    return {count: json.loads((folder / "results.json").read_text()) for count, folder in folders.items()}


def test_two_were_at_work(results: dict[int, dict[str, Any]], folders: dict[int, Path]) -> None:
    assert results[1]["settings"]["processes"] == 1
    assert results[2]["settings"]["processes"] == 2
    alone = json.loads((folders[1] / "encoded-0.json").read_text())
    shares = [json.loads((folders[2] / f"encoded-{rank}.json").read_text()) for rank in (0, 1)]
    tables = 4  # the untrained mean, the untrained suffix, which is the first epoch's, and the second epoch's
    assert alone["item"] == 11 * (tables - 1)
    for kind in ("item", "user"):
        assert sum(share[kind] for share in shares) == alone[kind]
        assert all(share[kind] >= 0.35 * alone[kind] for share in shares)


def test_losses(results: dict[int, dict[str, Any]]) -> None:
    one, two = results[1]["log_history"], results[2]["log_history"]
    assert len(one) == len(two) == 3 * 4
    for left, right in zip(one, two, strict=True):
        assert {**left, "grad_norm": 0} == pytest.approx({**right, "grad_norm": 0}, abs=1e-5, rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def test_last_update_has_fewer_rows_than_processes(results: dict[int, dict[str, Any]]) -> None:
    assert results[2]["dataset"]["users"] == 13
    tokens = [record["tokens"] for record in results[2]["log_history"]]
    assert min(tokens) < 0.5 * max(tokens)  # one row in place of four


def test_metrics(results: dict[int, dict[str, Any]]) -> None:
    for left, right in zip(results[1]["rows"], results[2]["rows"], strict=True):
        for mode in ("unfiltered", "filtered"):
            assert left["test"][mode] == pytest.approx(right["test"][mode], abs=1e-5)
    for left, right in zip(results[1]["epochs"], results[2]["epochs"], strict=True):
        assert left["expert_load"] == pytest.approx(right["expert_load"], abs=1e-9)
        assert left["valid"]["unfiltered"] == pytest.approx(right["valid"]["unfiltered"], abs=1e-5)


def test_weights(folders: dict[int, Path], tiny_base_folder: Path) -> None:
    one, two = (load_file(folders[count] / "adapter_model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    # The gradient of a key's bias is zero but for rounding, of which AdamW makes steps that no embedding sees.
    biases = {name for name in one if "key.bias" in name}
    assert max(float((one[name] - two[name]).abs().max()) for name in one.keys() - biases) < 1e-3
    recommender = LaserRecommender.from_pretrained(folders[1], base_model=tiny_base_folder, device="cpu")
    histories = [[item_id] for item_id in recommender.items.item_ids]
    before = recommender.encode_users(histories)
    theirs = {name.replace("bituning_prefix", "bituning_prefix.default"): two[name] for name in biases}
    assert theirs and not recommender.model.load_state_dict(theirs, strict=False).unexpected_keys
    assert np.allclose(recommender.encode_users(histories), before, atol=1e-6)
