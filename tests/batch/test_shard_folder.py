"""A folder of shards: atomic, self-describing, and not to be mixed."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Features, List, Value, load_dataset

from peft_bituning.batch.shard_folder import ShardFolder, ShardRecord
from peft_bituning.errors import ArtifactError, ConfigurationError

FEATURES = Features({"user_id": Value("string"), "item_ids": List(Value("string")), "scores": List(Value("float32"))})
SETTINGS = {"k": 10, "made_by": {"base_model": "tiny", "adapter": "ab"}}
FACTS = {"source_sha256": "s", "cold_starts": 0, "unknown_users": 0, "unknown_items": 0, "unknown_examples": []}


def columns(number: int) -> dict[str, Any]:
    return {"user_id": [f"u{number}", f"v{number}"], "item_ids": [["a", "b"], []], "scores": [[0.5, 0.25], []]}


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    return ShardFolder(tmp_path / "recs", FEATURES)


@pytest.fixture
def three(folder: ShardFolder) -> dict[int, ShardRecord]:
    """Write three shards, not in order, without an end."""
    assert folder.prepare(SETTINGS) == {}
    return {number: folder.write(number, columns(number), **FACTS) for number in (2, 0, 1)}


def names(folder: ShardFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


@pytest.mark.parametrize("finished", [False, True])
def test_shards_are_found_again(folder: ShardFolder, three: dict[int, ShardRecord], finished: bool) -> None:
    if finished:
        folder.finish(SETTINGS, three, {"users": 6})
    assert folder.prepare(SETTINGS) == three
    assert three[1].rows == 2
    assert names(folder) == [".recommendations", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_datasets_load_the_folder_at_any_time(
    folder: ShardFolder, three: dict[int, ShardRecord], tmp_path: Path
) -> None:
    (folder.folder / ".part-00003.parquet.tmp").write_bytes(b"PAR1")  # of a process that is still writing
    expected = [row for number in range(3) for row in columns(number)["user_id"]]
    for arguments in ({"path": "parquet", "data_dir": str(folder.folder)}, {"path": str(folder.folder)}):
        rows = load_dataset(**arguments, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows["user_id"][:] == expected
        assert rows.features == FEATURES
        assert rows[0]["scores"] == [0.5, 0.25] and rows[1]["item_ids"] == []


def test_the_index(folder: ShardFolder, three: dict[int, ShardRecord]) -> None:
    path = folder.folder / ".recommendations" / "index.json"
    assert json.loads(path.read_text()) == {"format_version": 1, "settings": SETTINGS, "complete": False}
    folder.finish(SETTINGS, three, {"users": 6})
    index = json.loads(path.read_text())
    assert (index["complete"], index["users"], index["settings"]) == (True, 6, SETTINGS)
    assert list(index["shards"]) == [f"part-0000{number}.parquet" for number in range(3)]
    assert index["shards"]["part-00001.parquet"]["sha256"] == three[1].sha256
    assert [path.name for path in folder.state.iterdir()] == ["index.json"]
    folder.path(1).unlink()
    assert folder.prepare(SETTINGS).keys() == {0, 2}
    assert json.loads(path.read_text())["complete"] is False


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "empty"])
def test_a_damaged_shard_is_noticed(
    folder: ShardFolder,
    three: dict[int, ShardRecord],
    damage: str,
    finished: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if finished:
        folder.finish(SETTINGS, three, {})
    path = folder.path(1)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:-7], "changed": changed, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert folder.prepare(SETTINGS).keys() == {0, 2}
    said = "part-00001.parquet is not the shard that was written; it is made again" in caplog.text
    assert said == (damage != "missing") and not path.exists()
    again = folder.write(1, columns(1), **FACTS)
    assert again == three[1] and path.read_bytes() == content
    assert folder.prepare(SETTINGS) == three


def test_a_record_without_its_shard_and_a_shard_without_its_record(
    folder: ShardFolder, three: dict[int, ShardRecord]
) -> None:
    """What a kill, or a machine without power, can leave."""
    record = folder.state / "part-00001.json"
    record.write_text("")
    (folder.state / "part-00003.json").write_text((folder.state / "part-00000.json").read_text())
    (folder.state / "part-00002.json").unlink()
    assert folder.prepare(SETTINGS).keys() == {0}
    assert names(folder) == [".recommendations", "part-00000.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 20}, "recs must hold shards of the same settings, got others: k was 10 and is 20; choose another outp"),
        ({"made_by": {"base_model": "tiny", "adapter": "cd"}}, "made_by.adapter was 'ab' and is 'cd'; choose another"),
        ({f"s{number}": number for number in range(9)}, "s4 was None and is 4 and 4 more; choose another"),
    ],
)
def test_other_settings_are_refused(
    folder: ShardFolder, three: dict[int, ShardRecord], change: dict[str, Any], message: str
) -> None:
    before = {name: (folder.folder / name).stat().st_mtime_ns for name in names(folder)}
    with pytest.raises(ArtifactError, match=message):
        folder.prepare({**SETTINGS, **change})
    assert {name: (folder.folder / name).stat().st_mtime_ns for name in names(folder)} == before
    assert folder.prepare({**SETTINGS, **change}, overwrite=True) == {}
    assert names(folder) == [".recommendations"]
    assert folder.prepare({**SETTINGS, **change}) == {}


def test_settings_may_change_before_the_first_shard(folder: ShardFolder) -> None:
    folder.prepare(SETTINGS)
    assert folder.prepare({"k": 3}) == {}
    folder.write(0, columns(0), **FACTS)
    assert folder.prepare({"k": 3}).keys() == {0}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_not_touched(folder: ShardFolder, overwrite: bool) -> None:
    folder.folder.mkdir()
    foreign = folder.folder / "part-00000.parquet"  # Spark writes such names too
    foreign.write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="recs must say what made its shards, got part-00000.parquet without .reco"):
        folder.prepare(SETTINGS, overwrite)
    (folder.folder / "users.parquet").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="recs must hold nothing but shards of recommendations, got users.parquet;"):
        folder.prepare(SETTINGS, overwrite)
    assert foreign.read_bytes() == b"mine" and names(folder) == ["part-00000.parquet", "users.parquet"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "recs").write_text("")
    with pytest.raises(ArtifactError, match="output_dir must be a folder, got the file .*recs; choose another"):
        ShardFolder(tmp_path / "recs", FEATURES).prepare(SETTINGS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json must be the index of a run, got what cannot be read"),
        ("[]", "index.json must be the index of a run, got what cannot be read"),
        ('{"format_version": 2, "settings": {}}', "index.json must have format_version 1, got 2"),
    ],
)
def test_an_index_of_something_else(
    folder: ShardFolder, three: dict[int, ShardRecord], text: str, message: str
) -> None:
    (folder.state / "index.json").write_text(text)
    with pytest.raises(ArtifactError, match=f"{message}.*; choose another output_dir, or start again"):
        folder.prepare(SETTINGS)
    assert folder.prepare(SETTINGS, overwrite=True) == {}


def test_names_sort_by_number(folder: ShardFolder) -> None:
    assert folder.path(99_999).name == "part-99999.parquet"
    with pytest.raises(ConfigurationError, match="rows_per_shard must give at most 100000 shards, got more; raise it"):
        folder.path(100_000)
