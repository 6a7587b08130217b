"""A folder of parquet shards that says what made it, and that an interrupted run goes on with."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # what `datasets` reads and writes parquet with
import pyarrow.parquet as pq
from datasets import Features

from ..artifacts import differences, sha256_of_file, whole_file, write_whole
from ..errors import ArtifactError, ConfigurationError

logger = logging.getLogger(__name__)

STATE_FOLDER = ".recommendations"  # hidden: `datasets` would read any other file of the folder as a shard
INDEX_FILE = "index.json"
FORMAT_VERSION = 1

START_AGAIN = "choose another output_dir, or start again with overwrite=True"
_SHARD = re.compile(r"part-\d{5}\.parquet")
_MOST_SHARDS = 100_000  # beyond five digits the shards' names would no longer sort by number


@dataclass(frozen=True)
class UserCounts:
    """What is counted of users."""

    cold_starts: int  # without a single item of the catalog, who get what an empty history gets
    unknown_users: int  # with items that are not in the catalog
    unknown_items: int  # left out, repeats included
    unknown_examples: Sequence[str]  # a few of them


@dataclass(frozen=True)
class ShardRecord(UserCounts):
    """What is known of a finished shard beside its counts: rows, and digests of it and of the rows it was made of."""

    rows: int
    sha256: str
    source_sha256: str


class ShardFolder:
    """Shards `part-00000.parquet`, ..., of some columns, and the hidden `.recommendations/index.json`.

    Every file is written under another name first, so that a kill leaves whole shards alone; the record of a shard is
    written before the shard, so that a shard is finished where its content is the one recorded.
    """

    def __init__(self, folder: str | Path, features: Features) -> None:
        self.folder = Path(folder)
        self.features = features
        self.state = self.folder / STATE_FOLDER

    def prepare(self, settings: Mapping[str, Any], overwrite: bool = False) -> dict[int, ShardRecord]:
        """Make the folder ready, and return the finished shards by number; one process calls this, the others wait.

        With `overwrite` the shards of an earlier run are removed, whatever made them. Files of something else are an
        `ArtifactError`, and so are shards of other `settings` (JSON values of all that a shard's content follows from).
        """
        shards = self._shards()
        if not shards or (overwrite and self.state.is_dir()):
            for path in [*shards, *self.folder.glob(".part-*"), *self.state.glob("*.json*")]:
                path.unlink()
            self.state.mkdir(parents=True, exist_ok=True)
            self._write_index({"settings": settings, "complete": False})
            return {}
        index = self._read_index(shards[0].name)
        if found := differences(index["settings"], dict(settings)):
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ArtifactError(
                f"{self.folder} must hold shards of the same settings, got others: {'; '.join(found[:5])}{more}; "
                f"{START_AGAIN}"
            )
        return self._finished(index)

    def write(self, number: int, columns: Mapping[str, Sequence[Any]], **facts: Any) -> ShardRecord:
        """Write a shard and its record, and return the latter; `facts` are what it holds beside rows and digest."""
        table = pa.table(dict(columns), schema=self.features.arrow_schema)
        with whole_file(self.path(number)) as partial:
            pq.write_table(table, partial)
            record = ShardRecord(rows=table.num_rows, sha256=sha256_of_file(partial), **facts)
            write_whole(self._record_path(number), json.dumps(asdict(record)))
        return record

    def finish(self, settings: Mapping[str, Any], records: Mapping[int, ShardRecord], facts: Mapping[str, Any]) -> None:
        """Write the index of a finished run, in place of all shards' records; one process calls this.

        `settings` are those that `prepare` took, `facts` what else the index tells, as JSON values.
        """
        shards = {self.path(number).name: asdict(records[number]) for number in sorted(records)}
        self._write_index({"settings": settings, "complete": True, **facts, "shards": shards})
        for number in records:
            self._record_path(number).unlink(missing_ok=True)

    def path(self, number: int) -> Path:
        """Return where a shard is; `ConfigurationError` where there are too many."""
        if number >= _MOST_SHARDS:
            raise ConfigurationError(f"rows_per_shard must give at most {_MOST_SHARDS} shards, got more; raise it")
        return self.folder / f"part-{number:05d}.parquet"

    def _finished(self, index: Mapping[str, Any]) -> dict[int, ShardRecord]:
        """Return the records of whole shards; other shards are removed, to be made again."""
        found = dict(index.get("shards", {}))
        for path in self.state.glob("part-*.json"):
            try:
                found[f"{path.stem}.parquet"] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # a machine that lost power
                found.pop(f"{path.stem}.parquet", None)
        whole = {
            name: ShardRecord(**record)
            for name, record in sorted(found.items())
            if (self.folder / name).is_file() and sha256_of_file(self.folder / name) == record["sha256"]
        }
        for path in self._shards():
            if path.name not in whole:
                logger.warning("%s is not the shard that was written; it is made again", path)
                path.unlink()
        if len(whole) < len(found):
            self._write_index({**index, "complete": False})
        return {int(name.removeprefix("part-").removesuffix(".parquet")): record for name, record in whole.items()}

    def _read_index(self, shard: str) -> dict[str, Any]:
        path = self.state / INDEX_FILE
        try:
            index = dict(json.loads(path.read_text(encoding="utf-8")))
            version, index["settings"] = index["format_version"], dict(index["settings"])
        except FileNotFoundError:
            raise ArtifactError(
                f"{self.folder} must say what made its shards, got {shard} without {STATE_FOLDER}/{INDEX_FILE}; choose "
                "another output_dir, or remove this one"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} must be the index of a run, got what cannot be read ({error}); {START_AGAIN}"
            ) from error
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} must have format_version {FORMAT_VERSION}, got {version!r}; {START_AGAIN}")
        return index

    def _write_index(self, content: Mapping[str, Any]) -> None:
        text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2)
        write_whole(self.state / INDEX_FILE, text + "\n")

    def _shards(self) -> list[Path]:
        """Return the files that `datasets` would read; refuse others than shards, which are not ours to remove."""
        if self.folder.is_file():
            raise ArtifactError(f"output_dir must be a folder, got the file {self.folder}; choose another")
        visible = sorted(path for path in self.folder.glob("*") if not path.name.startswith("."))
        if strangers := [path.name for path in visible if not _SHARD.fullmatch(path.name)]:
            raise ArtifactError(
                f"{self.folder} must hold nothing but shards of recommendations, got {', '.join(strangers[:5])}; "
                "choose another output_dir"
            )
        return visible

    def _record_path(self, number: int) -> Path:
        return self.state / f"{self.path(number).stem}.json"
