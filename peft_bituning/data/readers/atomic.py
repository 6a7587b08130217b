"""Atomic files: tab-separated tables with typed headers, as RecBole and UniSRec write them."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Unpack

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport, Row
from .text_files import TextOptions, require_columns, table_rows, text_lines
from .unisrec import chained_events, split_texts

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
    path: str | Path, report: ReadReport, source: str | None = None, **options: Unpack[TextOptions]
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
        source: Name of the source; the data set's by default.
        **options: See `TextOptions`.

    Raises:
        DataError: Files are missing, empty or have other columns, or nothing usable is in them.
    """
    prefix = _prefix(Path(path))
    rows = partial(table_rows, report=report, delimiter="\t", typed_header=True, **options)
    inter = Path(f"{prefix}.inter")
    parts = [inter] if inter.is_file() else [Path(f"{prefix}.{split}.inter") for split in _SPLITS]
    if len(parts) > 1 and "item_id_list" in _columns(parts[0], options.get("fallback_encoding")):
        columns = ("user_id", "item_id_list", "item_id")
        training, *held_out = (rows(path=part, required=columns) for part in parts)
        user_ids = _original_ids(Path(f"{prefix}.user2index"), report)
        item_ids = _original_ids(Path(f"{prefix}.item2index"), report)
        text = Path(f"{prefix}.text")
        with_texts = text.is_file()
        items = _text_catalog(text, report, item_ids, **options) if with_texts else _item_catalog(prefix, report, rows)
        events = chained_events(training, chain.from_iterable(held_out), report, user_ids, item_ids)
    else:
        items = _item_catalog(prefix, report, rows)
        columns = ("user_id", "item_id", "timestamp")
        events = (Event.from_row(row, *columns) for part in parts for row in rows(path=part, required=columns))
    return Interactions.from_events(items, events, report, source or prefix.name)


def _prefix(path: Path) -> Path:
    """Return folder and name of the data set, without any ending."""
    if not path.is_dir():
        if not any(Path(f"{path}{ending}").is_file() for ending in (".inter", ".train.inter")):
            raise DataError(
                f"There is neither a folder {path} nor a file {path.name}.inter or {path.name}.train.inter."
            )
        return path
    ending = re.compile(rf"(\.({'|'.join(_SPLITS)}))?\.inter$")
    names = sorted({ending.sub("", file.name) for file in path.glob("*.inter")})
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise DataError(f"{path} must hold the .inter files of one data set, found {found}. Name one as FOLDER/NAME.")
    return path / names[0]


def _columns(path: Path, fallback_encoding: str | None) -> dict[str, str]:
    """Return the column names of a typed header, with their types."""
    header = next(text_lines(path, ReadReport(), fallback_encoding=fallback_encoding), (0, ""))[1]
    return {name: kind for name, _, kind in (column.partition(":") for column in header.split("\t"))}


def _item_catalog(prefix: Path, report: ReadReport, rows: Callable[..., Iterator[Row]]) -> ItemCatalog:
    """Read a RecBole item file: its text columns, under our names."""
    path = Path(f"{prefix}.item")
    text = [name for name, kind in _columns(path, "latin-1").items() if "float" not in kind]
    names = {name: RENAMED.get(name, name) for name in text}
    if "title" in text:
        names = {name: name if new == "title" else new for name, new in names.items()}
    described = (
        row._replace(record={new: row.record[name] for name, new in names.items()})
        for row in rows(path=path, required=("item_id",))
    )
    return ItemCatalog.from_rows(described, report)


def _text_catalog(
    path: Path, report: ReadReport, item_ids: dict[str, str] | None, **options: Unpack[TextOptions]
) -> ItemCatalog:
    """Read a UniSRec text file; with an index of items, the catalog is in its order."""
    places = {} if item_ids is None else {item: place for place, item in enumerate(item_ids.values())}
    found: list[tuple[int, str, str]] = []
    for line, text in text_lines(path, report, count_from=2, **options):
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
