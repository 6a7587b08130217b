"""Users and their histories, read in blocks of consecutive rows from parquet files or `datasets`."""

import bisect
import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # what `datasets` reads and writes parquet with
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

from ..artifacts import sha256_of_json
from ..data.values import as_id, shown
from ..errors import ConfigurationError, DataError

Files = str | Path | Sequence[str | Path]
Read = Callable[[], list[dict[str, Any]]]  # gives the rows of a block

_READ_AHEAD = 2**20  # bytes of a column read at once


@dataclass(frozen=True)
class UserBlock:
    """Consecutive rows of a source, read when `users` is called."""

    number: int  # its place among the blocks, from 0
    first: int  # the source's row that it starts with, from 0
    rows: int
    users: Callable[[], tuple[list[str], list[list[str]]]]  # user ids, and item ids in time order, checked


def open_users(
    source: Files | Dataset | IterableDataset, user_column: str = "user_id", history_column: str = "history"
) -> "UserSource":
    """Open what holds one row per user: an id and a list of item ids in time order.

    Another source, or a missing column, is a `ConfigurationError`; a file that is none, or not parquet, a `DataError`.
    """
    if isinstance(source, Dataset | IterableDataset):
        return _DatasetUsers(source, user_column, history_column)
    paths = [source] if isinstance(source, str | Path) else source
    if isinstance(paths, list | tuple) and all(isinstance(path, str | Path) for path in paths):
        return _ParquetUsers(paths, user_column, history_column)
    raise ConfigurationError(
        f"source must be parquet files, a datasets.Dataset or an IterableDataset, got {type(source).__name__}; of a "
        "DatasetDict give one split"
    )


class UserSource(ABC):
    """Users, the same rows in the same order every time; `rows` of them, where that is known before reading."""

    rows: int | None = None
    description: dict[str, Any]  # what is known before reading, as JSON values

    def __init__(self, user_column: str, history_column: str) -> None:
        self.columns = (user_column, history_column)

    def overlaps(self, folder: Path) -> bool:
        """Say whether a folder holds files of the source, or lies in a folder that is searched for them."""
        return False

    @abstractmethod
    def place(self, row: int) -> str:
        """Say where a row is, for messages."""

    def blocks(self, size: int) -> Iterator[UserBlock]:
        """Read all rows, a block of `size` at a time, in order; only the last can be shorter.

        What nobody asks the `users` of is not turned into Python objects. A damaged file is a `DataError`; so is, from
        `users`, a row that is no user, by its place.
        """
        first = 0
        for number, (rows, read) in enumerate(self._blocks(size)):
            yield UserBlock(number, first, rows, partial(self._users, first, read))
            first += rows

    @abstractmethod
    def _blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        """Yield the number of rows of each block, and how to read it."""

    def _users(self, first: int, read: Read) -> tuple[list[str], list[list[str]]]:
        user_column, history_column = self.columns
        users, histories = [], []
        for row, values in enumerate(read(), start=first):
            if user_column not in values or history_column not in values:
                self._check_columns(values, self.place(row))
            given = values[user_column]
            user = as_id(given)
            if user is None:
                raise DataError(f"{user_column} must be an id, got {given!r} in {self.place(row)}; give every user one")
            users.append(user)
            histories.append(self._history(values[history_column], row))
        return users, histories

    def _history(self, history: Any, row: int) -> list[str]:
        if getattr(history, "ndim", 0) == 1:
            history = history.tolist()
        rule = f"{self.columns[1]} must be a list of item ids"
        if not isinstance(history, list | tuple):
            raise DataError(f"{rule}, got {shown(history)} in {self.place(row)}; write [] for a user without purchases")
        items: list[str] = []
        for item in history:
            known = as_id(item)
            if known is None:
                raise DataError(f"{rule}, got {shown(item)} as one of them in {self.place(row)}; leave it out")
            items.append(known)
        return items

    def _check_columns(self, present: Iterable[str], where: str) -> None:
        for argument, name in zip(("user_column", "history_column"), self.columns, strict=True):
            if name not in present:
                raise ConfigurationError(
                    f"{argument} must be a column of {where} ({', '.join(present) or 'it has none'}), got {name!r}; "
                    f"give its name as {argument}"
                )


