"""Safe writing against real failures, and digests against their formulas."""

import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_bituning import artifacts
from peft_bituning.artifacts import (
    differences,
    sha256_of,
    sha256_of_file,
    sha256_of_json,
    sha256_of_tensors,
    to_json,
    weights_hash,
    whole_file,
    whole_folder,
    write_whole,
)
from peft_bituning.batch.batch_recommendation import made_by
from peft_bituning.recommenders import build_recommender


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_while(action: Callable[[], Any], seconds: float) -> None:
    """Repeat an action in a child, and kill it as `kill -9` does."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                action()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


# ---------------------------------------------------------------------- one file


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for text in ('{"a": 1}', "ü"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    write_whole(str(path), "by its name")
    assert path.read_text() == "by its name" and names(tmp_path) == ["results.json"]


def test_an_error_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for before in (None, b"old"):
        with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt
        assert (path.read_bytes() if path.exists() else None) == before
        path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing was written
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["rows"]


def test_a_place_that_cannot_be_taken(tmp_path: Path) -> None:
    (tmp_path / "folder" / "kept").mkdir(parents=True)
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["kept"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "file", "text")


def test_a_full_disk_leaves_the_file_of_before(tmp_path: Path) -> None:
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    path = tmp_path / "file"
    write_whole(path, "old")
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError):
            write_whole(path, "new" * (1 << 20))
        with pytest.raises(OSError), whole_folder(tmp_path / "folder") as temporary:
            (temporary / "big").write_text("new" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.fixture
def read_only() -> Iterator[Path]:
    """Return a folder with `file` in it that this process may read and not write, be it root's or not."""
    folder = Path(tempfile.mkdtemp())
    (folder / "file").write_text("old")
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_an_error(read_only: Path) -> None:
    with pytest.raises(PermissionError):
        write_whole(read_only / "file", "new")
    with pytest.raises(PermissionError), whole_folder(read_only / "folder"):
        pass
    assert (read_only / "file").read_text() == "old" and names(read_only) == ["file"]


def test_links_are_replaced_and_not_written_through(tmp_path: Path) -> None:
    path, others = tmp_path / "file", tmp_path / "others"
    others.write_text("theirs")
    path.symlink_to(others)
    (tmp_path / ".file.tmp").symlink_to(others)  # where the temporary file goes
    write_whole(path, "mine")
    assert (path.read_text(), others.read_text(), path.is_symlink()) == ("mine", "theirs", False)
    os.link(path, tmp_path / "second name")
    write_whole(path, "new")
    assert (tmp_path / "second name").read_text() == "mine"
    kept = tmp_path / "kept"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("theirs")
    kept.symlink_to(tmp_path / "elsewhere")
    with whole_folder(kept) as temporary:
        (temporary / "b").write_text("mine")
    assert names(kept) == ["b"] and not kept.is_symlink() and names(tmp_path / "elsewhere") == ["a"]


def test_a_mapped_tensor_outlives_the_replacement_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    rows = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(3))
    save_file({"rows": rows}, path)
    mapped = load_file(path)["rows"]
    with whole_file(path) as temporary:
        save_file({"rows": torch.zeros(1, 16)}, temporary)
    assert np.array_equal(mapped.numpy(), rows.numpy())
    assert load_file(path)["rows"].shape == (1, 16)


def test_kills_leave_a_file_of_before_or_after(tmp_path: Path) -> None:
    path, versions = tmp_path / "file", [letter * 3_000_000 for letter in "abcd"]
    write_whole(path, versions[0])
    for attempt in range(12):
        kill_while(lambda: [write_whole(path, text) for text in versions], 0.02 + attempt * 0.004)
        assert path.read_text() in versions
        assert set(names(tmp_path)) <= {"file", ".file.tmp"}
        write_whole(path, versions[1])
        assert names(tmp_path) == ["file"]


# ---------------------------------------------------------------------- one folder


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as temporary:
        (temporary / "deep").mkdir()
        for name in ("a", "b", "deep/c"):
            (temporary / name).write_text(text)


