"""A large item table on its way to disk: shards while it is encoded, one mapped file at the end.

A shard is what a killed run need not encode again. All who read a table take one [I, D] tensor, which several files
cannot be mapped as: the finished shards are copied, one after another, into one safetensors file.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArtifactError, ConfigurationError, InputError
from .item_table import ItemTable
from .table_file import DTYPES, TENSOR_NAME, chunks, sha256_of, temporary_path, whole_file, write_rows

logger = logging.getLogger(__name__)

STEM = "item_table"
TABLE_FILE = f"{STEM}.safetensors"
INDEX_FILE = f"{TABLE_FILE}.index.json"
_SETTINGS = "settings"  # keys of a shard's own metadata
_SHA256 = "sha256"


@dataclass(frozen=True)
class TableShards:
    """A folder in which an item table is made.

    It holds `item_table-00001-of-00062.safetensors` and so on, one [shard_size, D] tensor each; in the end
    `item_table.safetensors` [I, D], which `ItemTable.load` maps, and `item_table.safetensors.index.json`, laid out as
    transformers' `model.safetensors.index.json`. The shards may be deleted then.

    Args:
        folder: made where it is missing; all processes must see the same one.
        num_items: I.
        identity: what the rows depend on (hashes of weights, catalog, template), as JSON values: a folder of another
            identity is refused.
        shard_size: items a shard; all that is lost in a kill, and how long the last process may be waited for.
        dtype: of the stored rows, float32 or bfloat16.
        first_item: catalog index of the first row.

    Raises:
        ConfigurationError: a number below its least, a type that is not stored, or an identity that is not JSON.
    """

    folder: Path
    num_items: int
    identity: Mapping[str, Any]
    shard_size: int = 16_384
    dtype: torch.dtype = torch.float32
    first_item: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_items", 1), ("shard_size", 1), ("first_item", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} must be >= {least}, got {getattr(self, name)!r}")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype must be {' or '.join(map(str, DTYPES))}, got {self.dtype!r}")
        try:
            json.dumps(dict(self.identity))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"identity must be a mapping of JSON values, got {self.identity!r} ({error}); write hashes as strings"
            ) from error

    def __len__(self) -> int:
        """Return the number of shards."""
        return -(-self.num_items // self.shard_size)

    def rows(self, number: int) -> range:
        """Return the catalog indices of a shard, which is counted from 0."""
        first = number * self.shard_size
        last = min(first + self.shard_size, self.num_items)
        return range(self.first_item + first, self.first_item + last)

    def path(self, number: int) -> Path:
        """Return the file of a shard, which is counted from 0 here and from 1 in its name."""
        return self.folder / f"{STEM}-{number + 1:05d}-of-{len(self):05d}.safetensors"

    def identified(self, **more: Any) -> "TableShards":
        """Return the same shards with more in their identity."""
        return replace(self, identity={**self.identity, **more})

    # ------------------------------------------------------------------ a folder as it is found

    def check(self) -> None:
        """Refuse a folder that holds anything of another table; nothing in it is changed.

        Raises:
            ArtifactError: a table or shard of another identity, size or type, or a table that no index describes.
        """
        index = self._index()
        if index is not None:
            self._check_settings(INDEX_FILE, index)
        elif (self.folder / TABLE_FILE).exists():
            raise ArtifactError(
                f"{self.folder} holds {TABLE_FILE} but no readable {INDEX_FILE}, so it was not made here; give a "
                "folder of its own"
            )
        expected = {self.path(number) for number in range(len(self))}
        for path in sorted(self.folder.glob(f"{STEM}-*-of-*.safetensors")):
            settings = _settings(path)
            if settings is not None:
                self._check_settings(path.name, settings)
            elif path not in expected:
                raise ArtifactError(
                    f"{path.name} must be one of {len(self)} shards of {self.shard_size} items, got a damaged file of "
                    "another count; give another folder, or remove the shards of this one"
                )

    def prepare(self) -> None:
        """Make the folder, and remove what a kill left half-written; one process calls it, before any writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pattern = temporary_path(self.folder / f"{STEM}*").name
        for leftover in self.folder.glob(pattern):
            leftover.unlink()

    def is_complete(self) -> bool:
        """Return whether the table is there and is byte for byte the one that was assembled."""
        index = self._index()
        if index is None or not (self.folder / TABLE_FILE).is_file():
            return False
        try:
            whole = self.table().checksum() == index.get(_SHA256)
        except ArtifactError:
            whole = False
        if not whole:
            logger.warning("%s is damaged and is made again", TABLE_FILE)
        return whole

    def is_whole(self, number: int) -> bool:
        """Return whether a shard is there and holds what was written.

        Args:
            number: which one, counted from 0.
        """
        path = self.path(number)
        if not path.is_file():
            return False
        try:
            rows, digest = _read(path)
            whole = len(rows) == len(self.rows(number)) and rows.dtype == self.dtype and sha256_of(rows) == digest
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            logger.warning("%s is damaged and is encoded again", path.name)
        return whole

    # ------------------------------------------------------------------ writing

    def write(self, number: int, embeddings: Tensor) -> None:
        """Write a shard, whole or not at all.

        Args:
            number: which one, counted from 0.
            embeddings: [items of the shard, D], of any length.

        Raises:
            InputError: another number of rows, or a row that is not finite.
        """
        items = self.rows(number)
        if len(embeddings) != len(items):
            raise InputError(f"embeddings must be the {len(items)} rows of shard {number}, got {len(embeddings)}")
        rows = ItemTable.from_embeddings(embeddings).embeddings.to(self.dtype)
        metadata = {"format": "pt", _SETTINGS: json.dumps(self._own_settings()), _SHA256: sha256_of(rows)}
        with whole_file(self.path(number)) as temporary:
            save_file({self._name(number): rows}, temporary, metadata)

    def assemble(self) -> None:
        """Make the table and its index of the finished shards; one process calls it, when all are written.

        Raises:
            ArtifactError: a shard is missing or cannot be read, or is of another width than the first.
        """
        width = self._shard(0).shape[1]

        def parts() -> Iterator[Tensor]:
            for number in range(len(self)):
                rows = self._shard(number)
                if rows.shape[1] != width:
                    raise ArtifactError(
                        f"{self.path(number).name} must be of width {width}, got {rows.shape[1]}; the identity must "
                        "tell models apart: remove the shards and encode again"
                    )
                yield from chunks(rows)

        with whole_file(self.folder / TABLE_FILE) as temporary:
            digest = write_rows(temporary, parts(), (self.num_items, width), self.dtype)
            # first, so that a table without an index is never one of ours
            self._write_index(width, digest)

    def table(self) -> ItemTable:
        """Map the finished table.

        Returns:
            [I, D] of `dtype`, in a file.

        Raises:
            ArtifactError: it is missing, damaged, or of another size or type.
        """
        table = ItemTable.load(self.folder / TABLE_FILE, self.num_items)
        if table.embeddings.dtype != self.dtype:
            raise ArtifactError(f"{TABLE_FILE} must be {self.dtype}, got {table.embeddings.dtype}; encode it again")
        return table

    # ------------------------------------------------------------------ settings

    def _own_settings(self) -> dict[str, Any]:
        return {
            "num_items": self.num_items,
            "first_item": self.first_item,
            "shard_size": self.shard_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "identity": dict(self.identity),
        }

    def _check_settings(self, name: str, found: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self._own_settings()))
        different = _differences({key: found.get(key) for key in wanted}, wanted)
        if different:
            raise ArtifactError(
                f"{name} in {self.folder} is of another table: {'; '.join(different)}; give another folder, or remove "
                "this one"
            )

    def _index(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))["metadata"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_index(self, width: int, digest: str) -> None:
        size = self.num_items * width * self.dtype.itemsize
        index = {
            "metadata": {"total_size": size, "width": width, _SHA256: digest, **self._own_settings()},
            "weight_map": {self._name(number): self.path(number).name for number in range(len(self))},
        }
        with whole_file(self.folder / INDEX_FILE) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _name(self, number: int) -> str:
        return f"{TENSOR_NAME}.{number:05d}"

    def _shard(self, number: int) -> Tensor:
        path = self.path(number)
        try:
            return _read(path)[0]
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"the shard {path.name} cannot be read ({error}); all processes must write into one shared folder: "
                "run again"
            ) from error


def _read(path: Path) -> tuple[Tensor, str]:
    """Map the one tensor [J, D] of a shard and the sha256 written with it."""
    with safe_open(path, framework="pt") as file:
        (name,) = file.keys()
        return file.get_tensor(name), (file.metadata() or {}).get(_SHA256, "")


def _settings(path: Path) -> dict[str, Any] | None:
    """Return the settings a shard was written with, or None where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get(_SETTINGS, "{}")))
    except (SafetensorError, OSError, ValueError):
        return None


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    different: list[str] = []
    for key in sorted({*found, *wanted}):
        before, now = found.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            different.extend(_differences(before, now, f"{prefix}{key}."))
        elif before != now:
            different.append(f"{prefix}{key} was {before!r} and is {now!r}")
    return different
