"""Recommendations from parquet to parquet: those of `recommend`, whatever happens on the way."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

from peft_bituning import LaserRecommender
from peft_bituning.batch.batch_recommendation import made_by, recommend_parquet
from peft_bituning.catalog import ExactIndex
from peft_bituning.errors import ArtifactError, ConfigurationError, DataError, UnknownItemError

pytestmark = pytest.mark.timeout(900)  # processes of their own

SCRIPT = Path(__file__).with_name("batch_processes.py")
DDP = Path(__file__).parents[2] / "examples" / "configs" / "accelerate" / "ddp.yaml"
SETTINGS: dict[str, Any] = {"k": 4, "rows_per_shard": 5, "on_unknown": "ignore"}
USERS = 23


@pytest.fixture(scope="module")
def histories(trained) -> list[list[str]]:
    """Return histories of many lengths: cold starts, unknown items, and one user who has everything."""
    ids = trained.data.items.item_ids
    made = [[ids[(user * 5 + step) % len(ids)] for step in range(user % 7)] for user in range(USERS)]
    made[3] = ["gone", made[3][0], "gone"]
    made[10] = ["never there"]
    made[17] = list(ids)
    return made


@pytest.fixture(scope="module")
def users(histories: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two parquet files, cut where no shard is."""
    folder = tmp_path_factory.mktemp("source") / "users"
    folder.mkdir()
    for number, (first, last) in enumerate([(0, 12), (12, USERS)]):
        columns = {"user_id": [f"{user:03d}" for user in range(first, last)], "history": histories[first:last]}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def recommender(trained) -> LaserRecommender:
    return LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")


