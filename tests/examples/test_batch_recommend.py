"""Batch recommendation as people run it."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from peft_bituning.errors import ArtifactError, ConfigurationError, DataError, UnknownItemError

pytestmark = pytest.mark.timeout(900)  # processes of their own

SCRIPT = Path(__file__).parents[2] / "examples" / "by_feature" / "batch_recommend.py"
HISTORIES = [["007", "8"], [], ["gone", "b2"], ["c1", "c0", "b9", "b8"], ["b4"]]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_recommend", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": [f"u{user}" for user in range(5)], "history": HISTORIES}), path)
    return path


@pytest.fixture
def argv(trained, users: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(trained.folder), "--base_model", str(trained.base_folder)),
        *("--users", str(users), "--output_dir", str(tmp_path / "recs"), "--disable_tqdm"),
    ]


def test_two_processes(trained, argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "candidates.txt").write_text("007\nb3\n\n b2 \nc1\n")
    more = ["--k", "3", "--rows_per_shard", "2", "--candidates", "candidates.txt", "--on_unknown", "ignore"]
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]  # where there is none: gloo
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(SCRIPT), *argv, *more],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = "5 users in 3 shards (3 made now), 1 cold starts, 1 unknown items left out; saved to "
    assert [line for line in done.stdout.splitlines() if "users in" in line] == [said + str(tmp_path / "recs")]
    assert done.stderr.count("1 items of 1 users are not in the catalog and were left out, first gone") == 1
    found = [row for path in sorted((tmp_path / "recs").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    candidates = ["007", "b3", "b2", "c1"]
    expected = trained.recommender.recommend(HISTORIES, k=3, candidates=candidates, on_unknown="ignore")
    assert [row["user_id"] for row in found] == [f"u{user}" for user in range(5)]
    assert [row["item_ids"] for row in found] == [[item for item, _ in row] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row["scores"] == pytest.approx([score for _, score in wanted], abs=1e-5)


def test_one_process(script: ModuleType, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownItemError, match="got gone in row 2 of users.parquet"):
        script.main(argv)
    script.main([*argv, "--on_unknown", "ignore", "--keep_seen", "--k", "100", "--overwrite"])
    assert "5 users in 1 shards (1 made now)" in capsys.readouterr().out
    (row, *_) = pq.read_table(tmp_path / "recs" / "part-00000.parquet").to_pylist()
    assert len(row["item_ids"]) == 12
    script.main([*argv, "--on_unknown", "ignore", "--keep_seen", "--k", "100"])
    assert "5 users in 1 shards (0 made now)" in capsys.readouterr().out
    index = json.loads((tmp_path / "recs" / ".recommendations" / "index.json").read_text())
    assert (index["settings"]["k"], index["settings"]["filter_seen"]) == (100, False)


def test_mistakes_are_named(script: ModuleType, argv: list[str], users: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'/no/where/to' is no folder here and cannot be a Hub repository"):
        script.main([*argv, "--model", "/no/where/to"])
    with pytest.raises(DataError, match="source must name parquet files, got '/no/users.parquet', where there"):
        script.main([*argv, "--users", str(users), "/no/users.parquet"])
    with pytest.raises(ConfigurationError, match=r"history_column must be a column of users.parquet \(user_id, his"):
        script.main([*argv, "--history_column", "items"])
    with pytest.raises(ConfigurationError, match="--candidates must be a readable text file, got '/no/items.txt'"):
        script.main([*argv, "--candidates", "/no/items.txt"])
    assert not (tmp_path / "recs").exists()


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", "/no/where/to", "--users", "u.parquet", "--output_dir", "recs"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.strip().splitlines() if "gemm_4bit" not in line]  # bitsandbytes says so
    assert lines == ["ArtifactError: '/no/where/to' is no folder here and cannot be a Hub repository; check the path"]


def test_help(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert "accelerate launch examples/by_feature/batch_recommend.py --model FOLDER --users users.parquet" in shown
    assert "users a shard, and in memory at once (10000)" in " ".join(shown.split())