class _ParquetUsers(UserSource):
    """Parquet files, read page by page: `datasets` decodes a row group, by default a million rows, at once."""

    def __init__(self, given: Sequence[str | Path], user_column: str, history_column: str) -> None:
        super().__init__(user_column, history_column)
        self.searched = [Path(path).expanduser().absolute() for path in given if Path(path).expanduser().is_dir()]
        self.paths = _find_files(given)
        counts = []
        for path in self.paths:
            with _reading(path), pq.ParquetFile(path) as file:
                self._check_columns(file.schema_arrow.names, path.name)
                counts.append(file.metadata.num_rows)
        self.starts = [0, *accumulate(counts)]
        self.rows = self.starts[-1]
        root = os.path.commonpath([path.absolute().parent for path in self.paths])
        files = {
            os.path.relpath(path.absolute(), root): {"bytes": path.stat().st_size, "rows": rows}
            for path, rows in zip(self.paths, counts, strict=True)
        }
        self.description = {"files": files, "rows": self.rows}

    def overlaps(self, folder: Path) -> bool:
        folder = folder.absolute()
        return any(file.absolute().is_relative_to(folder) for file in self.paths) or any(
            folder.is_relative_to(searched) for searched in self.searched
        )

    def place(self, row: int) -> str:
        file = bisect.bisect_right(self.starts, row) - 1
        return f"row {row - self.starts[file]} of {self.paths[file].name} (the first is 0)"

    def _blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        held: list[pa.RecordBatch] = []
        count = 0
        for batch in self._batches(size):
            while batch.num_rows:
                held.append(batch.slice(0, size - count))
                count += held[-1].num_rows
                batch = batch.slice(held[-1].num_rows)
                if count == size:
                    yield count, partial(_rows, held)
                    held, count = [], 0
        if count:
            yield count, partial(_rows, held)

    def _batches(self, size: int) -> Iterator[pa.RecordBatch]:
        columns = list(dict.fromkeys(self.columns))
        for path in self.paths:
            with _reading(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD) as file:
                yield from file.iter_batches(batch_size=size, columns=columns)


class _DatasetUsers(UserSource):
    """A `Dataset`, whose rows are read where they lie, or an `IterableDataset`, never read ahead of the block."""

    def __init__(self, dataset: Dataset | IterableDataset, user_column: str, history_column: str) -> None:
        super().__init__(user_column, history_column)
        self.dataset = dataset
        self.name = f"the {type(dataset).__name__}"
        if dataset.features is not None:
            self._check_columns(dataset.features, self.name)
        self.rows = len(dataset) if isinstance(dataset, Dataset) else None
        self.description = {"rows": self.rows}

    def place(self, row: int) -> str:
        return f"row {row} of {self.name} (the first is 0)"

    def _blocks(self, size: int) -> Iterator[tuple[int, Read]]:
        if isinstance(self.dataset, Dataset):
            columns = list(dict.fromkeys(self.columns))
            for table in self.dataset.select_columns(columns).with_format("arrow").iter(size):
                yield table.num_rows, table.to_pylist
            return
        rows = iter(self.dataset.with_format(None))
        while block := list(islice(rows, size)):
            yield len(block), partial(list, block)


def block_digest(users: Sequence[str], histories: Sequence[Sequence[str]]) -> str:
    """Return the sha256 of a block's content, the same whatever kind of source it came from."""
    return sha256_of_json([users, histories])


def _find_files(given: Sequence[str | Path]) -> list[Path]:
    """Find the files of paths, globs and folders, the latter searched through except for hidden ones, sorted."""
    found: list[Path] = []
    for each in given:
        path = Path(each).expanduser()
        if path.is_dir():
            inside = ((file, file.relative_to(path).parts) for file in path.rglob("*.parquet"))
            files = [file for file, parts in inside if not any(part.startswith((".", "__")) for part in parts)]
        else:
            files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
            files = [path] if path.is_file() else files
        if not files:
            raise DataError(
                f"source must name parquet files, got {str(each)!r}, where there are none; check the path, and give "
                "what lies elsewhere as datasets.load_dataset(..., streaming=True)"
            )
        found.extend(sorted(files))
    if not found:
        raise DataError("source must name parquet files, got an empty list; give a path, a glob or a folder")
    return found


def _rows(batches: list[pa.RecordBatch]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.to_pylist()]  # files may differ in the types of their columns


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} must be a parquet file, got one that cannot be read ({shown(str(error))}); it is damaged, "
            "incomplete or of another kind"
        ) from error
