"""What a YAML file of compare.py may say, and what a cell is named by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench import cells
from bench.comparison import cells_of
from bench.methods import METHODS
from bench.methods.trial import Method
from bench.plan_file import read_plan

from peft_bituning.data import Interactions
from peft_bituning.errors import ConfigurationError

FILES = sorted((Path(__file__).parents[2] / "examples" / "benchmarks" / "compare").glob("*.yaml"))
LASER_FROM_SOURCE = {"method": "laser", "source": True}
STATIC_OVER = {"method": "bituning-static", "over": "lora"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"dora": None}}, "methods must be among .*popularity, .* got 'dora'"),
        ({"methods": {}}, "methods must be rows by name, got {}; known: .*laser"),
        ({"methods": {"lora": 3}}, "lora must be lines of `name: value`, got 3"),
        ({"seeds": [1, 1]}, "seeds must be different numbers, at least one, got"),
        ({"seeds": [True]}, "seeds must be a valid integer, got True"),
        ({"methods": {"lora": {"training": {"stage1_epochs": 9}}}}, "training of lora must be among learning_rate"),
        ({"training": {"epochs": 9}}, "training must hold fields of LaserArguments, got epochs"),
        ({"training": {"seed": 9}}, "training must leave seed to the comparison"),
        ({"training": {"temperature": "1e-2"}}, "temperature of training must be a valid number, got '1e-2'"),
        ({"training": {"temperature": -1}}, "temperature must be > 0, got -1"),
        ({"baseline": "full"}, "baseline must be one of the methods, got 'full'"),
        ({"epochs": 9}, "config.yaml must hold based_on, methods, .*, got epochs"),
        ({"name": "x"}, "config.yaml must hold based_on, methods, .*, got name"),
        ({"based_on": "config.yaml"}, "based_on must not lead back to the file itself, got 'config.yaml'"),
        ({"based_on": "nothing.yaml"}, "--config must be a readable YAML file, got .*nothing.yaml"),
        ({"varies": ["seed"]}, "varies must leave seed to the comparison"),
        (
            {"training": {"group_cuts": True}},
            "training must leave group_cuts at False, got True; the version that took",
        ),
        ({"varies": ["epochs"]}, "varies must be fields of LaserArguments, got epochs"),
        ({"model_dtype": "int8"}, "model_dtype must be 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ({"published": "yes"}, "published must be a valid boolean, got 'yes'"),
        ({"cold_start": {"user_events": 3}}, "item_events of cold_start must be given, got {'user_events': 3}"),
        ({"cold_start": {"user_events": 3, "item_events": -1}}, "item_events of cold_start must be greater .* to 0"),
        ({"paper": {"popularity": [0.1]}}, "paper must hold Recall@10, NDCG@10 and MRR of rows of the file"),
        ({"source": {"max_users": 3}}, "dataset of source must be given, got"),
        ({"source": {"dataset": "x", "users": 3}}, "source must hold dataset, max_users, got users"),
        ({"source": {"dataset": "x", "max_users": 0}}, "max_users of source must be greater .* to 1, got 0"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"methods": {"popularity": None}, **change}))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(path, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"method": "sasrec", "train_fraction": 0}, "train_fraction of row must be > 0 without `source: true`"),
        ({"method": "laser", "train_fraction": 0}, "train_fraction of row must be > 0 without `source: true`"),
        ({"method": "sasrec", "train_fraction": 1.5}, "train_fraction of row must be less .* to 1, got 1.5"),
        ({"method": "sasrec", "train_fraction": True}, "train_fraction of row must be a valid number, got True"),
        ({"method": "popularity", "train_fraction": 0.5}, "train_fraction of row must be 1 for its method, got 0.5"),
        ({"method": "sasrec", "source": True}, "source of row must be left out for its method"),
        ({"method": "laser", "source": "toys"}, "source of row must be a valid boolean, got 'toys'"),
        (LASER_FROM_SOURCE, "source must be {dataset: NAME, max_users: N} for row, .* --source"),
        (
            {"method": "bituning-static", "over": "dora"},
            "over of row must be a row .* whose method is lora, got 'dora'",
        ),
        ({"method": "bituning-static", "over": "other"}, "over of row must be a row .* method is lora, got 'other'"),
        ({"method": "ssna", "over": "lora"}, "over of row must be left out for its method"),
        ({**STATIC_OVER, "train_fraction": 0.5}, "over of row must stand without source and train"),
    ],
)
def test_rows_that_do_not_fit(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    values = {"methods": {"row": row, "lora": None, "other": {"method": "full"}}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(path, {})
    saved = {
        "methods": {"row": LASER_FROM_SOURCE},
        "source": {"dataset": "x"},
        "training": {"id_recommender": "a/folder"},
    }
    path.write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigurationError, match="id_recommender of row must be bert4rec or sasrec, .* got 'a/folder'"):
        read_plan(path, {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_every_file_that_ships(path: Path, smoke: bool, tiny_folder: str, tiny_data: Interactions) -> None:
    """It can be read, and every cell has a place; the large ones hold every method that is compared."""
    plan = read_plan(path, {"dataset": tiny_folder, "source": tiny_folder}, smoke)
    made = cells_of(plan, tiny_data)
    assert [cell.label for cell in made if cell.seed == plan.seeds[0]] == list(plan.methods)
    for cell in made:
        row = plan.methods[cell.label]
        assert cell.identity["settings"] == row.settings and cell.folder.parent.name == row.method
        names = {cells.FORMER.get(name, name) for name in METHODS[row.method].arguments}
        assert cell.identity["training"].keys() == names
        assert (cell.source is not None, cell.over is not None) == (row.source, row.over is not None)
    if path.stem in ("ml100k", "scientific_tiny"):
        expected = {name for name in METHODS if not name.startswith("hybrid")} - {"bituning-none"}
        assert {row.method for row in plan.methods.values()} == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [("ml100k.yaml", "30c0f615c549"), ("scientific_tiny.yaml", "96f6f49a653e"), ("table4_parts.yaml", "717dd744d604")],
)
def test_cells_of_before_are_found_again(file: str, expected: str, tiny_folder: str, tiny_data: Interactions) -> None:
    """Settings have the names, and mean what they meant, in the version that first wrote these files (d2f0363)."""
    path = next(path for path in FILES if path.name == file)
    made = cells_of(read_plan(path, {"dataset": tiny_folder, "seeds": [0]}), tiny_data)
    assert cells.digest({cell.label: cell.identity["training"] for cell in made}) == expected


def test_a_question_lets_its_rows_vary(changed: Callable[..., Path]) -> None:
    def change(values: Any) -> None:
        values |= {"varies": ["stage1_epochs"], "methods": {"laser": {"training": {"stage1_epochs": 0}}}}

    arguments = read_plan(changed("varies", change), {}).arguments("laser", 0, Path("."))
    assert (arguments.stage1_epochs, arguments.stage2_epochs) == (0, 1)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ({"methods": 3}, {"methods": ["a"]}, "methods of file.yaml must hold lines of `name: value`, got 3"),
        ({"methods": ["a"]}, {"methods": ["a"]}, "methods of file.yaml must hold lines of `name: value`, got"),
        ({"methods": {"lora": None}, "paper": 3}, {"methods": ["lora"]}, "paper of file.yaml must hold lines"),
        ({"methods": {"lora": {"over": ["x"]}}}, {"methods": ["lora"]}, "over of lora must be a valid string"),
        ({"methods": {"lora": None}, "source": "x"}, {"source": "y"}, "source of file.yaml must hold lines"),
        (
            {"based_on": "below.yaml", "training": 3},
            {},
            "training of file.yaml must hold lines of `name: value`",
        ),
    ],
)
def test_what_is_read_before_the_check(values: Any, changes: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("training: {}")
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(tmp_path / "file.yaml", changes)


def test_rows_are_chosen_with_what_the_file_says_of_them() -> None:
    """Of the others neither the paper's numbers nor the baseline are asked for."""
    (path,) = (path for path in FILES if path.stem == "table4_parts")
    plan = read_plan(path, {"methods": ["w/o MoE"]})
    assert (list(plan.methods), list(plan.paper), plan.baseline) == (["w/o MoE"], ["w/o MoE"], None)
    assert read_plan(path, {"methods": ["laser", "w/o MoE"]}).baseline == "laser"
    with pytest.raises(ConfigurationError, match="--methods must be rows of table4_parts.yaml, got dora"):
        read_plan(path, {"methods": ["dora"]})


