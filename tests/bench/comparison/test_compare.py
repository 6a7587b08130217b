"""compare.py end to end: killed, resumed, changed; its table against numpy."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from peft_bituning.data import Interactions
from peft_bituning.errors import ConfigurationError

pytestmark = pytest.mark.timeout(900)  # the fixtures run compare.py twice

BENCHMARKS = Path(__file__).parents[3] / "examples" / "benchmarks"

from bench.comparison import Finished, cells_of, read_finished  # noqa: E402
from bench.plan_file import read_plan  # noqa: E402
from bench.plan import Plan  # noqa: E402
from bench.tables.comparison import summarise
from bench.tables.markdown import to_markdown  # noqa: E402

LASER = {
    "num_virtual_tokens": 2,
    "num_experts": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: Interactions, tiny_base_folder: Path) -> Path:
    """Return a configuration of three methods and two seeds over the tiny data in a folder."""
    folder = tmp_path_factory.mktemp("compare")
    data = folder / "data"
    data.mkdir()
    items = tiny_data.items
    records = [{"item_id": item_id, "title": f"thing {row}"} for row, item_id in enumerate(items.item_ids)]
    (data / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [
        f"{user},{items.item_ids[item]},{order}"
        for user, history in zip(tiny_data.user_ids, tiny_data.histories, strict=True)
        for order, item in enumerate(history)
    ]
    (data / "interactions.csv").write_text("\n".join(["user_id,item_id,order", *events]) + "\n")
    values = {
        "dataset": f"folder:{data}",
        "model": str(tiny_base_folder),
        "output_dir": str(folder / "out"),
        "seeds": [0, 1],
        "published": True,
        "training": {
            "stage1_epochs": 2,
            "stage2_epochs": 1,
            "cuts": "last_cut",
            "max_samples_per_epoch": 16,
            "learning_rate": 5e-3,
            "recommender": "sasrec",
            "recommender_epochs": 2,
            "template": "no_instruction",
            "save_steps": 1,
            "disable_tqdm": True,
        },
        "methods": {"popularity": None, "laser": LASER, "lora": {"r": 2, "training": {"learning_rate": 1e-3}}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def out(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["output_dir"])


@pytest.fixture(scope="module")
def resumed(config: Path, out: Path) -> dict[str, Any]:
    """Kill the run in the middle of a cell, resume it; return what was there at the kill and what it printed."""
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--config", str(config)]
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"at_kill": at_kill, "out": done.stdout}


@pytest.fixture
def plan(config: Path) -> Plan:
    return read_plan(config, {})


def finished(plan: Plan) -> list[Finished]:
    return [found for cell in cells_of(plan, plan.load_data()) if (found := read_finished(cell)) is not None]


def test_a_kill_costs_one_cell_since_its_checkpoint(resumed: dict[str, Any], plan: Plan, out: Path) -> None:
    assert [path.parent.parent.name for path in resumed["at_kill"]] == ["popularity"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in resumed["at_kill"].items())
    cells = finished(plan)
    assert [(each.cell.label, each.cell.seed) for each in cells] == [
        ("popularity", 0),
        ("laser", 0),
        ("laser", 1),
        ("lora", 0),
        ("lora", 1),
    ]
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


def test_a_changed_setting_redoes_its_cells_alone(resumed: dict[str, Any], config: Path) -> None:
    def left(change: Any) -> list[str]:
        values = yaml.safe_load(config.read_text())
        change(values)
        other = config.with_name("changed.yaml")
        other.write_text(yaml.safe_dump(values, sort_keys=False))
        return sorted({each.cell.label for each in finished(read_plan(other, {}))})

    assert left(lambda values: None) == ["laser", "lora", "popularity"]
    assert left(lambda values: values["methods"]["lora"].update(r=4)) == ["laser", "popularity"]
    assert left(lambda values: values["training"].update(recommender_epochs=3)) == ["lora", "popularity"]
    assert left(lambda values: values["training"].update(temperature=0.1)) == ["popularity"]
    assert left(lambda values: values["training"].update(save_steps=7)) == ["laser", "lora", "popularity"]
    assert left(lambda values: values.update(model_dtype="bfloat16")) == ["popularity"]
    assert left(lambda values: values.update(max_users=29)) == []


def test_a_damaged_cell_is_run_again(resumed: dict[str, Any], plan: Plan, tmp_path: Path) -> None:
    cell = finished(plan)[0].cell
    for name, damage in (
        ("ranks.safetensors", lambda path: os.truncate(path, 40)),
        ("ranks.safetensors", lambda path: save_file({"unfiltered": np.ones(30), "filtered": np.ones(30)}, path)),
        ("cell.json", lambda path: os.truncate(path, 40)),
        ("cell.json", lambda path: path.unlink()),
    ):
        kept = tmp_path / "kept"
        shutil.copyfile(cell.folder / name, kept)
        damage(cell.folder / name)
        assert read_finished(cell) is None
        shutil.copyfile(kept, cell.folder / name)
        assert read_finished(cell) is not None


def test_rows_of_the_same_settings_share_a_cell(resumed: dict[str, Any], config: Path, plan: Plan) -> None:
    """A file that is built on another one and asks for the same row under another name trains nothing again."""
    other = config.with_name("other.yaml")
    values = {"based_on": config.name, "question": "Which?", "baseline": "w/o nothing", "published": False}
    rows = {"w/o nothing": {"method": "laser", **LASER}, "none": {"method": "laser", **LASER, "prefix_encoder": "none"}}
    other.write_text(yaml.safe_dump({**values, "methods": rows}, sort_keys=False))
    built = read_plan(other, {})
    assert (built.name, built.training, built.seeds) == ("other", plan.training, plan.seeds)
    cells = finished(built)
    assert [(each.cell.label, each.cell.seed) for each in cells] == [("w/o nothing", 0), ("w/o nothing", 1)]
    assert [each.cell.folder for each in cells] == [each.cell.folder for each in finished(plan)[1:3]]


def test_what_a_file_asks_to_be_shown(resumed: dict[str, Any], config: Path) -> None:
    """The question, what validation gave, cold users and targets apart, the paper's numbers."""
    values = yaml.safe_load(config.read_text())
    values |= {"question": "Which is it?", "validation": True, "paper": {"laser": [0.1, 0.05, 0.04]}}
    values |= {"cold_start": {"user_events": 4, "item_events": 3}, "published": False, "baseline": "lora"}
    other = config.with_name("shown.yaml")
    other.write_text(yaml.safe_dump(values, sort_keys=False))
    plan = read_plan(other, {})
    cells, data = finished(plan), plan.load_data()
    table = summarise(plan, cells, {}, data)
    text = to_markdown(table)
    assert text.startswith("Which is it?") and "| laser | 0.1000 | 0.0500 | 0.0400 |" in text
    assert "NDCG@10 minus lora" in text and "favours" not in text
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


