"""The safely written file: whole or not at all, known again by its digest, compared with what was saved before."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path; on leaving, what was made there is on the disk and takes the place of `path`.

    A kill leaves the old file or the new one, an error the old one alone. A link is replaced, not written through, and
    a tensor that is mapped from the old file keeps its content.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    _remove(temporary)  # a kill may have left it
    moved = False
    try:
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            sync(each)
        if temporary.is_dir() and os.path.lexists(path):  # which a file would replace at once
            _remove(old)
            os.replace(path, old)
            moved = True
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        if moved and not os.path.lexists(path):
            os.replace(old, path)
        raise
    sync(path.parent)
    if path.is_dir():
        _remove(old)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder, which takes the place of `path` as with `whole_file`; a kill may leave none."""
    with whole_file(path) as temporary:
        temporary.mkdir(parents=True)
        yield temporary


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8, so that a kill leaves the old file or the new one."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row order, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def sha256_of(parts: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 (hex) of parts that follow each other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(*values: Any, sort_keys: bool = False) -> str:
    """Return the sha256 (hex) of JSON values, written one after another by `json.dumps`."""
    return sha256_of(json.dumps(value, sort_keys=sort_keys).encode() for value in values)


def sha256_of_tensors(tensors: Mapping[str, Tensor], label: str, start: str = "") -> str:
    """Return the sha256 (hex) of named tensors, in the order of their names, behind `start`.

    `label`, a format of `name`, `shape` and `dtype`, stands before the bytes of each. Digests that are kept differ by
    it, so that a caller never changes its own.
    """

    def parts() -> Iterator[bytes | memoryview]:
        yield start.encode()
        for name, tensor in sorted(tensors.items()):
            yield label.format(name=name, shape=list(tensor.shape), dtype=tensor.dtype).encode()
            yield bytes_of(tensor)

    return sha256_of(parts())


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over the names and values of an adapter's weights."""
    return sha256_of_tensors(weights, "{name} {dtype} {shape}")


def to_json(value: Any) -> Any:
    """Return a value as JSON gives it back: sets as sorted lists, what JSON does not know as text."""
    return json.loads(json.dumps(value, default=lambda other: sorted(other) if isinstance(other, set) else str(other)))


def differences(saved: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two mappings of JSON values: `path was this and is that`, one for each value."""
    different: list[str] = []
    for key in sorted({*saved, *found}):
        before, now = saved.get(key), found.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            different.extend(differences(before, now, f"{prefix}{key}."))
        elif before != now:
            different.append(f"{prefix}{key} was {before!r} and is {now!r}")
    return different
