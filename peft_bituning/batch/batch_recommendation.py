"""Recommendations for millions of users: from parquet to parquet, block by block, in as many processes as there are."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, IterableDataset, List, Value
from peft import get_peft_model_state_dict
from tqdm.auto import tqdm

from ..artifacts import sha256_of_json, sha256_of_tensors
from ..errors import ArtifactError, ConfigurationError, DataError, UnknownItemError
from ..launch import launched_state
from ..serving.recommender import USER_ADAPTER, LaserRecommender
from .shard_folder import START_AGAIN, ShardFolder, ShardRecord, UserCounts
from .user_source import Files, UserBlock, UserSource, block_digest, open_users

logger = logging.getLogger(__name__)

ITEMS_COLUMN = "item_ids"
SCORES_COLUMN = "scores"

_EXAMPLES = 10


@dataclass(frozen=True)
class BatchReport(UserCounts):
    """What a run of `recommend_parquet` did, counted over all processes."""

    users: int  # rows of the source
    shards: int  # files they are in
    new_shards: int  # of them those that this run made


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
    parts: str | None = None,
) -> BatchReport:
    """Write what `LaserRecommender.recommend` gives for every user of a source, in its order; every process calls this.

    A block of rows is a shard, `part-00000.parquet` and so on, with the columns `user_column` (string), `item_ids`
    (list of string, best first) and `scores` (list of float32). Each process that `accelerate` started makes every
    other block, one in memory at a time; the shards do not depend on how many there are. A run that was killed goes on
    where it was when it is started again.

    Args:
        recommender: A trained recommender, on this process's own device.
        source: Parquet files (a path, a glob, a folder, or a list of them), a `Dataset` or an `IterableDataset`; one
            row a user, in the same order whenever it is read, whole on every process.
        output_dir: The folder of the shards, which holds nothing else.
        k: As `filter_seen` and `candidates`, see `LaserRecommender.recommend`.
        filter_seen: See there.
        candidates: See there.
        on_unknown: `error` stops at item ids that are not in the catalog, `ignore` leaves them out and counts them.
        batch_size: Users per forward pass; it may change when a run goes on, and so may `on_unknown`.
        rows_per_shard: Users per shard; batches are made of similar lengths within it.
        user_column: Column of the user id.
        history_column: Column of the item ids in time order; an empty list is a cold start.
        overwrite: Remove the shards that an earlier run left in the folder.
        show_progress_bar: Show one on the main process.
        parts: See `LaserRecommender.recommend`.

    Raises:
        ConfigurationError: A setting out of its range, or a column that is not there.
        DataError: The source cannot be read, is empty, or holds a row that is no user.
        UnknownItemError: An item id is not in the catalog.
        ArtifactError: The folder holds shards of another model, other settings or other rows.
    """
    recommend = partial(recommender.recommend, k=k, filter_seen=filter_seen, candidates=candidates, parts=parts)
    recommend = partial(recommend, batch_size=batch_size)
    recommend([], on_unknown=on_unknown)  # checks the settings
    users = _open(source, user_column, history_column, Path(output_dir), rows_per_shard)
    chosen = None if candidates is None else sha256_of_json(sorted(set(map(str, candidates))))
    settings = {"k": int(k), "filter_seen": bool(filter_seen), "candidates": chosen, "rows_per_shard": rows_per_shard}
    if recommender.hybrid is not None:  # a folder without one makes shards that go on from before there was any
        settings["parts"] = "laser" if parts == "laser" else recommender.hybrid.content_hash()
    columns = {user_column: Value("string"), ITEMS_COLUMN: List(Value("string")), SCORES_COLUMN: List(Value("float32"))}
    folder = ShardFolder(output_dir, Features(columns))
    recommend = partial(recommend, on_unknown="ignore")
    job = _Job(recommender, recommend, users, folder, on_unknown == "error", launched_state())
    return job.run(settings, overwrite, show_progress_bar)


def made_by(recommender: LaserRecommender) -> dict[str, Any]:
    """Return what tells one recommender's lists from another's, as JSON values.

    These are the base model's name, revision, configuration and type, checksums of the user adapter, the item table,
    the catalog and the ID recommender, and the settings of the index and the prompt.
    """
    base, frozen, index = recommender.base, recommender.id_recommender, recommender.index
    adapter = get_peft_model_state_dict(recommender.model, adapter_name=USER_ADAPTER, save_embedding_layers=False)
    known = {name: getattr(index, name) for name in ("kind", "parameters") if hasattr(index, name)}
    return {
        "base_model": base.name,
        "base_model_revision": base.revision,
        "base_model_fingerprint": base.fingerprint(),
        "dtype": str(base.model.dtype),
        "quantization": str(getattr(base.model, "quantization_method", None)),
        "adapter": sha256_of_tensors(adapter, "{name} {shape} {dtype}\n"),
        "item_table": recommender.table.checksum(),
        "catalog": sha256_of_json([recommender.items.item_ids, recommender.items.attributes]),
        "index": {"class": type(index).__name__, **known},
        "recommender": None if frozen is None else frozen.content_hash(),
        "template": json.loads(recommender.template.to_json()),
        **asdict(recommender.settings.history),
    }


def _open(
    source: Files | Dataset | IterableDataset, user: str, history: str, output_dir: Path, rows_per_shard: int
) -> UserSource:
    """Open the users, where they and what is made of them fit together."""
    if isinstance(rows_per_shard, bool) or not isinstance(rows_per_shard, int) or rows_per_shard < 1:
        raise ConfigurationError(f"rows_per_shard must be an integer >= 1, got {rows_per_shard!r}")
    if user in (ITEMS_COLUMN, SCORES_COLUMN):
        raise ConfigurationError(f"user_column must not be a column of the lists, got {user!r}; rename it")
    users = open_users(source, user, history)
    if users.overlaps(output_dir):
        raise ConfigurationError(f"output_dir must be apart from the source, got {str(output_dir)!r}; choose another")
    return users


@dataclass
class _Job:
    """The blocks of a source and the shards they become."""

    recommender: LaserRecommender
    recommend: Callable[..., list[list[tuple[str, float]]]]  # leaves unknown items out
    source: UserSource
    folder: ShardFolder
    stop_at_unknown: bool
    state: PartialState

    def run(self, chosen: Mapping[str, Any], overwrite: bool, progress: bool) -> BatchReport:
        """Make all shards that are missing, where those of other settings are not to be found."""
        progress = progress and self.state.is_main_process
        self.recommend = partial(self.recommend, show_progress_bar=progress)
        settings = {
            "made_by": made_by(self.recommender) if self.state.is_main_process else {},  # who alone compares them
            **chosen,
            "user_column": self.source.columns[0],
            "history_column": self.source.columns[1],
        }
        finished = self._on_main(lambda: self.folder.prepare(settings, overwrite))
        with tqdm(total=self.source.rows, desc="recommending", unit="user", disable=not progress) as bar:
            made = self._make(self.source.blocks(chosen["rows_per_shard"]), finished, bar)
        records = finished | made
        totals = {"users": sum(record.rows for record in records.values())}
        for name in ("cold_starts", "unknown_users", "unknown_items"):
            totals[name] = sum(getattr(record, name) for record in records.values())
        facts = {"source": self.source.description, **totals}
        self._on_main(lambda: self.folder.finish(settings, records, facts))
        examples = sorted({item for record in records.values() for item in record.unknown_examples})[:_EXAMPLES]
        report = BatchReport(shards=len(records), new_shards=len(made), unknown_examples=tuple(examples), **totals)
        if report.unknown_items and self.state.is_main_process:
            counts = (f"{report.unknown_items:,}", f"{report.unknown_users:,}", ", ".join(examples))
            logger.warning("%s items of %s users are not in the catalog and were left out, first %s", *counts)
        return report

    def _make(
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
                f"source, {START_AGAIN}"
            )
        return {number: record for share in gather_object([made]) for number, record in share.items()}

    def _write(self, block: UserBlock) -> ShardRecord:
        users, histories = block.users()
        unknown = [[item for item in history if item not in self.recommender.items.index] for history in histories]
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
                f"than those from {self.source.place(block.first)} on; give the same source, {START_AGAIN}"
            )

    def _on_main(self, work: Callable[[], Any]) -> Any:
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
