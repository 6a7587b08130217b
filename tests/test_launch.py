"""Processes find each other on machines without accelerators, and share the cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_bituning.errors import ConfigurationError
from peft_bituning.launch import launched_state, use_all_cores

CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "accelerate" / "ddp.yaml"
SCRIPT = """
from accelerate import Accelerator
from peft_bituning.launch import launched_state
state = launched_state()
accelerator = Accelerator()
print(f"<{state.process_index} {accelerator.num_processes} {accelerator.distributed_type.value}>")
"""
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--main_process_port", "0"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerators")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    command = [sys.executable, *LAUNCHERS[launcher], str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<0 2 MULTI_CPU>" in done.stdout and "<1 2 MULTI_CPU>" in done.stdout


def test_alone() -> None:
    assert launched_state().num_processes == 1


def test_a_state_made_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    launched_state()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="num_processes must be the 2 that were launched, got 1: each would"):
        launched_state()


def test_cores_of_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    use_all_cores()
    assert torch.get_num_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    use_all_cores()
    assert torch.get_num_threads() == 1
