"""The tiny data in a folder, comparisons over it, and trials over few users."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bench.methods import Trial
from bench.plan import DEFAULTS

from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.training import LaserArguments

LASER = {
    "num_virtual_tokens": 2,
    "num_experts": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
}
TRAINING = {
    "stage1_epochs": 2,
    "stage2_epochs": 1,
    "max_samples_per_epoch": 16,
    "learning_rate": 5e-3,
    "id_recommender": "sasrec",
    "id_recommender_epochs": 2,
    "save_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Interactions) -> str:
    """Return the tiny data as a data set's name, `folder:PATH`."""
    folder = tmp_path_factory.mktemp("data")
    items = tiny_data.items
    records = [{"item_id": item_id, "title": f"thing {row}"} for row, item_id in enumerate(items.item_ids)]
    (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [
        f"{user},{items.item_ids[item]},{order}"
        for user, history in zip(tiny_data.user_ids, tiny_data.histories, strict=True)
        for order, item in enumerate(history)
    ]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,order", *events]) + "\n")
    return f"folder:{folder}"


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_folder: str, tiny_base_folder: Path) -> Path:
    """Return a configuration of three methods and two seeds over the tiny data; its results are in `out` beside it."""
    folder = tmp_path_factory.mktemp("compare")
    values = {
        "dataset": tiny_folder,
        "model": str(tiny_base_folder),
        "output_dir": str(folder / "out"),
        "seeds": [0, 1],
        "published": True,
        "training": {**TRAINING, "cuts": "last_cut", "template": "no_instruction"},
        "methods": {"popularity": None, "laser": LASER, "lora": {"r": 2, "training": {"learning_rate": 1e-3}}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def changed(config: Path) -> Callable[..., Path]:
    """Return a writer of that configuration with changes, `changed("name", lambda values: ...)`."""

    def write(name: str, change: Callable[[Any], Any]) -> Path:
        values = yaml.safe_load(config.read_text())
        change(values)
        path = config.with_name(f"{name}.yaml")
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def printed() -> Callable[..., str]:
    """Return a runner of a program in this process, `printed(main, *argv)`, which returns what it printed."""

    def run(main: Callable[[list[str]], int], *argv: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert main(list(argv)) == 0, text.getvalue()
        return text.getvalue()

    return run


@pytest.fixture
def make_trial(few: Interactions, tiny_base: Callable[[], BaseModel], tmp_path: Path) -> Callable[..., Trial]:
    """Return a maker of trials over few users, all of which share a folder beside their own."""

    def make(method: str, folder: str = "", settings: Any = None, **changes: Any) -> Trial:
        training = {**DEFAULTS, **TRAINING, **changes}
        arguments = LaserArguments(output_dir=str(tmp_path / (folder or method)), **training)
        split, cpu = LeaveOneOut(few.histories), torch.device("cpu")
        return Trial(method, settings or {}, few, split, tiny_base, arguments, tmp_path / "shared", cpu)

    return make
