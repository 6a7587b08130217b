"""Recommendations for millions of users: from parquet to parquet, block by block, in as many processes as there are."""

import logging
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, IterableDataset, List, Value
from tqdm.auto import tqdm

from ..artifacts import sha256_of_json
from ..errors import ArtifactError, ConfigurationError, DataError, UnknownItemError
from ..launch import launched_state
from ..serving.recommender import LaserRecommender
from .provenance import made_by
from .shard_folder import ShardFolder, ShardRecord, UserCounts
from .user_source import Files, UserBlock, UserSource, block_digest, open_users

logger = logging.getLogger(__name__)

ITEMS_COLUMN = "item_ids"
SCORES_COLUMN = "scores"

_EXAMPLES = 10


@dataclass(frozen=True)
class BatchReport(UserCounts):
    """What a run of `recommend_parquet` did, counted over all processes.

    Args:
        users: rows of the source.
        shards: files they are in.
        new_shards: of them those that this run made; an earlier one made the others.
    """

    users: int
    shards: int
    new_shards: int


def recommend_parquet(
    recommender: LaserRecommender,
    source: Files | Dataset | IterableDataset,
    output_dir: str | Path,
    k: int = 10,
    filter_seen: bool = True,
    candidates: Sequence[str] | None = None,
    on_unknown: str = "error",
    batch_size: int = 32,
    rows_per_shard: int = 10_000,
    user_column: str = "user_id",
    history_column: str = "history",
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> BatchReport:
    """Write what `LaserRecommender.recommend` gives for every user of a source, in the source's order.

    The source is cut into blocks of `rows_per_shard` rows; a block is a shard, `part-00000.parquet` and so on, with the
    columns `user_column` (string), `item_ids` (list of string, best first) and `scores` (list of float32). Each process
    that `accelerate` started makes every other block, one in memory at a time, and the shards do not depend on how many
    there are. A run that was killed goes on where it was when it is started again.

    Args:
        recommender: a trained recommender, on this process's own device.
        source: parquet files (a path, a glob, a folder, or a list of them), a `Dataset` or an `IterableDataset`; one
            row a user, in the same order whenever it is read, whole on every process.
        output_dir: the folder of the shards, which holds nothing else.
        k: see `LaserRecommender.recommend`.
        filter_seen: see there.
        candidates: see there.
        on_unknown: `error` stops at item ids that are not in the catalog, `ignore` reads histories without them and
            counts them.
        batch_size: users a forward pass; like `on_unknown` and the number of processes it may change when a run goes
            on.
        rows_per_shard: users a shard; batches are made of similar lengths within it.
        user_column: column of the user id.
        history_column: column of the item ids in time order; an empty list is a cold start.
        overwrite: remove the shards that an earlier run left in the folder.
        show_progress_bar: show one on the main process.

    Returns:
        Counts, the same on every process.

    Raises:
        ConfigurationError: a setting out of its range, or a column that is not there.
        DataError: the source cannot be read, is empty, or holds a row that is no user.
        UnknownItemError: an item id is not in the catalog.
        ArtifactError: the folder holds shards of another model, other settings or other rows.
    """
    if isinstance(rows_per_shard, bool) or not isinstance(rows_per_shard, int) or rows_per_shard < 1:
        raise ConfigurationError(f"rows_per_shard must be an integer >= 1, got {rows_per_shard!r}")
    if user_column in (ITEMS_COLUMN, SCORES_COLUMN):
        raise ConfigurationError(f"user_column must not be a column of the lists, got {user_column!r}; rename it")
    recommend = partial(
        recommender.recommend, k=k, filter_seen=filter_seen, candidates=candidates, batch_size=batch_size
    )
    recommend([], on_unknown=on_unknown)  # checks the settings
    users = open_users(source, user_column, history_column)
    if users.overlaps(Path(output_dir)):
        raise ConfigurationError(f"output_dir must be apart from the source, got {str(output_dir)!r}; choose another")
    state = launched_state()
    settings = {
        "made_by": made_by(recommender) if state.is_main_process else {},  # the main process alone compares them
        "k": int(k),
        "filter_seen": bool(filter_seen),
        "candidates": None if candidates is None else sha256_of_json(sorted(set(map(str, candidates)))),
        "rows_per_shard": rows_per_shard,
        "user_column": user_column,
        "history_column": history_column,
    }
    progress = show_progress_bar and state.is_main_process
    columns = {user_column: Value("string"), ITEMS_COLUMN: List(Value("string")), SCORES_COLUMN: List(Value("float32"))}
    job = _Job(
        users,
        ShardFolder(output_dir, Features(columns)),
        recommender.items.index,
        partial(recommend, on_unknown="ignore", show_progress_bar=progress),
        on_unknown == "error",
        state,
    )
    finished = job.on_main(lambda: job.folder.prepare(settings, overwrite))
    with tqdm(total=users.rows, desc="recommending", unit="user", disable=not progress) as bar:
        made = job.make(users.blocks(rows_per_shard), finished, bar)
    records = finished | made
    totals = _totals(records.values())
    job.on_main(lambda: job.folder.finish(settings, records, {"source": users.description, **totals}))
    report = BatchReport(shards=len(records), new_shards=len(made), unknown_examples=_examples(records), **totals)
    if report.unknown_items and state.is_main_process:
        logger.warning(
            "%s items of %s users are not in the catalog and were left out, first %s",
            *(f"{report.unknown_items:,}", f"{report.unknown_users:,}", ", ".join(report.unknown_examples)),
        )
    return report


@dataclass(frozen=True)
class _Job:
    """The blocks of a source and the shards they become."""

    source: UserSource
    folder: ShardFolder
    catalog: Container[str]
    recommend: Callable[[list[list[str]]], list[list[tuple[str, float]]]]  # leaves unknown items out
    stop_at_unknown: bool
    state: PartialState

    def make(
        self, blocks: Iterable[UserBlock], finished: Mapping[int, ShardRecord], bar: "tqdm[Any]"
    ) -> dict[int, ShardRecord]:
        """Make this process's share of the missing shards; return those of all processes."""
        rank, world = self.state.process_index, self.state.num_processes
        made: dict[int, ShardRecord] = {}
        count = missing = 0
        for block in blocks:
            record = finished.get(block.number)
            if record is None or (self.stop_at_unknown and record.unknown_items):
                # what is missing is shared anew, so that one process alone is not left with it
                if missing % world == rank:
                    made[block.number] = self._write(block)
                missing += 1
            elif block.number % world == rank:
                self._check(block, record)
            count += 1
            bar.update(block.rows)
        if not count:
            raise DataError("source must hold at least one user, got no rows; check the query that wrote it")
        if any(number >= count for number in finished):
            raise ArtifactError(
                f"{self.folder.folder} must hold shards of this source, got more than its {count}; give the same "
                "source, choose another output_dir, or start again with overwrite=True"
            )
        return {number: record for share in gather_object([made]) for number, record in share.items()}

    def _write(self, block: UserBlock) -> ShardRecord:
        users, histories = block.users()
        unknown = [[item for item in history if item not in self.catalog] for history in histories]
        if self.stop_at_unknown and any(unknown):
            row = next(row for row, items in enumerate(unknown) if items)
            raise UnknownItemError(
                f"{self.source.columns[1]} must hold items of the catalog, got {', '.join(unknown[row][:_EXAMPLES])} "
                f"in {self.source.place(block.first + row)}, user {users[row]}; add them with add_items, or leave them "
                "out with on_unknown='ignore'"
            )
        lists = self.recommend(histories)
        return self.folder.write(
            block.number,
            {
                self.source.columns[0]: users,
                ITEMS_COLUMN: [[item for item, _ in row] for row in lists],
                SCORES_COLUMN: [[score for _, score in row] for row in lists],
            },
            source_sha256=block_digest(users, histories),
            cold_starts=sum(len(out) == len(history) for out, history in zip(unknown, histories, strict=True)),
            unknown_users=sum(map(bool, unknown)),
            unknown_items=sum(map(len, unknown)),
            unknown_examples=sorted({item for items in unknown for item in items})[:_EXAMPLES],
        )

    def _check(self, block: UserBlock, record: ShardRecord) -> None:
        """Make sure that a finished shard is of the rows that the source has now."""
        if block_digest(*block.users()) != record.source_sha256:
            raise ArtifactError(
                f"{self.folder.path(block.number).name} must be of this source, got one that was made of other rows "
                f"than those from {self.source.place(block.first)} on; give the same source, choose another "
                "output_dir, or start again with overwrite=True"
            )

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do something on the main process; what it returns or raises, all return or raise."""
        outcome: list[Any] = [None, None]
        if self.state.is_main_process:
            try:
                outcome[0] = work()
            except (OSError, ArtifactError, ConfigurationError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _examples(records: Mapping[int, ShardRecord]) -> tuple[str, ...]:
    return tuple(sorted({item for record in records.values() for item in record.unknown_examples})[:_EXAMPLES])


def _totals(records: Collection[ShardRecord]) -> dict[str, int]:
    names = ("cold_starts", "unknown_users", "unknown_items")
    counts = {name: sum(getattr(record, name) for record in records) for name in names}
    return {"users": sum(record.rows for record in records), **counts}