@pytest.fixture(scope="module")
def one(recommender: LaserRecommender, users: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shards of one process; copy them before changing anything."""
    folder = tmp_path_factory.mktemp("one") / "recs"
    recommend_parquet(recommender, users, folder, **SETTINGS)
    return folder


@pytest.fixture
def copied(one: Path, tmp_path: Path) -> Path:
    """Return a copy of the shards, free to be broken."""
    return Path(shutil.copytree(one, tmp_path / "copy"))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"), key=str) if path.is_file()}


def rows(folder: Path) -> list[tuple[str, list[tuple[str, float]]]]:
    found = [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [(row["user_id"], list(zip(row["item_ids"], row["scores"], strict=True))) for row in found]


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ".recommendations" / "index.json").read_text())


class Counted:
    """Counts the rows that a recommender encodes."""

    def __init__(self, recommender: LaserRecommender, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        encode = recommender.encoder.encode

        def encode_and_count(histories: Any, *arguments: Any, **settings: Any) -> torch.Tensor:
            self.rows += len(histories)
            return encode(histories, *arguments, **settings)

        monkeypatch.setattr(recommender.encoder, "encode", encode_and_count)


@pytest.fixture
def counted(recommender: LaserRecommender, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(recommender, monkeypatch)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": 100, "filter_seen": False, "rows_per_shard": 1000},
        {"candidates": ("c1", "b5", "8", "c1"), "batch_size": 2, "rows_per_shard": 1},
    ],
)
def test_rows_are_those_of_recommend(
    recommender: LaserRecommender, users: Path, histories: list[list[str]], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**SETTINGS, **settings}
    report = recommend_parquet(recommender, users, tmp_path / "recs", **settings)
    size = settings.pop("rows_per_shard")
    expected = recommender.recommend(histories, **settings)
    found = rows(tmp_path / "recs")
    assert [user for user, _ in found] == [f"{user:03d}" for user in range(USERS)]
    for (_, row), wanted in zip(found, expected, strict=True):
        assert [item for item, _ in row] == [item for item, _ in wanted]
        assert [score for _, score in row] == pytest.approx([score for _, score in wanted], abs=1e-5)
    lengths = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "recs").glob("*.parquet"))]
    assert lengths == [min(size, USERS - first) for first in range(0, USERS, size)]
    assert (report.users, report.shards, report.new_shards) == (USERS, len(lengths), len(lengths))


def test_a_shard_is_bit_for_bit_what_recommend_gives_its_users(
    recommender: LaserRecommender, one: Path, histories: list[list[str]]
) -> None:
    for first in range(0, USERS, 5):
        expected = recommender.recommend(histories[first : first + 5], k=4, on_unknown="ignore")
        found = rows(one)[first : first + 5]
        assert [[item for item, _ in row] for _, row in found] == [[item for item, _ in row] for row in expected]
        scores = [np.float32(score) for row in expected for _, score in row]
        assert [np.float32(score) for _, row in found for _, score in row] == scores


def test_datasets_load_the_folder(one: Path, tmp_path: Path) -> None:
    loaded = load_dataset("parquet", data_dir=str(one), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["user_id"][:] == [user for user, _ in rows(one)]
    assert {name: str(kind) for name, kind in loaded.features.items()} == {
        "user_id": "Value('string')",
        "item_ids": "List(Value('string'))",
        "scores": "List(Value('float32'))",
    }
    assert loaded[17]["item_ids"] == [] and len(loaded[0]["item_ids"]) == 4  # has everything; a cold start


def test_any_source_gives_the_same_files(
    recommender: LaserRecommender, users: Path, histories: list[list[str]], one: Path, tmp_path: Path
) -> None:
    data = {"user_id": [f"{user:03d}" for user in range(USERS)], "history": histories}
    given = [{"user_id": user, "history": history} for user, history in zip(*data.values(), strict=True)]
    sources = [
        f"{users}/*.parquet",
        Dataset.from_dict(data),
        IterableDataset.from_generator(lambda: iter(given)),
        load_dataset("parquet", data_dir=str(users), split="train", streaming=True),
    ]
    for number, source in enumerate(sources):
        recommend_parquet(recommender, source, tmp_path / str(number), **SETTINGS)
        assert shards(tmp_path / str(number)) == shards(one)


def test_columns_have_the_users_names(recommender: LaserRecommender, tmp_path: Path) -> None:
    source = Dataset.from_dict({"customer": [7], "basket": [["007", "8"]]})
    recommend_parquet(recommender, source, tmp_path, user_column="customer", history_column="basket")
    table = pq.read_table(tmp_path / "part-00000.parquet")
    assert table.column_names == ["customer", "item_ids", "scores"] and table["customer"].to_pylist() == ["7"]


def test_the_index_and_the_report(
    recommender: LaserRecommender, users: Path, one: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = index(one)
    assert found["complete"] is True and found["settings"]["k"] == 4 and found["settings"]["filter_seen"] is True
    assert found["settings"]["made_by"] == made_by(recommender)
    assert found["source"]["rows"] == USERS and found["source"]["files"].keys() == {"0.parquet", "1.parquet"}
    with caplog.at_level(logging.WARNING):
        report = recommend_parquet(recommender, users, copied, **SETTINGS)
    assert asdict(report) == {
        "users": USERS,
        "shards": 5,
        "new_shards": 0,
        "cold_starts": 5,  # users 0, 7, 14 and 21, and 10, who has an unknown item only
        "unknown_users": 2,
        "unknown_items": 3,
        "unknown_examples": ("gone", "never there"),
    }
    counts = {name: found[name] for name in ("users", "cold_starts", "unknown_users", "unknown_items")}
    assert counts == {name: getattr(report, name) for name in counts}
    assert "3 items of 2 users are not in the catalog and were left out, first gone, never there" in caplog.text


# ---------------------------------------------------------------------- memory


def test_a_stream_is_read_as_far_as_it_is_needed(recommender: LaserRecommender, tmp_path: Path) -> None:
    read, seen = 0, []

    def generate() -> Iterator[dict[str, Any]]:
        nonlocal read
        for user in range(20):
            if user % 4 == 0:  # the shards before are on the disk before more is read
                seen.append((user, len(shards(tmp_path / "recs"))))
            read += 1
            yield {"user_id": user, "history": ["007"]}

    encode = recommender.encoder.encode
    lengths = []

    def encode_and_look(histories: Any, *arguments: Any, **settings: Any) -> torch.Tensor:
        lengths.append((len(histories), read))
        return encode(histories, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommender.encoder, "encode", encode_and_look)
        source = IterableDataset.from_generator(generate)
        recommend_parquet(recommender, source, tmp_path / "recs", rows_per_shard=4)
    assert lengths == [(4, 4), (4, 8), (4, 12), (4, 16), (4, 20)]
    assert seen == [(0, 0), (4, 1), (8, 2), (12, 3), (16, 4)]


# ---------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def killed(trained, users: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what `kill -9` left of a run that was about to move its third shard into place."""
    folder = tmp_path_factory.mktemp("killed") / "recs"
    places = [str(path) for path in (trained.folder, trained.base_folder, users, folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT_SHARD": "2"}
    done = subprocess.run([sys.executable, str(SCRIPT), *places], env=environment, capture_output=True, timeout=840)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    return folder


def test_a_killed_run_goes_on(
    recommender: LaserRecommender, users: Path, one: Path, killed: Path, counted: Counted, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "recs"))
    assert shards(folder).keys() == {"part-00000.parquet", "part-00001.parquet", ".part-00002.parquet.tmp"}
    assert index(folder)["complete"] is False
    before = {name: (folder / name).stat().st_mtime_ns for name in ("part-00000.parquet", "part-00001.parquet")}
    report = recommend_parquet(recommender, users, folder, **SETTINGS)
    assert (counted.rows, report.new_shards, report.shards) == (USERS - 10, 3, 5)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    assert shards(folder) == shards(one) and index(folder) == index(one)


@pytest.fixture(scope="module")
def two(trained, users: Path, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what two processes made: `fresh` from the start, and `rest` of what was killed."""
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(killed, root / "rest")
    places = [str(path) for path in (trained.folder, trained.base_folder, users, root / "fresh", root / "rest")]
    settings = ["--config_file", str(DDP), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings, str(SCRIPT), *places]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_two_processes_write_the_same_files(two: Path, one: Path) -> None:
    for name in ("fresh", "rest"):
        assert shards(two / name) == shards(one)
        assert index(two / name) == index(one)


def test_two_processes_share_the_work(two: Path) -> None:
    found = {path.name: json.loads(path.read_text()) for path in two.glob("*.json")}
    assert found["fresh.0.json"]["made"] == [5, 5, 3] and found["fresh.1.json"]["made"] == [5, 5]
    assert found["rest.0.json"]["made"] == [5, 3] and found["rest.1.json"]["made"] == [5]  # shards 2 and 4; 3
    for name, new in (("fresh", 5), ("rest", 3)):
        reports = [found[f"{name}.{rank}.json"]["report"] for rank in (0, 1)]
        assert reports[0] == reports[1] and (reports[0]["users"], reports[0]["new_shards"]) == (USERS, new)


def test_processes_that_do_not_know_of_each_other_are_refused(
    recommender: LaserRecommender, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="num_processes must be the 2 that were launched, got 1: each would"):
        recommend_parquet(recommender, users, tmp_path / "recs", **SETTINGS)
    assert not (tmp_path / "recs").exists()


def test_a_truncated_shard_is_made_again(
    recommender: LaserRecommender,
    users: Path,
    one: Path,
    copied: Path,
    counted: Counted,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = copied / "part-00003.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING):
        assert recommend_parquet(recommender, users, copied, **SETTINGS).new_shards == 1
    assert "part-00003.parquet is not the shard that was written; it is made again" in caplog.text
    assert counted.rows == 5 and shards(copied) == shards(one) and index(copied) == index(one)


def test_batches_and_unknown_items_may_change(
    recommender: LaserRecommender, users: Path, copied: Path, counted: Counted
) -> None:
    recommend_parquet(recommender, users, copied, **{**SETTINGS, "batch_size": 3})
    assert counted.rows == 0
    with pytest.raises(UnknownItemError, match=r"got gone, gone in row 3 of 0.parquet"):
        recommend_parquet(recommender, users, copied, **{**SETTINGS, "on_unknown": "error"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k was 4 and is 5"),
        ({"filter_seen": False}, "filter_seen was True and is False"),
        ({"candidates": ["8"]}, "candidates was None and is '[0-9a-f]{64}'"),
        ({"rows_per_shard": 6}, "rows_per_shard was 5 and is 6"),
    ],
)
def test_other_settings_are_refused(
    recommender: LaserRecommender, users: Path, one: Path, copied: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=f"must hold shards of the same settings, got others: {message}; choose"):
        recommend_parquet(recommender, users, copied, **{**SETTINGS, **change})
    assert shards(copied) == shards(one)
    report = recommend_parquet(recommender, users, copied, overwrite=True, **{**SETTINGS, **change})
    assert report.new_shards == report.shards and index(copied)["complete"] is True


def test_another_model_is_refused(trained, recommender: LaserRecommender, users: Path, copied: Path) -> None:
    changed = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    with torch.no_grad():
        next(value for name, value in changed.model.named_parameters() if "suffix.default" in name).add_(1e-3)
    with pytest.raises(ArtifactError, match="got others: made_by.adapter was '[0-9a-f]{64}' and is '[0-9a-f]{64}'; ch"):
        recommend_parquet(changed, users, copied, **SETTINGS)


def test_the_candidates_order_says_nothing(recommender: LaserRecommender, users: Path, tmp_path: Path) -> None:
    for candidates in (["8", "c1"], ("c1", "8", "8")):
        recommend_parquet(recommender, users, tmp_path / "recs", candidates=candidates, **SETTINGS)


def test_another_source_is_refused(
    recommender: LaserRecommender, users: Path, histories: list[list[str]], one: Path, copied: Path
) -> None:
    ids = [f"{user:03d}" for user in range(USERS)]

    def source(histories: list[list[str]]) -> Dataset:
        return Dataset.from_dict({"user_id": ids[: len(histories)], "history": histories})

    assert recommend_parquet(recommender, source(histories), copied, **SETTINGS).new_shards == 0
    other = [*histories[:12], ["8"], *histories[13:]]
    with pytest.raises(ArtifactError, match=r"part-00002.parquet must be of this source, got .* from row 10 of"):
        recommend_parquet(recommender, source(other), copied, **SETTINGS)
    with pytest.raises(ArtifactError, match=r"part-00004.parquet must be of this source"):
        recommend_parquet(recommender, source([*histories[:-1]]), copied, **SETTINGS)
    with pytest.raises(ArtifactError, match=r"copy must hold shards of this source, got more than its 2; give"):
        recommend_parquet(recommender, source(histories[:10]), copied, **SETTINGS)
    assert shards(copied) == shards(one)


# ---------------------------------------------------------------------- errors


def test_a_bad_row_stops_the_run_and_can_be_repaired(
    recommender: LaserRecommender, users: Path, histories: list[list[str]], one: Path, counted: Counted, tmp_path: Path
) -> None:
    ids: list[str | None] = [f"{user:03d}" for user in range(USERS)]
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": [*ids[:13], None, *ids[14:]], "history": histories}), path)
    with pytest.raises(DataError, match="user_id must be an id, got None in row 13 of users.parquet"):
        recommend_parquet(recommender, path, tmp_path / "recs", **SETTINGS)
    pq.write_table(pa.table({"user_id": ids, "history": histories}), path)
    assert recommend_parquet(recommender, path, tmp_path / "recs", **SETTINGS).new_shards == 3
    assert counted.rows == USERS and shards(tmp_path / "recs") == shards(one)


def test_unknown_items_are_named_unless_they_are_ignored(
    recommender: LaserRecommender, users: Path, one: Path, tmp_path: Path
) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "on_unknown"}
    message = "history must hold items of the catalog, got gone, gone in row 3 of 0.parquet .the first is 0., user 003"
    with pytest.raises(UnknownItemError, match=message):
        recommend_parquet(recommender, users, tmp_path / "recs", **settings)
    recommend_parquet(recommender, users, tmp_path / "recs", **SETTINGS)
    assert shards(tmp_path / "recs") == shards(one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows_per_shard": 0}, "rows_per_shard must be an integer >= 1, got 0"),
        ({"rows_per_shard": True}, "rows_per_shard must be an integer >= 1, got True"),
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"on_unknown": "warn"}, "on_unknown must be 'error' or 'ignore', got 'warn'"),
        ({"candidates": "8"}, "candidates must be a list of item ids, got '8'"),
        ({"user_column": "scores"}, "user_column must not be a column of the lists, got 'scores'; rename it"),
        ({"user_column": "user"}, r"user_column must be a column of 0.parquet \(user_id, history\), got 'user'; give"),
        (
            {"history_column": "items"},
            r"history_column must be a column of 0.parquet \(user_id, history\), got 'items'",
        ),
    ],
)
def test_wrong_settings(
    recommender: LaserRecommender, users: Path, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        recommend_parquet(recommender, users, tmp_path / "recs", **{**SETTINGS, **settings})
    assert not (tmp_path / "recs").exists()


def test_unknown_candidates(recommender: LaserRecommender, users: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownItemError, match="nobody"):
        recommend_parquet(recommender, users, tmp_path / "recs", candidates=["8", "nobody"])


def test_no_users(recommender: LaserRecommender, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="source must hold at least one user, got no rows"):
        recommend_parquet(recommender, Dataset.from_dict({"user_id": [], "history": []}), tmp_path / "recs")


def test_the_source_is_not_written_into(recommender: LaserRecommender, users: Path) -> None:
    before = shards(users)
    for folder in (users, users / "recs"):
        with pytest.raises(ConfigurationError, match=re.escape("output_dir must be apart from the source, got")):
            recommend_parquet(recommender, users, folder, overwrite=True)
    assert shards(users) == before and not (users / "recs").exists()


def test_progress(
    recommender: LaserRecommender, users: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recommend_parquet(recommender, users, tmp_path / "quiet", **SETTINGS)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
    recommend_parquet(recommender, users, tmp_path / "loud", show_progress_bar=True, **SETTINGS)
    shown = capsys.readouterr().err
    assert re.search(r"recommending: 100%.* 23/23", shown) and "encoding users" in shown


# ---------------------------------------------------------------------- what made the lists


class Approximate(ExactIndex):
    """An index with settings."""

    kind = "graph"

    def __init__(self, embeddings: torch.Tensor, neighbours: int) -> None:
        super().__init__(embeddings)
        self.parameters = {"neighbours": neighbours}


def test_made_by_tells_recommenders_apart(trained) -> None:
    before = made_by(trained.recommender)
    assert json.loads(json.dumps(before)) == before
    assert (before["base_model"], before["dtype"]) == ("tiny-llama", "torch.float32")
    again = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    assert made_by(again) == before
    again.add_items([{"item_id": "new1", "title": "Gold ladder", "brand": "Acme", "category": "tools"}])
    changed = {name for name, value in made_by(again).items() if value != before[name]}
    assert changed == {"catalog", "item_table"}
    again = LaserRecommender.from_pretrained(trained.folder, base_model=trained.base_folder, device="cpu")
    again.settings = replace(again.settings, max_history=3)
    assert {name for name, value in made_by(again).items() if value != before[name]} == {"max_history"}
    half = LaserRecommender.from_pretrained(
        trained.folder, base_model=trained.base_folder, device="cpu", dtype=torch.bfloat16
    )
    assert made_by(half)["dtype"] == "torch.bfloat16"
    assert before["index"] == {"class": "ExactIndex"}
    half.index = Approximate(half.table.embeddings, 8)
    assert made_by(half)["index"] == {"class": "Approximate", "kind": "graph", "parameters": {"neighbours": 8}}
