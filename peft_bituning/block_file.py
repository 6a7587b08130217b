"""The block file: one tensor on the disk, written block by block and read where it lies.

A folder holds `<name>.safetensors`, made in its full size at once; `origin.json`, which says what the tensor is of; and
journals with the sha256 of every finished block, one journal a writing process. A kill loses a block at most.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .artifacts import bytes_of, differences, sha256_of, whole_file, write_whole
from .errors import ArtifactError, ConfigurationError, InputError

ORIGIN_FILE = "origin.json"
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as safetensors spells them

_JOURNALS = "blocks*.jsonl"


@dataclass(frozen=True)
class BlockFile:
    """A tensor `[I, ...]` in a folder, of which some blocks of items are finished.

    Args:
        folder: where it is; other files in it are left alone.
        name: of the file, without `.safetensors`.
        tensor: name of the tensor in it.
        origin: what the values depend on, as JSON values.
        shape: I and the sizes of an item's values.
        dtype: `float32`, `float16` or `bfloat16`.
        block_size: items of a block.

    Raises:
        ConfigurationError: the type is unknown, or a size is below 1.
    """

    folder: Path
    name: str
    tensor: str
    origin: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    block_size: int

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ConfigurationError(f"dtype must be one of {', '.join(CODES)}, got {self.dtype!r}")
        if self.block_size < 1:
            raise ConfigurationError(f"block_size must be at least 1, got {self.block_size!r}")
        if min(self.shape, default=0) < 1:
            raise ConfigurationError(f"shape must be sizes of at least 1, got {list(self.shape)}")

    @classmethod
    def find(cls, folder: Path, name: str, tensor: str) -> "BlockFile | None":
        """Read what a folder says that it holds; its file may be missing or damaged, see `check`.

        Args:
            folder: the folder.
            name: as in the class.
            tensor: as in the class.

        Returns:
            The description, or None where there is none.

        Raises:
            ArtifactError: the description is damaged.
        """
        try:
            values = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
            shape = tuple(int(size) for size in values["shape"])
            return cls(folder, name, tensor, dict(values["origin"]), shape, values["dtype"], int(values["block_size"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{folder.name}/{ORIGIN_FILE} cannot be read ({error}); make the {tensor} again, in another folder or "
                "after removing this one"
            ) from error

    @property
    def path(self) -> Path:
        """The safetensors file."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def num_blocks(self) -> int:
        """Blocks of the file, the last one maybe shorter."""
        return math.ceil(self.shape[0] / self.block_size)

    def items_of(self, block: int) -> range:
        """Return the rows of a block, which is counted from 0."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.shape[0]))

    def changes(self, wanted: "BlockFile") -> list[str]:
        """Name what another file would differ in, its blocks aside: `path was this and is that`."""
        return differences(self._compared(), json.loads(json.dumps(wanted._compared())))

    # ------------------------------------------------------------------ writing

    def create(self) -> None:
        """Make the file, no block of it finished; what is there is replaced.

        An unfinished block ends in NaN, so that whoever maps the file sees that it is none.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in (self.folder / ORIGIN_FILE, self.path, *self.folder.glob(_JOURNALS)):
            place.unlink(missing_ok=True)  # the description first: without it nothing else is read
        described = {
            "origin": self.origin,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "block_size": self.block_size,
        }
        write_whole(self.folder / ORIGIN_FILE, json.dumps(described, indent=2))
        header = self._header()
        nan = b"\xff" * self._torch_dtype.itemsize
        with whole_file(self.path) as temporary, temporary.open("wb") as stream:
            stream.write(header)
            for block in range(self.num_blocks):
                stream.seek(len(header) + self._num_bytes(self.items_of(block).stop) - len(nan))
                stream.write(nan)

    def write(self, block: int, values: Tensor, writer: int | None = None) -> None:
        """Write a block; it counts as finished once it is on the disk.

        Args:
            block: its number.
            values: `[rows of the block, ...]`, of the file's type.
            writer: number of this process where several write at once, each of them blocks of its own.

        Raises:
            InputError: the values are of another shape or type.
        """
        items = self.items_of(block)
        shape = (len(items), *self.shape[1:])
        if values.shape != shape or values.dtype != self._torch_dtype:
            raise InputError(
                f"{self.tensor} of block {block} must be {list(shape)} {self.dtype}, got {list(values.shape)} "
                f"{str(values.dtype).removeprefix('torch.')}"
            )
        data = bytes_of(values)
        with self.path.open("r+b") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(header + self._num_bytes(items.start))
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        line = json.dumps({"block": block, "sha256": sha256_of([data])})
        journal = "blocks.jsonl" if writer is None else f"blocks-{writer}.jsonl"
        with (self.folder / journal).open("a", encoding="utf-8") as stream:
            stream.write(f"\n{line}\n")  # behind a line that a kill left unfinished
            stream.flush()
            os.fsync(stream.fileno())

    # ------------------------------------------------------------------ reading

    def check(self) -> None:
        """Make sure that the file has the tensor, shape, type and size that are described.

        Raises:
            ArtifactError: it is missing, truncated or another one.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                part = file.get_slice(self.tensor)
                fits = list(file.keys()) == [self.tensor] and tuple(part.get_shape()) == self.shape
                fits = fits and part.get_dtype() == CODES[self.dtype]
        except (SafetensorError, OSError):
            fits = False
        if not fits:
            raise ArtifactError(
                f"{self.folder.name}/{self.path.name} must hold {self.tensor} {list(self.shape)} {self.dtype} by "
                f"{ORIGIN_FILE}, but it is missing, truncated or belongs to another run; make the {self.tensor} again, "
                "in another folder or after removing this one"
            )

    def finished(self, blocks: Iterable[int] | None = None, verify: bool = True) -> set[int]:
        """Return which blocks are written.

        Args:
            blocks: those to look for; None is all.
            verify: also read them, and leave out those whose bytes are not what was written.

        Returns:
            Their numbers.

        Raises:
            ArtifactError: as `check`, where the file is read.
        """
        digests: dict[int, set[str]] = defaultdict(set)  # one a time that a block was written
        for journal in self.folder.glob(_JOURNALS):
            for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    digests[int(entry["block"])].add(entry["sha256"])
                except (ValueError, KeyError, TypeError):
                    continue  # the line a kill came into: its block is made again
        written = {block for block in (range(self.num_blocks) if blocks is None else blocks) if block in digests}
        if not (verify and written):
            return written
        rows = self.values()
        return {block for block in written if sha256_of([bytes_of(rows[self._slice(block)])]) in digests[block]}

    def values(self) -> Tensor:
        """Return the tensor `[I, ...]`, mapped into memory and not read before it is used.

        Raises:
            ArtifactError: as `check`.
        """
        self.check()
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.tensor)

    # ------------------------------------------------------------------ layout

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _compared(self) -> dict[str, Any]:
        return {**self.origin, "shape": list(self.shape), "dtype": self.dtype}

    def _slice(self, block: int) -> slice:
        items = self.items_of(block)
        return slice(items.start, items.stop)

    def _num_bytes(self, items: int) -> int:
        return items * math.prod(self.shape[1:]) * self._torch_dtype.itemsize

    def _header(self) -> bytes:
        """Return what safetensors puts before the bytes of this one tensor."""
        offsets = [0, self._num_bytes(self.shape[0])]
        entry = {"dtype": CODES[self.dtype], "shape": list(self.shape), "data_offsets": offsets}
        text = json.dumps({self.tensor: entry}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
