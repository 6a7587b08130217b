"""The example that encodes a catalog: a recommender's own, new items, and what it refuses."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from peft_bituning import LaserRecommender
from peft_bituning.catalog import ItemTable
from peft_bituning.data import ItemCatalog
from peft_bituning.errors import ArtifactError, ConfigurationError, DataError

pytestmark = pytest.mark.timeout(900)  # processes of their own

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "by_feature" / "encode_catalog.py"
NEW = [{"item_id": f"new{n}", "title": f"Gold ladder of {n} steps", "brand": "Acme", "size": n} for n in range(7)]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("encode_catalog", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def flags(trained, tmp_path: Path) -> list[str]:
    places = ["--model", str(trained.folder), "--base_model", str(trained.base_folder)]
    return [*places, "--output_dir", str(tmp_path / "table"), "--disable_tqdm"]


@pytest.fixture
def new_items(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in NEW))
    return path


def read(folder: Path) -> tuple[ItemCatalog, ItemTable]:
    catalog = ItemCatalog.from_jsonl(folder / "items.jsonl")
    return catalog, ItemTable.load(folder / "item_table.safetensors", len(catalog))


def smallest_cosine(found: ItemTable, expected: np.ndarray) -> float:
    rows, wanted = found.embeddings.float(), torch.from_numpy(expected)
    return float(torch.nn.functional.cosine_similarity(rows, wanted).min())


def test_the_catalog_of_a_recommender(script: ModuleType, flags: list[str], trained, tmp_path: Path, capsys) -> None:
    script.main([*flags, "--block_size", "5"])
    assert f"12 items of width 32 in {tmp_path / 'table' / 'item_table.safetensors'}" in capsys.readouterr().out
    catalog, table = read(tmp_path / "table")
    assert catalog == trained.recommender.items
    assert table.embeddings.numpy() == pytest.approx(trained.recommender.table.embeddings.numpy(), abs=1e-5)
    assert len((tmp_path / "table" / "blocks-0.jsonl").read_text().split("\n\n")) == 3
    files = ["blocks-0.jsonl", "item_table.safetensors", "items.jsonl", "origin.json"]
    assert sorted(path.name for path in (tmp_path / "table").iterdir()) == files


def test_new_items_in_two_processes(flags: list[str], new_items: Path, trained, tmp_path: Path) -> None:
    """As people run it; the rows are those that `add_items` would give them."""
    config = ROOT / "examples" / "configs" / "accelerate" / "ddp.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *flags, "--items", str(new_items), "--block_size", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 of 4 blocks are there, 4 are encoded" in done.stderr
    assert done.stdout.count("7 items of width 32 in ") == 1
    catalog, table = read(tmp_path / "table")
    assert list(catalog.item_ids) == [row["item_id"] for row in NEW]
    recommender = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    recommender.add_items(NEW)
    assert table.embeddings.numpy() == pytest.approx(recommender.table.embeddings[12:].numpy(), abs=1e-5)


def test_bfloat16(script: ModuleType, flags: list[str], new_items: Path, trained, tmp_path: Path) -> None:
    script.main([*flags, "--bf16", "--store_bf16"])
    _, table = read(tmp_path / "table")
    assert table.embeddings.dtype == torch.bfloat16
    assert smallest_cosine(table, trained.recommender.table.embeddings.numpy()) > 0.99
    with pytest.raises(ArtifactError, match="identity.weights was 'bfloat16' and is 'float32'"):
        script.main([*flags, "--store_bf16"])


def test_the_table_serves(script: ModuleType, flags: list[str], new_items: Path, trained, tmp_path: Path) -> None:
    """The table of a catalog takes the place of the saved one, as docs/large_catalogs.md says."""
    script.main(flags)
    catalog, table = read(tmp_path / "table")
    old = trained.recommender
    served = LaserRecommender(
        old.base, old.model, catalog, table, old.template, old.id_recommender, old.settings, device="cpu"
    )
    found, expected = (each.recommend([["007", "8"]], k=5, parts="laser")[0] for each in (served, old))
    assert [item for item, _ in found] == [item for item, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    served.save_pretrained(tmp_path / "served")
    again = LaserRecommender.from_pretrained(tmp_path / "served", base_model=trained.base_folder, device="cpu")
    assert again.table.checksum() == table.checksum()


def test_other_items_or_weights_need_another_folder(
    script: ModuleType, flags: list[str], new_items: Path, trained, tmp_path: Path
) -> None:
    script.main([*flags, "--items", str(new_items)])
    with new_items.open("a") as file:
        file.write(json.dumps({"item_id": "late", "title": "Late"}) + "\n")
    with pytest.raises(ArtifactError, match=r"identity.items was .*shape was \[7\] and is \[8\]; give another folder"):
        script.main([*flags, "--items", str(new_items)])
    other = Path(shutil.copytree(trained.folder, tmp_path / "other"))
    recommender = LaserRecommender.from_pretrained(other, base_model=trained.base_folder, device="cpu")
    suffix = next(value for name, value in recommender.model.named_parameters() if "suffix" in name and "items" in name)
    suffix.data += 1
    recommender.save_pretrained(other)
    with pytest.raises(ArtifactError, match="identity.items/adapter_model.safetensors was "):
        script.main([*flags, "--model", str(other)])


def test_items_that_cannot_be_taken(script: ModuleType, flags: list[str], new_items: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        script.main([*flags, "--items", str(tmp_path / "none.jsonl")])
    new_items.write_text('{"item_id": "007", "title": "Brass lamp"}\n')
    with pytest.raises(DataError, match="Already in the catalog: '007'"):
        script.main([*flags, "--items", str(new_items)])
    new_items.write_text('{"item_id": "a", "title": "A"}\nbroken\n')
    with pytest.raises(DataError, match="1 of 2 rows of new.jsonl were rejected"):
        script.main([*flags, "--items", str(new_items)])
    script.main([*flags, "--items", str(new_items), "--max_rejected", "0.5"])
    assert json.loads((tmp_path / "table" / "rejects.jsonl").read_text())["kind"] == "broken_json"
    assert read(tmp_path / "table")[0].item_ids == ("a",)


@pytest.mark.parametrize("flag", ["block_size", "batch_size"])
def test_numbers_out_of_range(script: ModuleType, flags: list[str], flag: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{flag} must be >= 1, got 0"):
        script.main([*flags, f"--{flag}", "0"])
