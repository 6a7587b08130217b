"""Atomic files: tab-separated tables with typed headers, as RecBole and UniSRec write them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport
from .text_files import Row, require_columns, table_rows, text_lines
from .unisrec import CutHistories, split_texts

#: RecBole's names for what we call otherwise; `movie_title` and the like are the title.
RENAMED = {
    "movie_title": "title",
    "name": "title",
    "release_year": "year",
    "class": "genres",
    "genre": "genres",
    "categories": "category",
}
_SPLITS = ("train", "valid", "test")


def read_atomic(
    path: str | Path,
    report: ReadReport,
    *,
    fallback_encoding: str | None = None,
    progress: bool = False,
    source: str | None = None,
) -> Interactions:
    """Read atomic files, in RecBole's form or in that of UniSRec's processed download.

    RecBole: `NAME.inter` (`user_id`, `item_id`, `timestamp`) or its parts `NAME.{train,valid,test}.inter`, and
    `NAME.item` (`item_id` and text columns; numbers and vectors are passed over; `movie_title` and `name` become
    `title`, `release_year` `year`, `class` `genres`). All items of `NAME.item` are in the catalog.

    UniSRec: `NAME.{train,valid,test}.inter` (`user_id`, `item_id_list`, `item_id`: cuts of the histories), and
    `NAME.text`; where `NAME.item2index` and `NAME.user2index` exist, indices become the original ids again. The text
    of Amazon items is split into title, category and brand (see `unisrec.split_texts`); other text is the title.

    Args:
        path: The folder, or a path without endings (`FOLDER/NAME`) where the folder holds several data sets.
        report: Takes counts and rejected rows.
        fallback_encoding: Encoding of lines that are not UTF-8.
        progress: Show progress bars.
        source: Name of the source; the data set's by default.

    Raises:
        DataError: Files are missing, empty or have other columns, or nothing usable is in them.
    """
    prefix = _prefix(Path(path))
    rows = partial(
        table_rows,
        report=report,
        delimiter="\t",
        typed_header=True,
        fallback_encoding=fallback_encoding,
        progress=progress,
    )
    name = source or prefix.name
    inter = _with_ending(prefix, ".inter")
    parts = [inter] if inter.is_file() else [_with_ending(prefix, f".{split}.inter") for split in _SPLITS]
    if len(parts) > 1 and "item_id_list" in _columns(parts[0], fallback_encoding):
        cuts = CutHistories(report)
        for part in parts:
            check = partial(require_columns, required=("user_id", "item_id_list", "item_id"))
            for row in rows(part, check_columns=check):
                cuts.add(row, training=part is parts[0])
        user_ids = _original_ids(_with_ending(prefix, ".user2index"), report)
        item_ids = _original_ids(_with_ending(prefix, ".item2index"), report)
        if _with_ending(prefix, ".text").is_file():
            items = _text_catalog(prefix, report, item_ids, fallback_encoding, progress)
        else:
            items = _item_catalog(_with_ending(prefix, ".item"), report, rows)
        events: Iterator[Event] = cuts.events(user_ids, item_ids)
    else:
        items = _item_catalog(_with_ending(prefix, ".item"), report, rows)
        check = partial(require_columns, required=("user_id", "item_id", "timestamp"))
        events = (
            Event(row.record["user_id"], row.record["item_id"], row.record["timestamp"], row.file, row.line)
            for part in parts
            for row in rows(part, check_columns=check)
        )
    return Interactions.from_events(items, events, report, name)


def _prefix(path: Path) -> Path:
    """Return folder and name of the data set, without any ending."""
    if not path.is_dir():
        if not any(_with_ending(path, ending).is_file() for ending in (".inter", ".train.inter")):
            raise DataError(
                f"There is neither a folder {path} nor a file {path.name}.inter or {path.name}.train.inter."
            )
        return path
    names = {file.name.removesuffix(".inter") for file in path.glob("*.inter")}
    names = {name.removesuffix(f".{split}") for name in names for split in _SPLITS if name.endswith(f".{split}")} | {
        name for name in names if not name.endswith(tuple(f".{split}" for split in _SPLITS))
    }
    if len(names) != 1:
        found = ", ".join(sorted(names)) or "none"
        raise DataError(f"{path} must hold the .inter files of one data set, found {found}. Name one as FOLDER/NAME.")
    return path / names.pop()


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _columns(path: Path, fallback_encoding: str | None) -> list[str]:
    """Return the column names of a typed header."""
    header = next(text_lines(path, ReadReport(), fallback_encoding=fallback_encoding), (0, ""))[1]
    return [name.split(":")[0] for name in header.split("\t")]


def _item_catalog(path: Path, report: ReadReport, rows: Callable[..., Iterator[Row]]) -> ItemCatalog:
    """Read a RecBole item file: its text columns, under our names."""
    header = next(text_lines(path, ReadReport(), fallback_encoding="latin-1"), (0, ""))[1]
    text = [name for name, _, kind in (column.partition(":") for column in header.split("\t")) if "float" not in kind]
    has_title = "title" in text

    def renamed(name: str) -> str:
        target = RENAMED.get(name, name)
        return name if target == "title" and has_title else target

    check = partial(require_columns, required=("item_id",))
    return ItemCatalog.from_rows(
        (
            row._replace(record={renamed(name): row.record[name] for name in text})
            for row in rows(path, check_columns=check)
        ),
        report,
    )


def _text_catalog(
    prefix: Path, report: ReadReport, item_ids: dict[str, str] | None, fallback_encoding: str | None, progress: bool
) -> ItemCatalog:
    """Read a UniSRec text file; with an index of items, the catalog is in its order."""
    path = _with_ending(prefix, ".text")
    places = {} if item_ids is None else {item: place for place, item in enumerate(item_ids.values())}
    found: list[tuple[int, str, str]] = []
    lines = text_lines(path, report, fallback_encoding=fallback_encoding, progress=progress, count_from=2)
    for line, text in lines:
        item_id, _, description = text.partition("\t")
        if line == 1:
            require_columns([name.split(":")[0] for name in text.split("\t")], path.name, ("item_id", "text"))
        else:
            found.append((line, item_id, description))
    records = split_texts([description for _, _, description in found])
    rows = [
        Row(path.name, line, {"item_id": item_id, **record})
        for (line, item_id, _), record in zip(found, records, strict=True)
    ]
    rows.sort(key=lambda row: places.get(row.record["item_id"], len(places)))
    return ItemCatalog.from_rows(rows, report)


def _original_ids(path: Path, report: ReadReport) -> dict[str, str] | None:
    """Read an index file (`id TAB index`): index to original id, or `None` where there is no such file."""
    if not path.is_file():
        return None
    pairs: dict[str, str] = {}
    for line, text in text_lines(path, report):
        original, tab, index = text.rpartition("\t")
        if not tab or not original or not index.strip().isdigit():
            report.reject("wrong_column_count", path.name, line, "expected an id, a tab and an index")
        else:
            pairs[index.strip()] = original
    return dict(sorted(pairs.items(), key=lambda pair: int(pair[0])))
