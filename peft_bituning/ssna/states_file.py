"""The file of cached states: one tensor written block by block, each block checked, so that a kill loses one block.

Shapes: `I` catalog items, `a` layers, `D` width.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArtifactError, ConfigurationError

ORIGIN_FILE = "origin.json"
STATES_FILE = "states.safetensors"
JOURNAL_FILE = "blocks.jsonl"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_TENSOR = "states"
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class StatesFile:
    """A folder with `states.safetensors` `[I, a, D]`, the journal of its finished blocks, and where they came from.

    Args:
        folder: The folder.
        origin: What made the states, JSON values; files of another origin are never mixed.
        shape: `(I, a, D)`.
        dtype: `float32`, `float16` or `bfloat16`.
        block_size: Items of a block.
    """

    folder: Path
    origin: dict[str, Any]
    shape: tuple[int, int, int]
    dtype: str
    block_size: int

    @classmethod
    def create(
        cls, folder: Path, origin: dict[str, Any], shape: tuple[int, int, int], dtype: str, block_size: int
    ) -> "StatesFile":
        """Make an empty file; one that is there is replaced.

        Args:
            folder: Made if it is missing; other files in it are left alone.
            origin: See the class.
            shape: See the class.
            dtype: See the class.
            block_size: See the class.

        Returns:
            The file, no block of it written.

        Raises:
            ConfigurationError: The type is unknown, or a size is below 1.
        """
        if dtype not in DTYPES:
            raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        for name, size in (("block_size", block_size), ("number of items", shape[0])):
            if size < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {size!r}")
        file = cls(folder, origin, shape, dtype, block_size)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN_FILE).unlink(missing_ok=True)  # first: without it nothing else is read
        header = file._header()
        with (folder / STATES_FILE).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + file._num_bytes(shape[0]))
        (folder / JOURNAL_FILE).write_text("")
        described = {"origin": origin, "shape": list(shape), "dtype": dtype, "block_size": block_size}
        pending = folder / f"{ORIGIN_FILE}.tmp"
        pending.write_text(json.dumps(described, indent=2), encoding="utf-8")
        _sync(pending)
        os.replace(pending, folder / ORIGIN_FILE)
        _sync(folder)
        return file

    @classmethod
    def find(cls, folder: Path) -> "StatesFile | None":
        """Read what a folder holds.

        Args:
            folder: The folder.

        Returns:
            The file, finished or not; None where there is none.

        Raises:
            ArtifactError: Its description is damaged, or the file does not have the size and header described.
        """
        place = folder / ORIGIN_FILE
        if not place.is_file():
            return None
        try:
            values = json.loads(place.read_text(encoding="utf-8"))
            items, layers, width = (int(size) for size in values["shape"])
            file = cls(
                folder, dict(values["origin"]), (items, layers, width), values["dtype"], int(values["block_size"])
            )
            header = file._header()
            with (folder / STATES_FILE).open("rb") as stream:
                whole = stream.read(len(header)) == header
                whole = whole and stream.seek(0, os.SEEK_END) == len(header) + file._num_bytes(items)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"the cached states in {folder.name} cannot be read ({error}); cache them again with overwrite=True"
            ) from error
        if not whole:
            raise ArtifactError(
                f"{folder.name}/{STATES_FILE} must hold {list(file.shape)} {file.dtype} by {ORIGIN_FILE}, but it is "
                "truncated or belongs to another run; cache the states again with overwrite=True"
            )
        return file

    @property
    def num_blocks(self) -> int:
        """Blocks of the file, the last one maybe shorter."""
        return math.ceil(self.shape[0] / self.block_size)

    def items_of(self, block: int) -> range:
        """Return the catalog indices of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.shape[0]))

    def write(self, block: int, values: Tensor) -> None:
        """Write a block; it counts as finished once it is on the disk.

        Args:
            block: Its number.
            values: `[items of the block, a, D]`, of the file's type, on the CPU.
        """
        data = values.contiguous().view(torch.uint8).numpy().data
        with (self.folder / STATES_FILE).open("r+b") as stream:
            stream.seek(len(self._header()) + self._num_bytes(self.items_of(block).start))
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        line = json.dumps({"block": block, "sha256": hashlib.sha256(data).hexdigest()})
        with (self.folder / JOURNAL_FILE).open("a", encoding="utf-8") as stream:
            stream.write(f"\n{line}\n")  # behind a line that a kill left unfinished
            stream.flush()
            os.fsync(stream.fileno())

    def finished(self, verify: bool = True) -> set[int]:
        """Return the blocks that are written.

        Args:
            verify: Also read them, and leave out those whose bytes are not what was written.

        Returns:
            Their numbers.
        """
        digests: dict[int, str] = {}
        for line in (self.folder / JOURNAL_FILE).read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                digests[int(entry["block"])] = entry["sha256"]
            except (ValueError, KeyError, TypeError):
                continue  # the line a kill came into: its block is made again
        blocks = {block for block in digests if block in range(self.num_blocks)}
        if not verify:
            return blocks
        values = self.values()
        return {block for block in blocks if _digest(values, self.items_of(block)) == digests[block]}

    def values(self) -> Tensor:
        """Return the states `[I, a, D]`, mapped into memory and not read before they are used.

        Raises:
            ArtifactError: The file is not valid.
        """
        try:
            with safe_open(self.folder / STATES_FILE, framework="pt") as file:
                return file.get_tensor(_TENSOR)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{self.folder.name}/{STATES_FILE} cannot be read ({error}); cache the states again with overwrite=True"
            ) from error

    def _num_bytes(self, items: int) -> int:
        return items * self.shape[1] * self.shape[2] * DTYPES[self.dtype].itemsize

    def _header(self) -> bytes:
        """Return what a safetensors file with this one tensor begins with."""
        entry = {
            "dtype": _CODES[self.dtype],
            "shape": list(self.shape),
            "data_offsets": [0, self._num_bytes(self.shape[0])],
        }
        text = json.dumps({_TENSOR: entry}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _digest(values: Tensor, items: range) -> str:
    rows = values[items.start : items.stop].contiguous()
    return hashlib.sha256(rows.view(torch.uint8).numpy().data).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
