"""Two processes train as one does at the same global batch, launched with the configurations that are shipped."""

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

pytestmark = pytest.mark.timeout(900)  # the fixture starts five trainings at once

SCRIPT = Path(__file__).with_name("two_processes.py")
CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "accelerate"
KINDS = ["ddp", "fsdp2"]
# Two processes add up other parts of the same sums, in the order of the CPU's own kernels. A float32 sum of D = 32
# products is wrong by up to D eps, its cosine is divided by the temperature, and every update goes on from the last.
D, TEMPERATURE, BUDGET_TEMPERATURE, UPDATES = 32, 0.2, 0.05, 3 * 4
EPS = float(np.finfo(np.float32).eps)
ROUNDING = EPS * D / TEMPERATURE * UPDATES  # 2.3e-4 in a loss of about 3
Folders = dict[str, Path]
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Folders:
    """Train on one process and on two, four rows an update."""
    root = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"}
    started = []
    for kind in ("one", *KINDS, "one budget", "ddp budget"):
        launcher, *more = kind.split()
        settings = ["--num_processes", "1", "--cpu"]
        if launcher in KINDS:
            settings = ["--config_file", str(CONFIGS / f"{launcher}.yaml"), "--main_process_port", "0"]
        rows = "2" if launcher in KINDS else "4"
        places = [str(tiny_base_folder), str(root / kind)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *settings, str(SCRIPT), *places, rows, *more]
        log = (root / f"{kind}.log").open("w")
        started.append((kind, subprocess.Popen(command, env=environment, stdout=log, stderr=log)))
    for kind, process in started:
        assert process.wait(timeout=840) == 0, (root / f"{kind}.log").read_text()[-3000:]
    return {kind: root / kind for kind, _ in started}


@pytest.fixture(scope="module")
def results(folders: Folders) -> Results:
    return {kind: json.loads((folder / "results.json").read_text()) for kind, folder in folders.items()}


def _shares(folder: Path) -> list[dict[str, float]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("process-*.json"))]


@pytest.mark.parametrize("kind", KINDS)
def test_two_were_at_work(results: Results, folders: Folders, kind: str) -> None:
    assert results["one"]["settings"]["processes"] == 1
    assert results[kind]["settings"]["processes"] == 2
    (alone,), shares = _shares(folders["one"]), _shares(folders[kind])
    tables = 4  # the untrained mean, the untrained suffix, and those of both epochs, which move the center first
    assert alone["item"] == 11 * tables
    for each in ("item", "user"):
        # Sharded weights: a process without a batch repeats one, for the other's sake.
        assert sum(share[each] for share in shares) == alone[each] or kind == "fsdp2"
        assert all(share[each] >= 0.35 * alone[each] for share in shares)


def test_frozen_weights_are_sharded(folders: Folders) -> None:
    assert [share["frozen"] for share in _shares(folders["ddp"])] == [1.0, 1.0]
    assert [share["frozen"] for share in _shares(folders["fsdp2"])] == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_losses(results: Results, kind: str) -> None:
    one, two = results["one"]["log_history"], results[kind]["log_history"]
    assert len(one) == len(two) == UPDATES
    for left, right in zip(one, two, strict=True):
        assert {**left, "grad_norm": 0} == pytest.approx({**right, "grad_norm": 0}, abs=ROUNDING, rel=1e-6)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def test_losses_of_passes_within_a_budget(results: Results) -> None:
    """Processes that need fewer passes than another wait for it; a user's cuts in one pass give the same losses."""
    one, two = results["one budget"]["log_history"], results["ddp budget"]["log_history"]
    assert len(one) == len(two) > 3 * 4
    for left, right in zip(one, two, strict=True):
        assert left["tokens"] == right["tokens"]
        assert left["loss"] == pytest.approx(right["loss"], abs=EPS * D / BUDGET_TEMPERATURE * len(one))


@pytest.mark.parametrize("kind", KINDS)
def test_last_update_has_fewer_rows_than_processes(results: Results, kind: str) -> None:
    assert results[kind]["dataset"]["users"] == 13
    tokens = [record["tokens"] for record in results[kind]["log_history"]]
    assert min(tokens) < 0.5 * max(tokens)  # one row in place of four


@pytest.mark.parametrize("kind", KINDS)
def test_metrics(results: Results, kind: str) -> None:
    for left, right in zip(results["one"]["rows"], results[kind]["rows"], strict=True):
        for mode in ("unfiltered", "filtered"):
            assert left["test"][mode] == pytest.approx(right["test"][mode], abs=1e-5)
    for left, right in zip(results["one"]["epochs"], results[kind]["epochs"], strict=True):
        assert left["expert_load"] == pytest.approx(right["expert_load"], abs=1e-9)
        assert left["valid"]["unfiltered"] == pytest.approx(right["valid"]["unfiltered"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights(folders: Folders, tiny_base_folder: Path, kind: str) -> None:
    one, two = (load_file(folders[each] / "adapter_model.safetensors") for each in ("one", kind))
    assert one.keys() == two.keys()
    # The gradient of a key's bias is zero but for rounding, of which AdamW makes steps that no embedding sees.
    biases = {name for name in one if "key.bias" in name}
    assert max(float((one[name] - two[name]).abs().max()) for name in one.keys() - biases) < 1e-3
    recommender = LaserRecommender.from_pretrained(folders["one"], base_model=tiny_base_folder, device="cpu")
    histories = [[item_id] for item_id in recommender.items.item_ids]
    before = recommender.encode_users(histories)
    theirs = {name.replace("bituning_prefix", "bituning_prefix.default"): two[name] for name in biases}
    assert theirs and not recommender.model.load_state_dict(theirs, strict=False).unexpected_keys
    assert np.allclose(recommender.encode_users(histories), before, atol=1e-6)
