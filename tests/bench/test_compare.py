"""compare.py end to end: killed, resumed, changed; its table against numpy."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
import yaml
from bench.comparison import Finished, cells_of, read_finished
from bench.plan import Plan
from bench.plan_file import read_plan
from bench.tables.comparison import summarise
from bench.tables.markdown import to_markdown
from safetensors.numpy import load_file

pytestmark = pytest.mark.timeout(900)  # the fixture runs compare.py twice


@pytest.fixture(scope="module")
def out(config: Path) -> Path:
    return config.with_name("out")


@pytest.fixture(scope="module")
def resumed(config: Path, out: Path, printed: Callable[..., str]) -> dict[str, Any]:
    """Kill the run in the middle of a cell, resume it; return what was there at the kill and what it printed."""
    command = [sys.executable, compare.__file__, "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    first = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(out.glob("cells/laser/seed-0-*/checkpoints/step-*/complete.json")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.005)
    first.kill()  # it alone: the cell's process must end by itself
    assert first.wait() == -signal.SIGKILL
    (lock,) = out.glob("cells/laser/seed-0-*/lock")
    with lock.open() as held:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            os.killpg(first.pid, signal.SIGKILL)
            pytest.fail("the cell's process outlived the one that started it")
    at_kill = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/cell.json")}
    return {"at_kill": at_kill, "out": printed(compare.main, "--config", str(config))}


@pytest.fixture
def plan(config: Path) -> Plan:
    return read_plan(config, {})


def finished(plan: Plan) -> list[Finished]:
    return [found for cell in cells_of(plan, plan.load_data()) if (found := read_finished(cell)) is not None]


def test_a_kill_costs_one_cell_since_its_checkpoint(resumed: dict[str, Any], plan: Plan, out: Path) -> None:
    assert [path.parent.parent.name for path in resumed["at_kill"]] == ["popularity"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in resumed["at_kill"].items())
    cells = finished(plan)
    names = ["popularity, seed 0", "laser, seed 0", "laser, seed 1", "lora, seed 0", "lora, seed 1"]
    assert [each.cell.name for each in cells] == names
    assert [each.values["phases"]["training"].get("resumed") for each in cells] == [None, True, False, False, False]
    assert "popularity, seed 0" not in resumed["out"] and "[2/5] laser, seed 0" in resumed["out"]
    assert not list(out.glob("cells/*/*/checkpoints"))
    assert "16 of 30 training rows an epoch x at most 3 epochs (2 + 1) = 48 rows, seeds 0, 1" in resumed["out"]


def test_files(resumed: dict[str, Any], out: Path) -> None:
    assert (out / "config.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (out / "config.md").read_text(encoding="utf-8")
    assert text in resumed["out"]
    assert "| popularity | no chance |" in text and "| laser | 2 |" in text
    assert "not the one above" in text and "| KAR | 0.1265 | 0.0894 | 0.0813 |" in text
    assert "`laser`: sasrec, " in text and "† a seed was stopped and resumed" in text
    assert "Not run" not in text and str(out.parent) not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in lines} == {5, 10}  # the rankings and the published; the costs


def test_numbers(resumed: dict[str, Any], plan: Plan, out: Path) -> None:
    """Mean and errors by hand from the ranks on the disk."""
    table = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for mode in ("unfiltered", "filtered"):
        ranks = [load_file(path)[mode] for path in sorted(out.glob("cells/laser/*/ranks.safetensors"))]
        gains = np.array([np.where(each <= 10, 1 / np.log2(each + 1), 0) for each in ranks])  # [seeds, users]
        found = table["rows"]["laser"][mode]["ndcg@10"]
        assert found["mean"] == pytest.approx(gains.mean())
        assert found["se_seeds"] == pytest.approx(gains.mean(1).std(ddof=1) / 2**0.5)
        assert found["se_users"] == pytest.approx((gains.std(1) / gains.shape[1] ** 0.5).mean())
        name = table["baseline"][mode]
        assert name in ("popularity", "lora")
        others = [load_file(path)[mode] for path in out.glob(f"cells/{name}/*/ranks.safetensors")]
        against = np.mean([np.where(each <= 10, 1 / np.log2(each + 1), 0) for each in others], axis=0)
        difference = table["rows"]["laser"][mode]["against_baseline"]
        assert difference["difference"] == pytest.approx((gains.mean(0) - against).mean())
        assert difference["resamples"] == 10_000
        assert "against_baseline" not in table["rows"][name][mode]
    costs = table["rows"]["lora"]["costs"]
    assert costs["trainable_parameters"] == 2 * 2 * (4 * 2 * 32 + 3 * (32 + 64))
    assert costs["adapter_bytes"] == 4 * costs["trainable_parameters"]
    assert costs["trained_rows"] == 48 and costs["trained_tokens"] > 48
    assert all(costs[phase]["seconds"] > 0 for phase in ("training", "encoding", "user"))


def test_a_changed_setting_redoes_its_cells_alone(resumed: dict[str, Any], changed: Callable[..., Path]) -> None:
    def left(change: Any) -> list[str]:
        return sorted({each.cell.label for each in finished(read_plan(changed("changed", change), {}))})

    assert left(lambda values: None) == ["laser", "lora", "popularity"]
    assert left(lambda values: values["methods"]["lora"].update(r=4)) == ["laser", "popularity"]
    assert left(lambda values: values["training"].update(recommender_epochs=3)) == ["lora", "popularity"]
    assert left(lambda values: values["training"].update(temperature=0.1)) == ["popularity"]
    assert left(lambda values: values["training"].update(save_steps=7)) == ["laser", "lora", "popularity"]
    assert left(lambda values: values.update(model_dtype="bfloat16")) == ["popularity"]
    assert left(lambda values: values.update(max_users=29)) == []


def test_rows_of_the_same_settings_share_a_cell(resumed: dict[str, Any], config: Path, plan: Plan) -> None:
    """A file that is built on another one and asks for the same row under another name trains nothing again."""
    values = {"based_on": config.name, "question": "Which?", "baseline": "w/o nothing", "published": False}
    laser = {"method": "laser", **yaml.safe_load(config.read_text())["methods"]["laser"]}
    rows = {"w/o nothing": laser, "none": {**laser, "prefix_encoder": "none"}}
    other = config.with_name("other.yaml")
    other.write_text(yaml.safe_dump({**values, "methods": rows}, sort_keys=False))
    built = read_plan(other, {})
    assert (built.name, built.training, built.seeds) == ("other", plan.training, plan.seeds)
    cells = finished(built)
    assert [(each.cell.label, each.cell.seed) for each in cells] == [("w/o nothing", 0), ("w/o nothing", 1)]
    assert [each.cell.folder for each in cells] == [each.cell.folder for each in finished(plan)[1:3]]


def test_what_a_file_asks_to_be_shown(resumed: dict[str, Any], changed: Callable[..., Path]) -> None:
    """The question, what validation gave, cold users and targets apart, the paper's numbers."""

    def change(values: Any) -> None:
        values |= {"question": "Which is it?", "validation": True, "paper": {"laser": [0.1, 0.05, 0.04]}}
        values |= {"cold_start": {"user_events": 4, "item_events": 3}, "published": False, "baseline": "lora"}

    plan = read_plan(changed("shown", change), {})
    cells, data = finished(plan), plan.load_data()
    table = summarise(plan, cells, {"full, seed 0": "out of memory"}, data)
    text = to_markdown(table)
    assert text.startswith("Which is it?") and "| laser | 0.1000 | 0.0500 | 0.0400 |" in text
    assert "NDCG@10 minus lora" in text and "favours" not in text and "- full, seed 0: out of memory" in text
    valid = [each.values["valid"]["unfiltered"]["mrr"] for each in cells if each.cell.label == "laser"]
    assert table["rows"]["laser"]["valid"]["mrr"]["mean"] == pytest.approx(np.mean(valid))
    histories = [history for history in data.histories if len(history) >= 3]
    counts = np.bincount([item for history in data.histories for item in history[:-2]], minlength=len(data.items))
    cold = np.array([len(history) - 2 <= 4 for history in histories])
    target = counts[[history[-1] for history in histories]]
    expected = {
        "users with up to 4 training events": cold,
        "users with more than 4": ~cold,
        "targets never seen in training": target == 0,
        "targets seen 1 to 3 times": (target > 0) & (target <= 3),
        "targets seen more than 3 times": target > 3,
    }
    assert {name: each["users"] for name, each in table["groups"].items()} == {
        name: mask.sum() for name, mask in expected.items() if mask.any()
    }
    ranks = [each.report.ranks_unfiltered for each in cells if each.cell.label == "laser"]
    for name, group in table["groups"].items():
        hits = np.mean([(each <= 10)[expected[name]] for each in ranks])
        assert group["rows"]["laser"]["recall@10"]["mean"] == pytest.approx(hits)


def test_a_table_without_results(plan: Plan) -> None:
    assert "- lora, seed 0: not run" in to_markdown(summarise(plan, [], {"lora, seed 0": "not run"}, plan.load_data()))
