"""The block file: written block by block, read by memory map, every damage found, and whole after any kill."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_bituning.block_file import BlockFile
from peft_bituning.errors import ArtifactError, ConfigurationError, InputError

SHAPE = (7, 2, 5)
STATES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
ORIGIN = {"base_model": "tiny", "limits": {"max_length": 64, "max_history": None}, "fields": ["brand"]}


def block_file(folder: Path, dtype: str = "float32", **changes: Any) -> BlockFile:
    return replace(BlockFile(folder, "states", "states", ORIGIN, SHAPE, dtype, block_size=3), **changes)


def find(folder: Path) -> BlockFile | None:
    return BlockFile.find(folder, "states", "states")


def written(folder: Path, dtype: str = "float32", blocks: tuple[int, ...] = (0, 1, 2)) -> BlockFile:
    file = block_file(folder, dtype)
    file.create()
    for block in blocks:
        rows = file.rows(block)
        file.write(block, STATES[rows.start : rows.stop].to(getattr(torch, dtype)))
    return file


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_and_is_safetensors(dtype: str, tmp_path: Path) -> None:
    file = written(tmp_path, dtype)
    expected = STATES.to(getattr(torch, dtype))
    assert torch.equal(file.values(), expected)
    save_file({"states": expected}, tmp_path / "theirs")
    assert file.path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert find(tmp_path) == file.begun() == file
    assert file.num_blocks == 3 and file.finished() == {0, 1, 2} and file.finished([1, 2]) == {1, 2}


def test_blocks_may_come_in_any_order_and_twice(tmp_path: Path) -> None:
    file = written(tmp_path, blocks=(2, 0))
    assert file.finished() == {0, 2}
    file.write(0, STATES[:3] + 1)
    file.write(0, STATES[:3])
    file.write(1, STATES[3:6])
    assert file.finished() == {0, 1, 2} and torch.equal(file.values(), STATES)


def test_an_unfinished_block_is_seen_in_the_values(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        values = written(tmp_path, dtype, blocks=(1,)).values()
        assert torch.isnan(values).flatten(1).any(1).tolist() == [False, False, True, False, False, False, True]


def test_a_block_whose_bytes_changed_is_not_finished(tmp_path: Path) -> None:
    file = written(tmp_path)
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1  # the last item's, in block 2
    file.path.write_bytes(data)
    assert file.finished() == {0, 1} and file.finished(verify=False) == {0, 1, 2}


def test_an_unfinished_line_of_the_journal_counts_for_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, blocks=(0, 1))
    journal = tmp_path / "blocks.jsonl"
    journal.write_text(journal.read_text()[:-20])
    assert file.finished() == {0}
    file.write(1, STATES[3:6])  # behind the broken line
    assert file.finished() == {0, 1}
    with journal.open("ab") as stream:  # what a machine without power may leave
        stream.write(bytes(50) + b'\xff\n{"block": 2}\n[]\n{"block": 99, "sha256": "x"}\n')
    assert file.finished() == {0, 1}


def test_states_of_before_are_opened(tmp_path: Path) -> None:
    """The file of an earlier version, whose header has spaces, is read and gone on with."""
    file = written(tmp_path / "now", blocks=(0, 2))
    old = tmp_path / "old"
    (tmp_path / "now").rename(old)
    data = STATES.clone()
    data[3:6] = 0
    header = json.dumps({"states": {"dtype": "F32", "shape": list(SHAPE), "data_offsets": [0, 280]}}).encode()
    header += b" " * (-len(header) % 8)
    (old / "states.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    found = find(old)
    assert found == replace(file, folder=old) and found.finished() == {0, 2}
    found.write(1, STATES[3:6])
    assert found.finished() == {0, 1, 2} and torch.equal(found.values(), STATES)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kept", [0, 20, -1, None])
def test_a_truncated_or_missing_file_is_refused(kept: int | None, tmp_path: Path) -> None:
    file = written(tmp_path)
    if kept is None:
        file.path.unlink()
        assert file.begun() is None  # a kill came before it was made
    else:
        file.path.write_bytes(file.path.read_bytes()[:kept])
    for step in (file.check, file.values, file.finished):
        with pytest.raises(ArtifactError, match=r"must hold states \[7, 2, 5\] float32 .* truncated or belongs to an"):
            step()
    assert file.finished(verify=False) == {0, 1, 2}


@pytest.mark.parametrize(
    "tensors",
    [
        {"states": STATES[:, :1].contiguous()},
        {"states": STATES.half()},
        {"other": STATES},
        {"states": STATES, "more": STATES + 1},
    ],
)
def test_a_file_of_another_run_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = written(tmp_path)
    save_file(tensors, file.path)
    with pytest.raises(ArtifactError, match="truncated or belongs to another run; give another folder"):
        file.check()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"origin": {}}',
        '{"origin": {}, "shape": [1, 2], "dtype": "float32"}',
        '{"origin": {}, "shape": [1, 2], "dtype": "int8", "block_size": 2}',
        '{"origin": {}, "shape": [0, 2], "dtype": "float32", "block_size": 2}',
    ],
)
def test_a_damaged_description_is_refused(text: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    (tmp_path / "origin.json").write_text(text)
    for step in (lambda: find(tmp_path), file.begun):
        with pytest.raises(ArtifactError, match="origin.json cannot be read .*; give another folder, or remove this"):
            step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origin": {**ORIGIN, "base_model": "big"}}, "base_model was 'tiny' and is 'big'; give another folder"),
        ({"origin": {**ORIGIN, "limits": {"max_length": 9}}}, "limits.max_length was 64 and is 9"),
        ({"origin": {}}, "base_model was 'tiny' and is None"),
        ({"shape": (8, 2, 5)}, r"shape was \[7, 2, 5\] and is \[8, 2, 5\]"),
        ({"shape": (8,)}, r"shape was \[7\] and is \[8\]"),
        ({"dtype": "float16"}, "dtype was 'float32' and is 'float16'"),
    ],
)
def test_another_origin_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ArtifactError, match=f"holds states of another origin: .*{message}"):
        replace(file, **changes).begun()
    assert content(tmp_path) == before


def test_the_same_origin_in_other_words_or_blocks_is_gone_on_with(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert replace(file, origin={**ORIGIN, "fields": ("brand",)}).begun() == file
    assert replace(file, block_size=5).begun() == replace(file, shape=(7,)).begun() == file


def test_a_file_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    save_file({"states": STATES}, tmp_path / "states.safetensors")
    with pytest.raises(ArtifactError, match="holds states.safetensors but no origin.json, so it was not made here; gi"):
        block_file(tmp_path).begun()


def test_create_replaces_and_leaves_other_files_alone(tmp_path: Path) -> None:
    mapped = written(tmp_path).values()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "blocks-3.jsonl").symlink_to(tmp_path / "elsewhere")
    file = block_file(tmp_path, origin={"base_model": "other"}, shape=(2, 1, 4), block_size=8)
    file.create()
    assert file.finished() == set() == file.finished(verify=False)
    assert torch.equal(mapped, STATES)  # of the file that was there
    assert find(tmp_path) == file and (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "elsewhere").read_text() == "theirs"


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert find(tmp_path) is None and find(tmp_path / "none") is None and block_file(tmp_path / "none").begun() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"shape": (0, 1, 1)}, r"shape must be sizes >= 1, items first, got \[0, 1, 1\]"),
        ({"shape": ()}, r"shape must be sizes >= 1, items first, got \[\]"),
        ({"origin": {"weights": torch.ones(1)}}, "origin must be JSON values, got .*; write hashes as strings"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        block_file(tmp_path, **changes)


def test_a_block_takes_its_own_rows(tmp_path: Path) -> None:
    file = written(tmp_path)
    for values in (STATES[:2], STATES[:3, :1], STATES[:3].half()):
        with pytest.raises(InputError, match=r"states of block 1 must be \[3, 2, 5\] float32, got \["):
            file.write(1, values)
    assert file.finished() == {0, 1, 2}


# ---------------------------------------------------------------------- several processes, and kills


def fork(action: Any) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def test_two_writers_have_journals_of_their_own(tmp_path: Path) -> None:
    file = block_file(tmp_path, shape=(4000, 40), block_size=10)
    file.create()

    def write(writer: int) -> None:
        for block in range(writer, file.num_blocks, 2):
            file.write(block, torch.full((10, 40), float(block)), writer)

    children = [fork(lambda writer=writer: write(writer)) for writer in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert file.finished() == set(range(400))
    assert torch.equal(file.values(), torch.arange(400.0).repeat_interleave(10)[:, None].expand(4000, 40))
    for writer in (0, 1):
        lines = (tmp_path / f"blocks-{writer}.jsonl").read_text().splitlines()
        assert [json.loads(line)["block"] for line in lines if line] == list(range(writer, 400, 2))


def test_a_damaged_block_may_be_written_again_by_another_writer(tmp_path: Path) -> None:
    file = written(tmp_path)
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1  # of block 2
    file.path.write_bytes(data)
    assert file.finished() == {0, 1}
    file.write(2, STATES[6:] * 2, writer=7)
    assert file.finished() == {0, 1, 2} and torch.equal(file.values()[6:], STATES[6:] * 2)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["blocks-7.jsonl", "blocks.jsonl"]


def test_a_kill_while_blocks_are_written_leaves_no_torn_block_that_counts(tmp_path: Path) -> None:
    """Each block is written again and again, whole of one number, until `kill -9`."""
    file = block_file(tmp_path, shape=(6, 400_000), block_size=2)
    file.create()

    def write() -> None:
        for version in range(1, 10_000):
            file.write(version % 3, torch.full((2, 400_000), float(version)))

    torn = 0
    for attempt in range(12):
        child = fork(write)
        time.sleep(0.05 + random.Random(attempt).random() / 20)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        finished = file.finished()
        values = file.values()
        for block in range(3):
            rows = values[file.rows(block).start : file.rows(block).stop]
            whole = bool((rows == rows[0, 0]).all()) and float(rows[0, 0]) % 3 == block
            assert whole or block not in finished
            torn += not whole
        assert find(tmp_path) == file
    assert len(finished) >= 2  # at most the one that was being written is lost
    for block in range(3):
        file.write(block, torch.full((2, 400_000), -1.0))
    assert file.finished() == {0, 1, 2}


def test_a_kill_while_the_file_is_made_leaves_one_or_none(tmp_path: Path) -> None:
    file = block_file(tmp_path, shape=(3000, 8), block_size=1)

    def create() -> None:
        while True:
            file.create()

    for attempt in range(10):
        child = fork(create)
        time.sleep(0.02 + attempt / 200)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = file.begun()  # never refused as somebody else's, nor as damaged
        if found is not None:
            found.check()
    file.create()
    assert file.begun() == file and load_file(file.path)["states"].shape == (3000, 8)
