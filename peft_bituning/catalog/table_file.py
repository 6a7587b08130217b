"""The file of an item table: one safetensors tensor, written and read in chunks, so that memory holds no second one."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import InputError

TENSOR_NAME = "embeddings"
CHUNK_BYTES = 4 << 20
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors spells them


def chunks(rows: Tensor) -> Iterator[Tensor]:
    """Cut rows into views of at most 4 MiB.

    Args:
        rows: [I, D], on any device.

    Yields:
        [<= I, D], in order.
    """
    row_bytes = max(1, rows[:1].numel() * rows.element_size())
    yield from rows.split(max(1, CHUNK_BYTES // row_bytes))


def sha256_of(rows: Tensor) -> str:
    """Return the sha256 of the rows' bytes, in row order.

    Args:
        rows: [I, D], on any device.
    """
    digest = hashlib.sha256()
    for chunk in chunks(rows):
        digest.update(_bytes(chunk))
    return digest.hexdigest()


def non_finite_rows(rows: Tensor, limit: int = 10) -> list[int]:
    """Return the first rows that hold NaN or infinity.

    Args:
        rows: [I, D], on any device.
        limit: so many at most.
    """
    found: list[int] = []
    first = 0
    for chunk in chunks(rows):
        bad = torch.nonzero(~torch.isfinite(chunk).all(1)).flatten()
        found.extend((bad + first).tolist())
        if len(found) >= limit:
            break
        first += len(chunk)
    return found[:limit]


def write_rows(path: Path, parts: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> str:
    """Write a safetensors file of one tensor, part by part.

    Args:
        path: the file.
        parts: [<= I, D] each, in order.
        shape: I and D of all parts together.
        dtype: of every part; float32 or bfloat16.

    Returns:
        The sha256 of the tensor's bytes, which is `sha256_of` of all rows.

    Raises:
        InputError: the parts are of another type or width, or do not add up to I rows.
    """
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:
        _write_header(file, shape, dtype)
        for part in parts:
            if part.dtype != dtype or part.shape[1] != shape[1]:
                raise InputError(
                    f"the rows from {written} on must be {dtype} of width {shape[1]}, got {part.dtype} of width "
                    f"{part.shape[1]}"
                )
            for chunk in chunks(part):
                content = _bytes(chunk)
                digest.update(content)
                file.write(content)
            written += len(part)
    if written != shape[0]:
        raise InputError(f"parts must be {shape[0]} rows together, got {written}")
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path; on leaving, its file takes the place of `path`, whole or not at all.

    A tensor that is mapped from the file so far keeps its content.

    Args:
        path: where the file is to be.

    Yields:
        Where to write it.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def temporary_path(path: Path) -> Path:
    """Return where `whole_file` writes a file; a kill may leave it there."""
    return path.with_name(f".{path.name}.tmp")


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = shape[0] * shape[1] * dtype.itemsize
    tensor = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({TENSOR_NAME: tensor}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)


def _bytes(chunk: Tensor) -> memoryview:
    return chunk.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
