"""Users and their histories, read in blocks of consecutive rows from parquet files or `datasets`."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..data.values import as_id
from ..errors import ConfigurationError, DataError
from .user_tables import DatasetTable, Files, ParquetTable, Read, StreamedTable, UserTable, find_files, short


@dataclass(frozen=True)
class UserBlock:
    """Consecutive rows of a source, read when `users` is called.

    Args:
        number: its place among the blocks, from 0.
        first: the source's row that it starts with, from 0.
        rows: how many it holds.
        users: reads and checks them: user ids, and item ids in time order, one list a user.
    """

    number: int
    first: int
    rows: int
    users: Callable[[], tuple[list[str], list[list[str]]]]


class UserSource:
    """One row a user: an id and a list of item ids in time order; the same rows in the same order every time.

    Args:
        source: parquet files (a path, a glob, a folder, or a list of them), a `Dataset`, or an `IterableDataset`.
        user_column: column of the user id.
        history_column: column of the item ids.

    Raises:
        ConfigurationError: another kind of source, or a column that is not there.
        DataError: no such file, or a file that is not parquet.
    """

    def __init__(
        self,
        source: Files | Dataset | IterableDataset,
        user_column: str = "user_id",
        history_column: str = "history",
    ) -> None:
        columns = {"user_column": user_column, "history_column": history_column}
        self.columns = (user_column, history_column)
        self._table: UserTable
        self._searched: list[Path] = []
        if isinstance(source, Dataset):
            self._table = DatasetTable(source, columns)
        elif isinstance(source, IterableDataset):
            self._table = StreamedTable(source, columns)
        elif isinstance(source, str | Path) or _is_paths(source):
            given = [source] if isinstance(source, str | Path) else source
            self._searched = [Path(path).expanduser().absolute() for path in given if Path(path).expanduser().is_dir()]
            self._table = ParquetTable(find_files(given), columns)
        else:
            raise ConfigurationError(
                f"source must be parquet files, a datasets.Dataset or an IterableDataset, got {type(source).__name__}; "
                "of a DatasetDict give one split"
            )
        self.rows = self._table.rows

    @property
    def description(self) -> dict[str, Any]:
        """What is known of the source before it is read, as JSON values."""
        return self._table.description

    def overlaps(self, folder: Path) -> bool:
        """Say whether a folder holds files of the source, or lies in a folder that is searched for them."""
        folder = folder.absolute()
        files = self._table.paths if isinstance(self._table, ParquetTable) else ()
        return any(file.absolute().is_relative_to(folder) for file in files) or any(
            folder.is_relative_to(searched) for searched in self._searched
        )

    def blocks(self, size: int) -> Iterator[UserBlock]:
        """Read all rows, a block at a time; only the last can be shorter.

        Args:
            size: rows a block.

        Yields:
            The blocks in order. What nobody asks the `users` of is not turned into Python objects.

        Raises:
            DataError: a file that is damaged; from `users`, a row that is no user, by its place.
        """
        first = 0
        for number, (rows, read) in enumerate(self._table.blocks(size)):
            yield UserBlock(number, first, rows, partial(self._users, first, read))
            first += rows

    def place(self, row: int) -> str:
        """Say where a row is, for messages."""
        return self._table.place(row)

    def _users(self, first: int, read: Read) -> tuple[list[str], list[list[str]]]:
        users, histories = [], []
        for row, (user, history) in enumerate(zip(*read(), strict=True), start=first):
            known = as_id(user)
            if known is None:
                raise DataError(
                    f"{self.columns[0]} must be an id, got {user!r} in {self.place(row)}; give every user one"
                )
            users.append(known)
            histories.append(self._history(history, row))
        return users, histories

    def _history(self, history: Any, row: int) -> list[str]:
        if getattr(history, "ndim", 0) == 1:
            history = history.tolist()
        if not isinstance(history, list | tuple):
            raise DataError(
                f"{self.columns[1]} must be a list of item ids, got {short(history)} in {self.place(row)}; write [] "
                "for a user without purchases"
            )
        items = [as_id(item) for item in history]
        if None in items:
            bad = history[items.index(None)]
            raise DataError(
                f"{self.columns[1]} must be a list of item ids, got {short(bad)} as one of them in {self.place(row)}; "
                "leave it out"
            )
        return [item for item in items if item is not None]


def block_digest(users: Sequence[str], histories: Sequence[Sequence[str]]) -> str:
    """Return the sha256 of a block's content, the same whatever kind of source it came from."""
    return hashlib.sha256(json.dumps([users, histories]).encode()).hexdigest()


def _is_paths(source: object) -> bool:
    return isinstance(source, list | tuple) and all(isinstance(each, str | Path) for each in source)
