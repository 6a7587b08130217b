"""candidates.py end to end: killed, resumed, and its table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import candidates
import pytest

from peft_bituning.data import Interactions
from peft_bituning.errors import ConfigurationError

pytestmark = pytest.mark.timeout(900)  # the fixtures run candidates.py


@pytest.fixture
def command(tmp_path: Path, tiny_folder: str, tiny_base_folder: Path) -> list[str]:
    """Return the arguments of a run over the tiny data in a folder."""
    given = f"--dataset {tiny_folder} --model {tiny_base_folder} --output_dir {tmp_path / 'out'} --num_candidates 4"
    budget = "--max_test_users 6 --max_validation_users 2 --max_samples_per_epoch 8 --id_recommender_epochs 1"
    return [*given.split(), *budget.split(), "--save_steps", "1", "--max_length", "400", "--disable_tqdm"]


def test_a_kill_costs_little(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed within a cell, the same command goes on there; a third run has nothing to do."""
    script = [sys.executable, candidates.__file__, *command]
    first = subprocess.Popen(script, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    out, deadline = tmp_path / "out", time.monotonic() + 200
    while not list(out.glob("cells/ilora/seed-0-*/checkpoints/step-*/complete.json")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not list(out.glob("cells/*/*/cell.json"))
    assert candidates.main(command) == 0
    cells = {path.parent.parent.name: json.loads(path.read_text()) for path in out.glob("cells/*/*/cell.json")}
    assert cells["ilora"]["phases"]["training"]["resumed"] and not cells["lora"]["phases"]["training"]["resumed"]
    assert not list(out.glob("cells/*/*/checkpoints"))
    table = json.loads((out / "candidates.json").read_text())
    for method, cell in cells.items():
        right = [answer["chosen"] == answer["target"] for answer in cell["answers"]]
        valid = [answer["chosen"] is not None for answer in cell["answers"]]
        test = table["rows"][method]["test"]
        assert (test["users"], test["hit_ratio@1"], test["valid_ratio"]) == (6, sum(right) / 6, sum(valid) / 6)
    assert "against_baseline" in table["rows"]["ilora"]
    text = (out / "candidates.md").read_text()
    assert "chance alone is 0.250" in text and "| ilora | 1 | 6 |" in text
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/cell.json")}
    capsys.readouterr()
    assert candidates.main([*command, "--methods", "lora"]) == 0
    assert capsys.readouterr().out.count("[1/") == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_what_decides_a_cell(command: list[str], tiny_data: Interactions) -> None:
    def folders(*changes: str) -> list[str]:
        options, arguments = candidates.parse([*command, *changes])
        return [cell.folder.name for cell in candidates.make_cells(options, arguments, tiny_data)]

    first = folders()
    assert folders("--save_steps", "7", "--temperature", "0.1") == first
    for changes in (("--learning_rate", "0.1"), ("--candidate_seed", "1"), ("--max_item_tokens", "9")):
        assert all(a != b for a, b in zip(folders(*changes), first, strict=True))
    ilora, lora = folders("--id_recommender_epochs", "2")
    assert ilora != first[0] and lora == first[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "full"], "methods must be among ilora, lora, got full"),
        (["--seeds", "1", "1"], "seeds must be different numbers"),
        (["--seed", "1"], "seed must be left to --seeds, got 1"),
        (["--model_dtype", "int8"], "model_dtype must be one of float32"),
        (["--learning_rate", "-1"], "learning_rate must be > 0, got -1"),
        (["--unknown"], "unknown"),
    ],
)
def test_refusals(changes: list[str], message: str) -> None:
    with pytest.raises((ConfigurationError, ValueError), match=message):
        candidates.parse(changes)
