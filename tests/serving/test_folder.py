"""Folders that are incomplete, changed or mixed: a clear error each, never random weights.

Where a file is changed here, the manifest is often rewritten too (`sign`), so that the check behind it is what speaks.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_bituning import LaserRecommender, prefix_encoders
from peft_bituning.base_models import BaseModel
from peft_bituning.catalog import ItemTable
from peft_bituning.errors import AdapterLoadError, ArtifactError, ConfigurationError
from peft_bituning.recommenders import build_recommender
from peft_bituning.serving.folder import item_identity

ADAPTER = "adapter_model.safetensors"


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; None takes a key out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture
def load(copied: Path, trained) -> Callable[..., LaserRecommender]:
    return lambda base_model=trained.base_folder: LaserRecommender.from_pretrained(copied, base_model=base_model)


NEEDED = [
    "laser.json",
    "template.json",
    "catalog/items.jsonl",
    "catalog/item_table.safetensors",
    "adapter_config.json",
    ADAPTER,
    "items/adapter_config.json",
    f"items/{ADAPTER}",
    "recommender/config.json",
    "recommender/model.safetensors",
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_truncated_or_changed_file_is_named(copied, load, name: str) -> None:
    content = (copied / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (copied / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"1 files are not the ones .* first {name}; .* download or save"):
            load()
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=rf"1 files are missing, first {name}; .* repeat it"):
        load()


@pytest.mark.parametrize("name", NEEDED)
def test_a_file_that_the_manifest_leaves_out_is_named(copied, load, sign, name: str) -> None:
    (copied / name).unlink()
    sign(copied)
    with pytest.raises(ArtifactError, match=f"manifest.json must list every file of the folder, .*{name}"):
        load()


@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_file_under_a_fresh_manifest_is_still_refused(copied, load, sign, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: len(content) // 2])
    sign(copied)
    with pytest.raises((ArtifactError, AdapterLoadError)) as caught:
        load()
    assert any(each in str(caught.value) for each in (name, Path(name).name))


def test_a_card_may_be_edited(copied, load) -> None:
    (copied / "README.md").write_text("My own words.")
    load()
    (copied / "README.md").unlink()
    load()


# ---------------------------------------------------------------------- the manifest


def test_a_folder_without_manifest(copied, load) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="holds no manifest.json, so it is no saved LaserRecommender; give the"):
        load()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3}', "\ufffd{"])
def test_a_damaged_manifest(copied, load, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="manifest.json cannot be read .*; download or save the folder again"):
        load()


def test_an_interrupted_save_is_no_saved_folder(copied, load, monkeypatch, loaded) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_bituning.serving.folder.write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        loaded.save_pretrained(copied)
    with pytest.raises(ArtifactError, match="holds no manifest.json"):
        load()


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("place", ["", "items/"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, value: {}, "missing: "),
        (lambda name, value: {name: value, "base_model.model.extra.weight": torch.zeros(2)}, "unexpected: .*extra"),
        (lambda name, value: {f"{name}.old": value}, "missing: .*unexpected: "),
        (lambda name, value: {name: value[..., :-1].contiguous()}, r"of another shape: .*: file \[.*\], model \["),
    ],
)
def test_adapter_tensors_that_do_not_fit(copied, load, sign, place: str, change, message: str) -> None:
    path = copied / f"{place}{ADAPTER}"
    tensors = load_file(path)
    for name in (
        next(name for name in tensors if "router" in name),
        next(name for name in tensors if "suffix" in name),
    ):
        others = {key: value for key, value in tensors.items() if key != name}
        save_file({**others, **change(name, tensors[name])}, path)
        sign(copied)
        with pytest.raises(AdapterLoadError, match=message):
            load()


def test_the_bare_adapter_is_loaded_as_strictly(copied, tiny_base) -> None:
    tensors = load_file(copied / ADAPTER)
    name = next(name for name in tensors if "router" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, copied / ADAPTER)
    with pytest.raises(AdapterLoadError, match="missing: .*router"):
        PeftModel.from_pretrained(tiny_base().model, copied)


def test_an_adapter_of_other_sizes(copied, load, sign) -> None:
    edit(copied / "adapter_config.json", num_virtual_tokens=3)
    sign(copied)
    with pytest.raises(AdapterLoadError, match="of another shape: "):
        load()


def test_an_adapter_of_an_unknown_prefix_encoder(copied, load, sign) -> None:
    edit(copied / "adapter_config.json", prefix_encoder="of-somebody-else")
    sign(copied)
    with pytest.raises(
        ArtifactError, match=f"adapter_config.json .*must be one of {', '.join(prefix_encoders())}, got"
    ):
        load()


# ---------------------------------------------------------------------- what belongs together


def test_another_recommender(copied, load, sign) -> None:
    shutil.rmtree(copied / "recommender")
    build_recommender("sasrec", 12, seed=5).save_pretrained(copied / "recommender")
    sign(copied)
    with pytest.raises(
        ArtifactError, match="the ID recommender in recommender/ is not the one the adapter was trained"
    ):
        load()


def test_a_recommender_with_other_settings(copied, load, sign) -> None:
    edit(copied / "recommender" / "config.json", max_length=7)
    sign(copied)
    with pytest.raises(ArtifactError, match="recommender"):
        load()


def test_a_table_of_another_size(copied, load, sign) -> None:
    path = copied / "catalog" / "item_table.safetensors"
    save_file({"embeddings": load_file(path)["embeddings"][:-1].contiguous()}, path)
    sign(copied)
    with pytest.raises(ArtifactError, match="item_table.safetensors must have 12 rows, one an item, got 11"):
        load()


def test_a_table_of_another_save(copied, load, sign) -> None:
    path = copied / "catalog" / "item_table.safetensors"
    save_file({"embeddings": load_file(path)["embeddings"].flip(0).contiguous()}, path)
    sign(copied)
    with pytest.raises(ArtifactError, match="is not the table that laser.json names"):
        load()


def test_a_catalog_that_repeats_an_item(copied, load, sign) -> None:
    path = copied / "catalog" / "items.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[0]]))
    sign(copied)
    with pytest.raises(ArtifactError, match="items.jsonl cannot be used: .*'007'"):
        load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, r"laser.json must have format_version 1, got 99; use the version .* \(0\.1\.0\)"),
        ({"format_version": None}, "must have format_version 1, got None"),
        ({"max_length": None}, "laser.json cannot be read .*max_length"),
        ({"surprise": 1}, "laser.json cannot be read .*surprise"),
    ],
)
def test_settings_of_another_kind(copied, load, sign, changes: dict[str, Any], message: str) -> None:
    edit(copied / "laser.json", **changes)
    sign(copied)
    with pytest.raises(ArtifactError, match=message):
        load()


# ---------------------------------------------------------------------- the language model


def test_another_configuration_of_the_language_model(load, tiny_base, tmp_path) -> None:
    base = tiny_base()
    base.model.config.num_hidden_layers = 1
    other = BaseModel(LlamaForCausalLM(base.model.config), base.tokenizer, "tiny-llama", is_local=True)
    with pytest.raises(ArtifactError, match=r"'tiny-llama' is not the one .*: num_hidden_layers 1 \(trained with 2\)"):
        load(other)


def test_another_name_of_the_language_model(load, tiny_base) -> None:
    base = tiny_base()
    with pytest.raises(ArtifactError, match="'someone/other' is not the one .* though their configurations agree"):
        load(BaseModel(base.model, base.tokenizer, "someone/other"))


def test_a_local_folder_may_be_named_otherwise(load, trained, tmp_path) -> None:
    elsewhere = shutil.copytree(trained.base_folder, tmp_path / "renamed")
    assert load(elsewhere).recommend([["007"]], k=3) == trained.recommender.recommend([["007"]], k=3)


def test_a_local_language_model_has_to_be_given(copied, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="was a local folder named 'tiny-llama', .*; give it as base_model="):
        LaserRecommender.from_pretrained(copied)
    (tmp_path / "tiny-llama").symlink_to(trained.base_folder)
    assert LaserRecommender.from_pretrained(copied).recommend([["007"]], k=1)


def test_a_language_model_that_cannot_be_found(load, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="the base model 'someone/never-seen' cannot be loaded"):
        load("someone/never-seen")


def test_another_type_of_weights_is_still_the_same_language_model(copied, trained) -> None:
    recommender = LaserRecommender.from_pretrained(copied, base_model=trained.base_folder, dtype=torch.bfloat16)
    exact = trained.recommender.encode_users([["007", "8"]], normalize_embeddings=True)
    assert recommender.encode_users([["007", "8"]], normalize_embeddings=True) == pytest.approx(exact, abs=0.1)


# ---------------------------------------------------------------------- the item table


def test_a_recommender_is_saved_over_the_folder_that_its_table_is_mapped_from(copied, load) -> None:
    recommender = load()
    before = recommender.recommend([["007", "8"]], k=5)
    for _ in range(2):
        recommender.save_pretrained(copied)
    assert recommender.recommend([["007", "8"]], k=5) == load().recommend([["007", "8"]], k=5) == before


def test_a_bfloat16_table_is_saved_and_loaded(copied, load, tmp_path) -> None:
    recommender = load()
    recommender.table = ItemTable(recommender.table.embeddings.bfloat16())
    recommender.save_pretrained(copied)
    again = load()
    assert again.table.embeddings.dtype == torch.bfloat16
    again.add_items([{"item_id": "new", "title": "Gold ladder"}])
    assert again.table.embeddings.dtype == torch.bfloat16 and len(again.recommend([["new"]], k=20)[0]) == 12


def test_the_identity_of_item_embeddings(copied, sign, trained) -> None:
    before = item_identity(copied)
    assert before == item_identity(trained.folder) == json.loads(json.dumps(before))
    assert before["recommender"] == trained.recommender.id_recommender.content_hash()
    for name in (ADAPTER, "recommender/config.json", "README.md"):  # what users alone depend on, or nothing
        (copied / name).write_bytes((copied / name).read_bytes() + b" ")
    sign(copied)
    assert item_identity(copied) == before
    settings = json.loads((copied / "laser.json").read_text())
    (copied / "laser.json").write_text(json.dumps({**settings, "max_length": 77, "max_collaborative_items": 9}))
    (copied / "catalog" / "items.jsonl").write_text('{"item_id": "a"}\n')
    sign(copied)
    changed = {key for key, value in item_identity(copied).items() if before[key] != value}
    assert changed == {"max_length", "catalog/items.jsonl"}


@pytest.mark.parametrize("name", [f"items/{ADAPTER}", "template.json", "catalog/items.jsonl"])
def test_the_identity_of_a_damaged_folder(copied, sign, name: str) -> None:
    os.truncate(copied / name, 5)
    with pytest.raises(ArtifactError, match=f"1 files are not the ones that were saved .* first {name}"):
        item_identity(copied)
    (copied / name).unlink()
    sign(copied)
    with pytest.raises(ArtifactError, match=f"manifest.json must list every file of the folder, but leaves out {name}"):
        item_identity(copied)
