"""The block file: one tensor on the disk, written block by block and read where it lies.

A folder holds `<name>.safetensors`, made in its full size at once; `origin.json`, which says what the tensor is of; and
journals with the sha256 of every finished block, one journal a writing process. A kill loses a block at most.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .artifacts import bytes_of, differences, sha256_of, sync, whole_file, write_whole
from .errors import ArtifactError, ConfigurationError, InputError

ORIGIN_FILE = "origin.json"
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as safetensors spells them

_JOURNALS = "blocks*.jsonl"
_REMEDY = "give another folder, or remove this one"


@dataclass(frozen=True)
class BlockFile:
    """A tensor `[I, ...]` in a folder, of which some blocks of items are finished."""

    folder: Path  # one that all processes see; other files in it are left alone
    name: str  # of the file, without `.safetensors`
    tensor: str  # name of the tensor in it
    origin: dict[str, Any]  # what the values depend on, as JSON values; files of two origins are never mixed
    shape: tuple[int, ...]  # I and the sizes of an item's values; I alone before the first block is known
    dtype: str  # one of CODES
    block_size: int  # items

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ConfigurationError(f"dtype must be one of {', '.join(CODES)}, got {self.dtype!r}")
        if self.block_size < 1:
            raise ConfigurationError(f"block_size must be >= 1, got {self.block_size!r}")
        if min(self.shape, default=0) < 1:
            raise ConfigurationError(f"shape must be sizes >= 1, items first, got {list(self.shape)}")
        try:
            json.dumps(self.origin)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"origin must be JSON values, got {self.origin!r} ({error}); write hashes as strings"
            ) from error

    @property
    def path(self) -> Path:
        """The safetensors file."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def num_blocks(self) -> int:
        """Blocks of the file, the last one maybe shorter."""
        return math.ceil(self.shape[0] / self.block_size)

    def rows(self, block: int) -> range:
        """Return the rows of a block, which is counted from 0."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.shape[0]))

    @classmethod
    def find(cls, folder: Path, name: str, tensor: str) -> "BlockFile | None":
        """Read what a folder says that it holds, whole or damaged (see `check`); None where it says nothing."""
        try:
            values = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
            shape = tuple(int(size) for size in values["shape"])
            return cls(folder, name, tensor, dict(values["origin"]), shape, values["dtype"], int(values["block_size"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder}/{ORIGIN_FILE} cannot be read ({error}); {_REMEDY}") from error

    def begun(self) -> "BlockFile | None":
        """Look for what an earlier run left of this file, whatever its block size; nothing is changed.

        What has another origin, shape or type, or what nothing describes, is an `ArtifactError`.
        """
        found = self.find(self.folder, self.name, self.tensor)
        if found is None:
            if self.path.exists():
                raise ArtifactError(
                    f"{self.folder} holds {self.path.name} but no {ORIGIN_FILE}, so it was not made here; {_REMEDY}"
                )
            return None
        cut = replace(found, shape=found.shape[: len(self.shape)])
        if different := differences(cut._compared(), json.loads(json.dumps(self._compared()))):
            raise ArtifactError(
                f"{self.folder} holds {self.tensor} of another origin: {'; '.join(different)}; {_REMEDY}"
            )
        return found if found.path.exists() else None  # a kill came before it was made

    def check(self) -> None:
        """Refuse a file that is missing, truncated, or has another tensor, shape or type than what is described."""
        try:
            with safe_open(self.path, framework="pt") as file:
                part = file.get_slice(self.tensor)
                found = (list(file.keys()), tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError):
            found = None
        if found != ([self.tensor], self.shape, CODES[self.dtype]):
            raise ArtifactError(
                f"{self.path} must hold {self.tensor} {list(self.shape)} {self.dtype} by {ORIGIN_FILE}, but it is "
                f"missing (all processes must see one folder), truncated or belongs to another run; {_REMEDY}"
            )

    def create(self) -> None:
        """Make the file, no block of it finished; what is there is replaced.

        An unfinished block ends in NaN, so that whoever maps the file sees that it is none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in (self.path, *self.folder.glob(_JOURNALS)):  # so that no description is ever of another file
            place.unlink(missing_ok=True)
        shape = list(self.shape)
        described = {"origin": self.origin, "shape": shape, "dtype": self.dtype, "block_size": self.block_size}
        write_whole(self.folder / ORIGIN_FILE, json.dumps(described, indent=2))
        entry = {"dtype": CODES[self.dtype], "shape": shape, "data_offsets": [0, self._offset(self.shape[0])]}
        header = json.dumps({self.tensor: entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # as safetensors has it
        nan = b"\xff" * self._torch_dtype.itemsize
        with whole_file(self.path) as temporary, temporary.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for block in range(self.num_blocks):
                stream.seek(8 + len(header) + self._offset(self.rows(block).stop) - len(nan))
                stream.write(nan)

    def write(self, block: int, values: Tensor, writer: int | None = None) -> None:
        """Write a block's values `[rows of the block, ...]`; it counts as finished once it is on the disk.

        Where several processes write at once, each of them blocks of its own, `writer` is the number of this one.
        """
        rows = self.rows(block)
        shape = (len(rows), *self.shape[1:])
        if values.shape != shape or values.dtype != self._torch_dtype:
            raise InputError(
                f"{self.tensor} of block {block} must be {list(shape)} {self.dtype}, got {list(values.shape)} "
                f"{str(values.dtype).removeprefix('torch.')}"
            )
        data = bytes_of(values)
        with self.path.open("r+b") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(header + self._offset(rows.start))
            stream.write(data)
        sync(self.path)
        line = json.dumps({"block": block, "sha256": sha256_of([data])})
        journal = self.folder / ("blocks.jsonl" if writer is None else f"blocks-{writer}.jsonl")
        with journal.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{line}\n")  # behind a line that a kill left unfinished
        sync(journal)

    def finished(self, blocks: Iterable[int] | None = None, verify: bool = True) -> set[int]:
        """Return which blocks are written, among these or all.

        With `verify` they are also read, and those whose bytes are not what was written are left out.
        """
        digests: dict[int, set[str]] = defaultdict(set)  # one a time that a block was written
        for journal in self.folder.glob(_JOURNALS):
            for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    digests[int(entry["block"])].add(entry["sha256"])
                except (ValueError, KeyError, TypeError):
                    continue  # the line a kill came into: its block is made again
        written = digests.keys() & (range(self.num_blocks) if blocks is None else blocks)
        if not (verify and written):
            return written
        blocks_of_rows = self.values().split(self.block_size)
        return {block for block in written if sha256_of([bytes_of(blocks_of_rows[block])]) in digests[block]}

    def values(self) -> Tensor:
        """Return the tensor `[I, ...]`, checked, mapped into memory and not read before it is used."""
        self.check()
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.tensor)

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _compared(self) -> dict[str, Any]:
        return {**self.origin, "shape": list(self.shape), "dtype": self.dtype}

    def _offset(self, row: int) -> int:
        """Return where a row begins, in bytes behind the header."""
        return row * math.prod(self.shape[1:]) * self._torch_dtype.itemsize
