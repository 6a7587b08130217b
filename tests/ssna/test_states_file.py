"""The file of states: written block by block, read by memory map, every damage found."""

import json

import pytest
import torch
from peft_bituning.ssna.states_file import StatesFile
from safetensors.torch import load_file

from peft_bituning.errors import ArtifactError, ConfigurationError

SHAPE = (7, 2, 5)
STATES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def written(folder, dtype="float32", blocks=(0, 1, 2)):
    file = StatesFile.create(folder, {"base_model": "tiny"}, SHAPE, dtype, block_size=3)
    for block in blocks:
        items = file.items_of(block)
        file.write(block, STATES[items.start : items.stop].to(getattr(torch, dtype)))
    return file


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_and_is_safetensors(dtype, tmp_path):
    file = written(tmp_path, dtype)
    expected = STATES.to(getattr(torch, dtype))
    assert torch.equal(file.values(), expected)
    assert torch.equal(load_file(tmp_path / "states.safetensors")["states"], expected)
    found = StatesFile.find(tmp_path)
    assert found == file and found.num_blocks == 3 and found.finished() == {0, 1, 2}
    assert [len(file.items_of(block)) for block in range(3)] == [3, 3, 1]


def test_blocks_may_come_in_any_order_and_twice(tmp_path):
    file = written(tmp_path, blocks=(2, 0))
    assert file.finished() == {0, 2}
    file.write(0, STATES[:3] + 1)
    file.write(0, STATES[:3])
    file.write(1, STATES[3:6])
    assert file.finished() == {0, 1, 2} and torch.equal(file.values(), STATES)


def test_a_block_whose_bytes_changed_is_not_finished(tmp_path):
    file = written(tmp_path)
    place = tmp_path / "states.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1  # the last item's, in block 2
    place.write_bytes(data)
    assert file.finished() == {0, 1} and file.finished(verify=False) == {0, 1, 2}


def test_an_unfinished_line_of_the_journal_counts_for_nothing(tmp_path):
    file = written(tmp_path, blocks=(0, 1))
    journal = tmp_path / "blocks.jsonl"
    journal.write_text(journal.read_text()[:-20])
    assert file.finished() == {0}
    file.write(1, STATES[3:6])  # behind the broken line
    assert file.finished() == {0, 1}


@pytest.mark.parametrize("kept", [0, 20, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    written(tmp_path)
    place = tmp_path / "states.safetensors"
    place.write_bytes(place.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"must hold \[7, 2, 5\] float32 .* truncated or belongs to another run"):
        StatesFile.find(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"origin": {}}', '{"origin": {}, "shape": [1, 2, 3], "dtype": "int8"}'])
def test_a_damaged_description_is_refused(text, tmp_path):
    written(tmp_path)
    (tmp_path / "origin.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read .*; cache them again with overwrite=True"):
        StatesFile.find(tmp_path)


def test_a_description_of_another_file_is_refused(tmp_path):
    written(tmp_path)
    place = tmp_path / "origin.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "shape": [7, 5, 2]}))
    with pytest.raises(ArtifactError, match="truncated or belongs to another run"):
        StatesFile.find(tmp_path)


def test_create_replaces_and_leaves_other_files_alone(tmp_path):
    written(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    file = StatesFile.create(tmp_path, {"base_model": "other"}, (2, 1, 4), "float32", 8)
    assert file.finished() == set() and not file.values().any()
    assert StatesFile.find(tmp_path) == file and (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_holds_nothing(tmp_path):
    assert StatesFile.find(tmp_path) is None and StatesFile.find(tmp_path / "none") is None


def test_settings_are_checked(tmp_path):
    with pytest.raises(ConfigurationError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        StatesFile.create(tmp_path, {}, SHAPE, "int8", 3)
    with pytest.raises(ConfigurationError, match="block_size must be at least 1, got 0"):
        StatesFile.create(tmp_path, {}, SHAPE, "float32", 0)
    with pytest.raises(ConfigurationError, match="number of items must be at least 1, got 0"):
        StatesFile.create(tmp_path, {}, (0, 1, 1), "float32", 3)