def test_a_moment_of_every_row(config: Path, changed: Callable[..., Path]) -> None:
    plan = read_plan(config, {}, smoke=True)
    arguments = plan.arguments("laser", 0, Path("."))
    assert (plan.seeds, plan.max_users, Path(plan.output_dir).name) == ([0], 60, "out-smoke")
    assert (arguments.stage1_epochs, arguments.stage2_epochs, arguments.max_samples_per_epoch) == (1, 1, 16)
    assert arguments.cuts == "last_cut"
    for users, expected in ((8, 8), (None, 60)):
        path = changed("moment", lambda values, users=users: values.update(source={"dataset": "x", "max_users": users}))
        source = read_plan(path, {"source": "ml-100k"}, smoke=True).source
        assert source is not None and (source.dataset, source.max_users) == ("ml-100k", expected)


def test_numbers_stay_as_they_are_written(changed: Callable[..., Path], tiny_data: Interactions) -> None:
    """An integer for a float is another text, hence was another cell, and is still."""
    one, other = (
        cells_of(
            read_plan(changed("number", lambda values, n=n: values["training"].update(temperature=n)), {}), tiny_data
        )
        for n in (1, 1.0)
    )
    assert one[1].identity == other[1].identity and one[1].folder != other[1].folder


def test_a_field_that_is_gone(
    changed: Callable[..., Path], tiny_data: Interactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value stays in the identity, may still be said, and no other is taken; not by a row either."""
    monkeypatch.setitem(cells.RETIRED, "old_knob", 1.0)
    laser = METHODS["laser"]
    monkeypatch.setitem(METHODS, "laser", Method(laser.run, arguments=(*laser.arguments, "old_knob")))

    def cell(value: Any) -> Any:
        return cells_of(read_plan(changed("gone", lambda each: each["training"].update(value)), {}), tiny_data)[1]

    assert cell({}).identity["training"]["old_knob"] == 1.0
    assert cell({"old_knob": 1.0}).folder == cell({}).folder
    assert not hasattr(cell({"old_knob": 1.0}).arguments, "old_knob")
    with pytest.raises(ConfigurationError, match="training must leave old_knob at 1.0, got 2.0; the version that took"):
        cell({"old_knob": 2.0})
    path = changed("gone", lambda each: each["methods"]["laser"].update(training={"old_knob": 2.0}))
    with pytest.raises(ConfigurationError, match="training of laser must leave old_knob at 1.0, got 2.0"):
        read_plan(path, {})
