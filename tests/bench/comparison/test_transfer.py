"""compare.py from one data set to another: the source trained once, killed and resumed, its weights started from."""

import contextlib
import io
import json
import multiprocessing
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from peft_bituning.errors import ConfigurationError

pytestmark = pytest.mark.timeout(900)  # the fixtures run compare.py

BENCHMARKS = Path(__file__).parents[3] / "examples" / "benchmarks"

from bench.comparison import Finished, cells_of, fill_row, read_finished  # noqa: E402
from bench.plan_file import read_plan  # noqa: E402
from bench.plan import Plan  # noqa: E402
from bench.tables.comparison import summarise
from bench.tables.markdown import to_markdown  # noqa: E402
from compare import main  # noqa: E402

ROW = {
    "method": "laser",
    "line": "from source",
    "source": True,
    "collaborative_dropout": 0.5,
    "num_virtual_tokens": 2,
    "num_experts": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
}


def _write_data(folder: Path, users: int, items: int, prefix: str) -> str:
    """Write users who walk around a ring of items, and return the data's name."""
    folder.mkdir()
    records = [{"item_id": f"{prefix}{item}", "title": f"thing {item} of {prefix}"} for item in range(items)]
    (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [f"{user},{prefix}{(user * 3 + step) % items},{step}" for user in range(users) for step in range(5)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,order", *events]) + "\n")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Return a configuration of two shares of one row, from a small catalog to another."""
    folder = tmp_path_factory.mktemp("transfer")
    values = {
        "dataset": _write_data(folder / "target", 20, 10, "t"),
        "source": {"dataset": _write_data(folder / "source", 16, 60, "s"), "max_users": 8},
        "model": str(tiny_base_folder),
        "output_dir": str(folder / "out"),
        "training": {
            "stage1_epochs": 1,
            "stage2_epochs": 1,
            "cuts": "last_cut",
            "learning_rate": 5e-3,
            "recommender": "sasrec",
            "recommender_epochs": 2,
            "template": "no_instruction",
            "save_steps": 1,
            "disable_tqdm": True,
        },
        "methods": {
            "popularity": None,
            "sasrec, half": {"method": "sasrec", "train_fraction": 0.5, "line": "sasrec"},
            "sasrec": {"line": "sasrec", "train_fraction": 1},
            "zero": {**ROW, "train_fraction": 0},
            "half": {**ROW, "train_fraction": 0.5},
        },
    }
    path = folder / "transfer.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def resumed(config: Path) -> str:
    """Kill the source's cell while it is trained, then run the comparison; return what it printed."""
    plan = read_plan(config, {})
    source = cells_of(plan, plan.load_data())[-1].source
    assert source is not None
    data = plan.load_data(of_source=True)
    first = multiprocessing.get_context("fork").Process(target=run_cell, args=(plan, source, data))
    first.start()
    while not list(source.folder.glob("checkpoints/step-*/complete.json")):
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL and read_finished(source) is None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--config", str(config)]) == 0, printed.getvalue()
    return printed.getvalue()


@pytest.fixture
def plan(config: Path) -> Plan:
    return read_plan(config, {})


def finished(plan: Plan) -> dict[str, Finished]:
    return {
        cell.label: found for cell in cells_of(plan, plan.load_data()) if (found := read_finished(cell)) is not None
    }


def test_the_source_is_trained_once_and_goes_on(resumed: str, plan: Plan, config: Path) -> None:
    """Killed and resumed, then found again by the second share; the shares rank all test users."""
    assert resumed.count("first on the source") == 1 and "[4/5] zero, seed 0: first on the source" in resumed
    cells = finished(plan)
    assert list(cells) == ["popularity", "sasrec, half", "sasrec", "zero", "half"]
    assert len(list(config.parent.glob("out/cells/laser/*"))) == 3
    sources = {cells[label].cell.source.folder for label in ("zero", "half")}
    assert len(sources) == 1
    source = read_finished(cells["half"].cell.source)
    assert source is not None and source.values["phases"]["training"]["resumed"]
    assert (source.values["dataset"]["users"], len(source.report.ranks_unfiltered)) == (8, 8)
    assert source.values["dataset"]["items"] == len(
        {(user * 3 + step) % 60 for user in _sources(plan) for step in range(5)}
    )
    assert all(len(each.report.ranks_unfiltered) == 20 for each in cells.values())
    assert [cells[label].values["trained"]["rows"] for label in ("zero", "half")] == [0, 20]


def _sources(plan: Plan) -> list[int]:
    return [int(user) for user in plan.load_data(of_source=True).user_ids]


def test_the_source_decides(resumed: str, plan: Plan, config: Path) -> None:
    """Another source, or another setting of its training, is another cell; the users' share alone is not."""
    source = finished(plan)["zero"].cell.source
    values = yaml.safe_load(config.read_text())
    for change, stays in (
        (lambda: values["source"].update(max_users=9), False),
        (lambda: values["source"].update(max_users=8), True),
        (lambda: values["methods"]["half"].update(train_fraction=0.25), True),
        (lambda: values["methods"]["half"].update(collaborative_dropout=0.1), False),
    ):
        change()
        other = config.with_name("changed.yaml")
        other.write_text(yaml.safe_dump(values, sort_keys=False))
        changed = read_plan(other, {})
        cell = cells_of(changed, changed.load_data())[-1]
        assert cell.source is not None and (cell.source.identity == source.identity) == stays
        assert (read_finished(cell.source) is not None) == stays


def test_without_these_settings_nothing_is_another_cell(plan: Plan, config: Path) -> None:
    """All users and no source are what a row is without saying so."""
    values = yaml.safe_load(config.read_text())
    values["methods"] = {
        "laser": {name: value for name, value in ROW.items() if name not in ("method", "line", "source")},
        "all": {**ROW, "source": False, "train_fraction": 1.0},
        "sasrec": None,
    }
    other = config.with_name("plain.yaml")
    other.write_text(yaml.safe_dump(values, sort_keys=False))
    plain = read_plan(other, {})
    cells = cells_of(plain, plain.load_data())
    assert cells[0].folder == cells[1].folder and cells[1].source is None
    assert set(cells[0].identity) == {"method", "settings", "training", "seed", "data", "versions", "model"}
    assert cells[2].folder == cells_of(plan, plan.load_data())[2].folder


def test_damaged_weights_are_trained_again(resumed: str, plan: Plan) -> None:
    source = finished(plan)["zero"].cell.source
    assert source is not None and read_finished(source) is not None
    path = source.folder / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_finished(source) is None
    path.write_bytes(content)
    assert read_finished(source) is not None


def test_the_table_says_what_the_source_took(resumed: str, plan: Plan, config: Path) -> None:
    text = (config.parent / "out" / "transfer.md").read_text(encoding="utf-8")
    assert text in resumed and str(config.parent) not in text
    assert "| zero‡ |" in text and "| half*‡ |" in text and "8 of 16 users, seed 0" in text
    assert "`zero`: 16 rows in " in text
    assert (config.parent / "out" / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    table = summarise(plan, list(finished(plan).values()), {}, plan.load_data())
    assert [(row["line"], row["train_fraction"]) for row in table["rows"].values()] == [
        (None, 1.0),
        ("sasrec", 0.5),
        ("sasrec", 1.0),
        ("from source", 0.0),
        ("from source", 0.5),
    ]
    assert to_markdown(table) == text


def test_a_share_trains_otherwise(resumed: str, plan: Plan) -> None:
    cells = finished(plan)
    for one, other in (("sasrec, half", "sasrec"), ("zero", "half")):
        assert not np.array_equal(cells[one].report.ranks_unfiltered, cells[other].report.ranks_unfiltered)


def test_a_moment_of_the_source(config: Path) -> None:
    assert read_plan(config, {}, smoke=True).source["max_users"] == 8
    values = {**yaml.safe_load(config.read_text()), "source": {"dataset": "nothing"}}
    other = config.with_name("whole.yaml")
    other.write_text(yaml.safe_dump(values))
    plan = read_plan(other, {"source": "ml-100k"}, smoke=True)
    assert plan.source == {"dataset": "ml-100k", "max_users": 60}


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ({"method": "sasrec", "train_fraction": 0}, "x", "train_fraction of row must be > 0 without `source: true`"),
        ({"method": "laser", "train_fraction": 0}, "x", "train_fraction of row must be > 0 without `source: true`"),
        (
            {"method": "sasrec", "train_fraction": 1.5},
            "x",
            "train_fraction of row must be a number from 0 to 1, got 1.5",
        ),
        ({"method": "sasrec", "train_fraction": True}, "x", "train_fraction of row must be a number from 0 to 1"),
        (
            {"method": "popularity", "train_fraction": 0.5},
            "x",
            "train_fraction of row must be 1 for its method, got 0.5",
        ),
        ({"method": "sasrec", "source": True}, "x", "source of row must be left out for its method"),
        ({"method": "laser", "source": "toys"}, "x", "source of row must be true or false, got 'toys'"),
        (
            {"method": "laser", "source": True},
            None,
            "source must be {dataset: NAME, max_users: N} for row, .* --source",
        ),
        ({"method": "sasrec"}, {"max_users": 3}, "source must be {dataset: NAME, max_users: N}, got"),
        ({"method": "sasrec"}, {"dataset": "x", "max_users": 0}, "max_users of source must be an integer >= 1, got 0"),
    ],
)
def test_refusals(row: dict[str, Any], source: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    source = {"dataset": source} if isinstance(source, str) else source
    path.write_text(yaml.safe_dump({"methods": {"row": row}, "source": source}))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(path, {})


def test_a_saved_recommender_fits_one_catalog(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    values = {"methods": {"row": ROW}, "source": {"dataset": "x"}, "training": {"recommender": "a/folder"}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigurationError, match="recommender of row must be bert4rec or sasrec, .* got 'a/folder'"):
        read_plan(path, {})
