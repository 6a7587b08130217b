"""compare.py with a row over another row's LoRA: trained once, kept, merged, and part of what the row is."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_bituning.errors import ConfigurationError

pytestmark = pytest.mark.timeout(900)  # the fixtures run compare.py

BENCHMARKS = Path(__file__).parents[3] / "examples" / "benchmarks"

from bench.comparison import cells_of, read_finished  # noqa: E402
from bench.plan_file import read_plan  # noqa: E402
from compare import main  # noqa: E402

ROW = {"method": "bituning-static", "num_virtual_tokens": 2}


def values(folder: Path, base: Path, **methods: Any) -> dict[str, Any]:
    """Return a configuration of a few rows over the tiny catalog."""
    return {
        "dataset": f"folder:{folder / 'data'}",
        "model": str(base),
        "output_dir": str(folder / "out"),
        "training": {"stage1_epochs": 1, "stage2_epochs": 0, "cuts": "last_cut", "learning_rate": 5e-3}
        | {"template": "no_instruction", "recommender_epochs": 1, "disable_tqdm": True},
        "methods": {"lora": None, "static": ROW, "over": {**ROW, "over": "lora"}} | methods,
    }


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "items.jsonl").write_text(
        "".join(f'{{"item_id": "i{item}", "title": "thing {item}"}}\n' for item in range(8))
    )
    events = [f"{user},i{(user * 3 + step) % 8},{step}" for user in range(12) for step in range(5)]
    (data / "interactions.csv").write_text("\n".join(["user_id,item_id,order", *events]) + "\n")
    path = tmp_path / "over.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path, tiny_base_folder), sort_keys=False))
    return path


def printed(*argv: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(list(argv)) == 0, text.getvalue()
    return text.getvalue()


def test_a_row_over_another(config: Path, tmp_path: Path, tiny_base_folder: Path) -> None:
    """Asked for alone it brings the row below, whose cell the table shares; another LoRA is another cell."""
    text = printed("--config", str(config), "--methods", "over")
    assert "[1/2] over, seed 0: first lora" in text and "| over§ |" in text and "`over`: `lora`, 12 rows in" in text
    plan = read_plan(config, {})
    cells = {cell.label: cell for cell in cells_of(plan, plan.load_data())}
    lora, over = cells["lora"], cells["over"]
    assert over.over is not None and over.over.identity == lora.identity
    stamp = (lora.folder / "cell.json").stat().st_mtime_ns
    printed("--config", str(config))
    assert (lora.folder / "cell.json").stat().st_mtime_ns == stamp
    losses = {
        name: read_finished(cells[name]).values["details"]["epochs"][0]["train_loss"] for name in ("static", "over")
    }
    assert losses["static"] != losses["over"]

    config.write_text(yaml.safe_dump(values(tmp_path, tiny_base_folder, lora={"r": 2})))
    other = next(cell for cell in read_plan(config, {}).cells(plan.load_data()) if cell.label == "over")
    assert other.folder != over.folder and read_finished(other) is None


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"over": {**ROW, "over": "dora"}}, "over of over must be a row .* whose method is lora, got 'dora'"),
        ({"over": {**ROW, "over": "static"}}, "over of over must be a row .* whose method is lora, got 'static'"),
        ({"ssna": {"over": "lora"}}, "over of ssna must be left out for its method"),
        ({"over": {**ROW, "over": "lora", "train_fraction": 0.5}}, "over of over must stand without source and train"),
    ],
)
def test_refusals(methods: dict[str, Any], message: str, tmp_path: Path, tiny_base_folder: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path, tiny_base_folder, **methods)))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(path, {})