def content(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b", "deep/c")}


def test_a_folder_is_written_and_replaced(tmp_path: Path) -> None:
    place = tmp_path / "of several" / "folder"
    fill(place, "one")
    (place / "left over").write_text("")
    fill(place, "two")
    assert content(place) == {"two"} and names(place) == ["a", "b", "deep"] and names(place.parent) == ["folder"]


def test_an_error_leaves_the_folder_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(ValueError), whole_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("half")
        raise ValueError
    assert content(tmp_path / "folder") == {"old"} and names(tmp_path) == ["folder"]
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name == "folder" and Path(source).name == ".folder.tmp":
            raise KeyboardInterrupt  # the old one has been moved away
        replace(source, target)

    monkeypatch.setattr(artifacts.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "folder", "new")
    assert content(tmp_path / "folder") == {"old"} and names(tmp_path) == ["folder"]


def test_kills_leave_a_whole_folder_or_none(tmp_path: Path) -> None:
    texts = [letter * 300_000 for letter in "ab"]
    for attempt in range(12):
        kill_while(lambda: [fill(tmp_path / "folder", text) for text in texts], 0.02 + attempt * 0.005)
        if (tmp_path / "folder").exists():
            assert len(content(tmp_path / "folder")) == 1
        fill(tmp_path / "folder", texts[1])
        assert content(tmp_path / "folder") == {texts[1]} and names(tmp_path) == ["folder"]


# ---------------------------------------------------------------------- digests

WEIGHTS = {"b": torch.tensor([[1.0], [2.0]]).bfloat16(), "a": torch.arange(6.0).reshape(2, 3).T}
BYTES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T.tobytes(), "b": bytes.fromhex("803f0040")}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_digests_are_plain_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "file") == sha256_of([b"a", memoryview(b"bc")]) == sha256(b"abc")
    assert sha256_of_json({"b": 1, "a": "ü"}) == sha256(b'{"b": 1, "a": "\\u00fc"}')
    assert sha256_of_json({"b": 1, "a": 2}, sort_keys=True) == sha256(b'{"a": 2, "b": 1}')
    assert sha256_of_json([1], "x") == sha256(b'[1]"x"')


def test_digests_that_are_kept_stay_what_they_are(trained) -> None:
    """Results, saved folders, batch jobs and cells of comparisons hold them: by these formulas, whoever wrote them."""
    a, b = BYTES["a"], BYTES["b"]
    assert weights_hash(WEIGHTS) == sha256(b"a torch.float32 [3, 2]" + a + b"b torch.bfloat16 [2, 1]" + b)
    found = sha256_of_tensors(WEIGHTS, "{name} {shape} {dtype}\n", "x")
    assert found == sha256(b"xa [3, 2] torch.float32\n" + a + b"b [2, 1] torch.bfloat16\n" + b)
    model = build_recommender("sasrec", 9, seed=2)
    parts = [json.dumps({"recommender_type": "sasrec", **model.essentials()}, sort_keys=True).encode()]
    for name, tensor in sorted(model.state_dict().items()):
        parts += [f"\n{name} {list(tensor.shape)} {tensor.dtype}\n".encode(), tensor.numpy().tobytes()]
    assert model.content_hash() == sha256(b"".join(parts))
    items = trained.recommender.items
    expected = sha256(json.dumps([items.item_ids, items.attributes]).encode())
    assert made_by(trained.recommender)["catalog"] == expected


def test_weights_hash_sees_every_part() -> None:
    assert weights_hash(WEIGHTS) == weights_hash(dict(reversed(WEIGHTS.items())))
    changes: list[dict[str, Any]] = [
        {**WEIGHTS, "a": WEIGHTS["a"] + 1},
        {**WEIGHTS, "b": WEIGHTS["b"].T},
        {**WEIGHTS, "b": WEIGHTS["b"].half()},
        {"a": WEIGHTS["a"], "c": WEIGHTS["b"]},
    ]
    for other in changes:
        assert weights_hash(other) != weights_hash(WEIGHTS)


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.zeros(0, 2), torch.tensor([True]), torch.eye(3)[:, 1]])
def test_any_tensor_has_a_digest(tensor: torch.Tensor) -> None:
    assert sha256_of_tensors({"": tensor}, "") == sha256(tensor.contiguous().numpy().tobytes())


# ---------------------------------------------------------------------- JSON values


def test_to_json() -> None:
    assert to_json({"a": {3, 1}, "b": (1, 2), "c": Path("x")}) == {"a": [1, 3], "b": [1, 2], "c": "x"}


def test_differences_name_the_path() -> None:
    saved = {"a": {"x": 1, "y": 2}, "b": [1], "gone": True, "e": None}
    found = {"a": {"x": 1, "y": 3}, "b": [1], "new": 0}
    assert differences(saved, saved) == []
    assert differences(saved, found) == ["a.y was 2 and is 3", "gone was True and is None", "new was None and is 0"]