def test_a_question_lets_its_rows_vary(config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    values["methods"] = {"laser": {**LASER, "training": {"stage1_epochs": 0}}}
    other = config.with_name("varies.yaml")
    other.write_text(yaml.safe_dump({**values, "varies": ["stage1_epochs"]}))
    plan = read_plan(other, {})
    assert plan.arguments("laser", 0, Path(".")).stage1_epochs == 0
    assert plan.arguments("laser", 0, Path(".")).stage2_epochs == 1


def test_rows_are_chosen_with_what_the_file_says_of_them() -> None:
    """Of the others neither the paper's numbers nor the baseline are asked for."""
    path = BENCHMARKS / "compare" / "table4_parts.yaml"
    plan = read_plan(path, {"methods": ["w/o MoE"]})
    assert (list(plan.methods), list(plan.paper), plan.baseline) == (["w/o MoE"], ["w/o MoE"], None)
    assert read_plan(path, {"methods": ["laser", "w/o MoE"]}).baseline == "laser"


def test_a_moment_of_every_row(config: Path) -> None:
    plan = read_plan(config, {}, smoke=True)
    arguments = plan.arguments("laser", 0, Path("."))
    assert (plan.seeds, plan.max_users, Path(plan.output_dir).name) == ([0], 60, "out-smoke")
    assert (arguments.stage1_epochs, arguments.stage2_epochs, arguments.max_samples_per_epoch) == (1, 1, 16)
    assert arguments.cuts == "last_cut"


def test_a_table_without_results(plan: Plan) -> None:
    table = summarise(plan, [], {"lora, seed 0": "out of memory"}, plan.load_data())
    assert "- lora, seed 0: out of memory" in to_markdown(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"dora": None}}, "methods must be among .*popularity, .* got 'dora'"),
        ({"methods": {}}, "methods must be rows by name"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"methods": {"lora": {"training": {"stage1_epochs": 9}}}}, "training of lora must be among learning_rate"),
        ({"training": {"epochs": 9}}, "training must be fields of LaserArguments, got epochs"),
        ({"training": {"seed": 9}}, "training must leave seed to the comparison"),
        ({"baseline": "full"}, "baseline must be one of the methods, got 'full'"),
        ({"epochs": 9}, "config.yaml must hold based_on, methods, .*, got epochs"),
        ({"based_on": "config.yaml"}, "based_on must not lead back to the file itself, got 'config.yaml'"),
        ({"based_on": "nothing.yaml"}, "--config must be a readable YAML file, got .*nothing.yaml"),
        ({"varies": ["seed"]}, "varies must leave seed to the comparison"),
        ({"varies": ["epochs"]}, "varies must be fields of LaserArguments, got epochs"),
        ({"cold_start": {"user_events": 3}}, "cold_start must be {user_events: n, item_events: m}, got"),
        ({"cold_start": {"user_events": 3, "item_events": -1}}, "item_events of cold_start must be an integer >= 0"),
        ({"paper": {"popularity": [0.1]}}, "paper must hold Recall@10, NDCG@10 and MRR of rows of the file"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"methods": {"popularity": None}, **change}))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(path, {})


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_can_be_read(path: Path) -> None:
    plan = read_plan(path, {})
    if path.stem not in ("ml100k", "scientific_tiny"):
        return
    assert {plan.method_of(label) for label in plan.methods} >= {
        "popularity",
        "item-knn",
        "sasrec",
        "bert4rec",
        "laser",
        "bituning-static",
        "bituning-linear",
        "ilora",
        "lora",
        "prompt-tuning",
        "p-tuning",
        "full",
    }
