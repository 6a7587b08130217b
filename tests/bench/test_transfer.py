"""compare.py with rows that start from another's weights: a source's, killed and resumed, or a LoRA's below."""

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
import yaml
from bench.comparison import Finished, RowCell, cells_of, fill_row, read_finished
from bench.plan import Plan
from bench.plan_file import read_plan
from bench.tables.comparison import summarise
from bench.tables.markdown import to_markdown

pytestmark = pytest.mark.timeout(900)  # the fixture runs compare.py

STATIC = {"method": "bituning-static", "num_virtual_tokens": 2}


@pytest.fixture(scope="module")
def transfer(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration of two shares of a row from a source, and of a row over a LoRA."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "items.jsonl").write_text(
        "".join(f'{{"item_id": "s{n}", "title": "thing {n} of s"}}\n' for n in range(60))
    )
    events = [f"{user},s{(user * 3 + step) % 60},{step}" for user in range(16) for step in range(5)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,order", *events]) + "\n")
    values = yaml.safe_load(config.read_text())
    row = {"method": "laser", "line": "from source", "source": True, "collaborative_dropout": 0.5}
    row |= values["methods"]["laser"]
    values |= {"seeds": [0], "source": {"dataset": f"folder:{folder}", "max_users": 8}, "published": False}
    values["methods"] = {
        "popularity": None,
        "sasrec, half": {"method": "sasrec", "train_fraction": 0.5, "line": "sasrec"},
        "sasrec": {"line": "sasrec", "train_fraction": 1},
        "zero": {**row, "train_fraction": 0},
        "half": {**row, "train_fraction": 0.5},
        "lora": None,
        "static": STATIC,
        "over": {**STATIC, "over": "lora"},
    }
    path = config.with_name("transfer.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def resumed(transfer: Path, printed: Callable[..., str]) -> list[str]:
    """Kill the source's cell while it is trained, then run one row, then all; return what was printed."""
    plan = read_plan(transfer, {})
    source = by_label(plan)["half"].source
    assert source is not None
    first = multiprocessing.get_context("fork").Process(target=fill_row, args=(plan, source))
    first.start()
    while not list(source.folder.glob("checkpoints/step-*/complete.json")):
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL and source.read() is None
    chosen = printed(compare.main, "--config", str(transfer), "--methods", "over")
    stamp = (by_label(plan)["lora"].folder / "cell.json").stat().st_mtime_ns
    whole = printed(compare.main, "--config", str(transfer))
    assert (by_label(plan)["lora"].folder / "cell.json").stat().st_mtime_ns == stamp
    return [chosen, whole]


@pytest.fixture
def plan(transfer: Path) -> Plan:
    return read_plan(transfer, {})


def by_label(plan: Plan) -> dict[str, RowCell]:
    return {cell.label: cell for cell in cells_of(plan, plan.load_data())}


def finished(plan: Plan) -> dict[str, Finished]:
    return {label: found for label, cell in by_label(plan).items() if (found := read_finished(cell)) is not None}


def test_the_source_is_trained_once_and_goes_on(resumed: list[str], plan: Plan) -> None:
    """Killed and resumed, then found again by the second share; the shares rank all test users."""
    assert resumed[1].count("first on the source") == 1 and "[4/8] zero, seed 0: first on the source" in resumed[1]
    cells = finished(plan)
    assert list(cells) == list(plan.methods)
    (source,) = {cells[label].cell.source.folder: cells[label].cell.source for label in ("zero", "half")}.values()
    found = read_finished(source)
    assert found is not None and found.values["phases"]["training"]["resumed"]
    assert (found.values["dataset"]["users"], len(found.report.ranks_unfiltered)) == (8, 8)
    users = [int(user) for user in plan.load_data(of_source=True).user_ids]
    assert found.values["dataset"]["items"] == len({(user * 3 + step) % 60 for user in users for step in range(5)})
    assert all(len(each.report.ranks_unfiltered) == 30 for each in cells.values())
    assert [cells[label].values["trained"]["rows"] for label in ("zero", "half")] == [0, 45]


def test_a_row_over_another(resumed: list[str], plan: Plan, changed: Callable[..., Path]) -> None:
    """Asked for alone it brings the row below, whose cell the table shares; another LoRA is another cell."""
    assert "[1/2] over, seed 0: first lora" in resumed[0] and "first lora" not in resumed[1]
    assert "| over§ |" in resumed[0] and "`over`: `lora`, 48 rows in" in resumed[0]
    cells = finished(plan)
    over = cells["over"].cell.over
    assert over is not None and over.identity == cells["lora"].cell.identity
    losses = [cells[name].values["details"]["epochs"][0]["train_loss"] for name in ("static", "over")]
    assert losses[0] != losses[1]

    rows = {"lora": {"r": 2}, "over": {**STATIC, "over": "lora"}}
    other = by_label(read_plan(changed("rank", lambda values: values.update(methods=rows, seeds=[0])), {}))["over"]
    assert other.folder != cells["over"].cell.folder and other.read() is None


def test_the_source_decides(resumed: list[str], plan: Plan, transfer: Path) -> None:
    """Another source, or another setting of its training, is another cell; the users' share alone is not."""
    source = by_label(plan)["zero"].source
    assert source is not None
    values = yaml.safe_load(transfer.read_text())
    for change, stays in (
        (lambda: values["source"].update(max_users=9), False),
        (lambda: values["source"].update(max_users=8), True),
        (lambda: values["methods"]["half"].update(train_fraction=0.25), True),
        (lambda: values["methods"]["half"].update(collaborative_dropout=0.1), False),
    ):
        change()
        other = transfer.with_name("changed.yaml")
        other.write_text(yaml.safe_dump(values, sort_keys=False))
        found = by_label(read_plan(other, {}))["half"].source
        assert found is not None and (found.identity == source.identity) == stays
        assert (found.read() is not None) == stays


def test_without_these_settings_nothing_is_another_cell(plan: Plan, transfer: Path) -> None:
    """All users and no source are what a row is without saying so."""
    values = yaml.safe_load(transfer.read_text())
    row = values["methods"]["half"]
    values["methods"] = {
        "laser": {name: row[name] for name in row if name not in ("method", "line", "source", "train_fraction")},
        "all": {**row, "source": False, "train_fraction": 1.0},
        "sasrec": None,
    }
    other = transfer.with_name("plain.yaml")
    other.write_text(yaml.safe_dump(values, sort_keys=False))
    cells = by_label(read_plan(other, {}))
    assert cells["laser"].folder == cells["all"].folder and cells["all"].source is None
    expected = {"method", "settings", "training", "seed", "data", "versions", "model"}
    assert set(cells["laser"].identity) == expected
    assert cells["sasrec"].folder == by_label(plan)["sasrec"].folder


def test_damaged_weights_are_trained_again(resumed: list[str], plan: Plan) -> None:
    source = by_label(plan)["zero"].source
    assert source is not None and source.read() is not None
    path = source.folder / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert source.read() is None
    path.write_bytes(content)
    assert source.read() is not None


def test_the_table_says_what_the_source_took(resumed: list[str], plan: Plan, transfer: Path) -> None:
    out = transfer.with_name("out")
    text = (out / "transfer.md").read_text(encoding="utf-8")
    assert text in resumed[1] and str(out.parent) not in text
    assert "| zero‡ |" in text and "| half*‡ |" in text and "8 of 16 users, seed 0" in text
    assert "`zero`: 24 rows in " in text
    assert (out / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    table: dict[str, Any] = summarise(plan, list(finished(plan).values()), {}, plan.load_data())
    shares = [("sasrec", 0.5), ("sasrec", 1.0), ("from source", 0.0), ("from source", 0.5)]
    lines = [(row["line"], row["train_fraction"]) for row in table["rows"].values()]
    assert lines == [(None, 1.0), *shares, *[(None, 1.0)] * 3]
    assert (
        to_markdown(table) == text
        and json.loads((out / "transfer.json").read_text())["rows"].keys() == table["rows"].keys()
    )


def test_a_share_trains_otherwise(resumed: list[str], plan: Plan) -> None:
    cells = finished(plan)
    for one, other in (("sasrec, half", "sasrec"), ("zero", "half")):
        assert not np.array_equal(cells[one].report.ranks_unfiltered, cells[other].report.ranks_unfiltered)
