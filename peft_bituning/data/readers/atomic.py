"""Atomic files: tab-separated tables with typed headers, as RecBole and UniSRec write them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Unpack

from ...errors import DataError
from ..interactions import IN_FILE_ORDER, Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport, Row
from .text_files import TextOptions, table_rows, text_lines

#: RecBole's names for what we call otherwise; `movie_title` and the like are the title.
RENAMED = {
    "movie_title": "title",
    "name": "title",
    "release_year": "year",
    "class": "genres",
    "genre": "genres",
    "categories": "category",
}
#: First element of the category path of every item, by Amazon 2018 domain of UniSRec.
AMAZON_ROOTS = (
    "Arts, Crafts & Sewing",
    "CDs & Vinyl",
    "Grocery & Gourmet Food",
    "Home & Kitchen",
    "Industrial & Scientific",
    "Kindle Store",
    "Movies & TV",
    "Musical Instruments",
    "Office Products",
)
_SPLITS = ("train", "valid", "test")


def read_atomic(
    path: str | Path, report: ReadReport, source: str | None = None, **options: Unpack[TextOptions]
) -> Interactions:
    """Read atomic files of a folder, or of a data set in it (`FOLDER/NAME`), in RecBole's form or in UniSRec's.

    RecBole: `NAME.inter` (`user_id`, `item_id`, `timestamp`) or its parts `NAME.{train,valid,test}.inter`, and
    `NAME.item` (`item_id` and text columns; numbers and vectors are passed over; `movie_title` and `name` become
    `title`, `release_year` `year`, `class` `genres`). All items of `NAME.item` are in the catalog.

    UniSRec: `NAME.{train,valid,test}.inter` (`user_id`, `item_id_list`, `item_id`: cuts of the histories), and
    `NAME.text`; where `NAME.item2index` and `NAME.user2index` exist, indices become the original ids again. The text
    of Amazon items is split into title, category and brand (see `split_texts`); other text is the title.
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
        items = _text_catalog(text, report, rows, item_ids) if with_texts else _item_catalog(prefix, report, rows)
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
    path: Path, report: ReadReport, rows: Callable[..., Iterator[Row]], item_ids: Mapping[str, str]
) -> ItemCatalog:
    """Read a UniSRec text file; with an index of items, the catalog is in its order."""
    places = {item: place for place, item in enumerate(item_ids.values())}
    found = list(rows(path=path, required=("item_id", "text")))
    texts = split_texts([row.record["text"] for row in found])
    described = [
        row._replace(record={"item_id": row.record["item_id"], **text}) for row, text in zip(found, texts, strict=True)
    ]
    described.sort(key=lambda row: places.get(row.record["item_id"], len(places)))
    return ItemCatalog.from_rows(described, report)


def _original_ids(path: Path, report: ReadReport) -> dict[str, str]:
    """Read an index file (`id TAB index`): index to original id, nothing where there is no such file."""
    pairs: dict[str, str] = {}
    for line, text in text_lines(path, report) if path.is_file() else ():
        original, tab, index = text.rpartition("\t")
        if not tab or not original or not index.strip().isdigit():
            report.reject("wrong_column_count", path.name, line, "expected an id, a tab and an index")
        else:
            pairs[index.strip()] = original
    return dict(sorted(pairs.items(), key=lambda pair: int(pair[0])))


def chained_events(
    training: Iterable[Row],
    held_out: Iterable[Row],
    report: ReadReport,
    user_ids: Mapping[str, str],
    item_ids: Mapping[str, str],
) -> Iterator[Event]:
    """Yield every event of UniSRec's histories once, each user's in time order.

    Rows are (`user_id`, `item_id_list`: items before, `item_id`: next item), those held out validation first, then
    test. Training rows are all cuts of a user's training part; items before are the most recent ones (at most 50
    upstream), so a longer history is chained from row to row. Upstream writes the longest cut first; both directions
    are understood. Every row is checked against the history as far as it is known, and one that does not fit is
    rejected as `inconsistent_history`. `user_ids` and `item_ids` map indices to original ids where rows hold indices.
    """
    parts: tuple[dict[str, list[Row]], dict[str, list[Row]]] = ({}, {})
    for part, rows in zip(parts, (training, held_out), strict=True):
        for row in rows:
            part.setdefault(row.record["user_id"], []).append(row)
    for user in {**parts[1], **parts[0]}:
        history: list[str] = []
        for row in _in_time_order(parts[0].get(user, [])) + parts[1].get(user, []):
            added = _continuation(history, row)
            if added is None:
                reason = "the items before do not follow from the user's other rows"
                report.reject("inconsistent_history", row.file, row.line, reason)
                continue
            history += added
            for item in added:
                yield Event(user_ids.get(user, user), item_ids.get(item, item), IN_FILE_ORDER, row.file, row.line)


def _items_before(row: Row) -> list[str]:
    return row.record["item_id_list"].split()


def _continuation(history: list[str], row: Row) -> list[str] | None:
    """Return what a row adds to the history known so far, or `None` if it does not follow from it."""
    before, target = _items_before(row), row.record["item_id"]
    if not history:
        return [*before, target]
    if history[-len(before) :] == before or not before:
        return [target]
    if len(before) > 1 and history[-len(before) + 1 :] == before[:-1]:
        return [before[-1], target]  # the row between was rejected; this one still knows its item
    return None


def _in_time_order(rows: list[Row]) -> list[Row]:
    """Return a user's training rows shortest cut first.

    Cut lengths grow by one a row up to a limit; among the rows at that limit only the order in the file tells.
    """
    if len(rows) > 1:
        first, last = len(_items_before(rows[0])), len(_items_before(rows[-1]))
        # both at the limit, the later cut first
        swapped = _items_before(rows[1])[1:] + [rows[1].record["item_id"]] == _items_before(rows[0])
        if first > last or (first == last and swapped):
            rows = rows[::-1]
    return sorted(rows, key=lambda row: len(_items_before(row)))


def split_texts(texts: Sequence[str]) -> list[dict[str, str]]:
    """Split UniSRec's item texts into `title` and, where found, `category` (without the domain's name) and `brand`.

    Upstream joins `TITLE. CATEGORY PATH. BRAND.` for Amazon items, and every path starts with the domain's name, by
    which it is found. Texts of other domains, where none is found in at least half of them, become the title as they
    are, without the last full stop; so does a single text without it. Upstream leaves out quotation marks.
    """
    found = Counter(root for text in texts for root in AMAZON_ROOTS if f". {root}" in text)
    root, number = found.most_common(1)[0] if found else ("", 0)
    if number == 0 or number * 2 < len(texts):
        return [{"title": _sentence(text)} for text in texts]
    return [_fields(text.strip(), root) for text in texts]


def _fields(text: str, root: str) -> dict[str, str]:
    title, found, rest = text.partition(f". {root}")
    if not found and text.startswith(root):
        title, found, rest = "", root, text.removeprefix(root)
    if found:
        category, _, brand = rest.partition(". ")
    else:  # "TITLE. . BRAND." has an empty path
        title, found, brand = text.partition(". . ")
        category = ""
    if not found:
        return {"title": _sentence(text)}
    return {"title": title.strip(), "category": _sentence(category), "brand": _sentence(brand)}


def _sentence(text: str) -> str:
    return text.strip().removesuffix(".").strip()
