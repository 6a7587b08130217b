"""Amazon review dumps of 2014 and 2018: `reviews_*.json.gz` or `*_5.json.gz`, and `meta_*.json.gz`."""

import datetime as dt
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport, Row
from ..values import as_id, as_text, is_missing
from .text_files import TextOptions, json_rows

_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>?")
_SCRIPT = re.compile(r"getTime\(\)|function\s*\(|\bvar\s+\w+\s*=")
_BY = re.compile(r"^by\s*\n\s*")
_STORE = re.compile(r"^Visit Amazon's (.+) Page$")


def read_amazon2018(
    reviews: str | Path, meta: str | Path, report: ReadReport, **options: Unpack[TextOptions]
) -> Interactions:
    """Read a five-core review file and the metadata of its category, JSON lines or (in old dumps) Python literals.

    The catalog holds the items that were reviewed and have metadata, in the metadata's order; metadata of other
    items is passed over. Titles that are page code count as missing; the category is the path without its root.

    Args:
        reviews: Rows of `reviewerID`, `asin`, `unixReviewTime` (or `reviewTime`, as in "09 13, 2009").
        meta: Rows of `asin`, `title`, `brand`, `category` (in 2014 `categories`).
        report: Takes counts and rejected rows.
        **options: See `TextOptions`.

    Raises:
        DataError: A file is missing or empty, or nothing usable is in it.
    """
    rows = json_rows(Path(reviews), report, python_literals=True, **options)
    events = [
        Event(row.record.get("reviewerID"), row.record.get("asin"), _review_time(row.record), row.file, row.line)
        for row in rows
    ]
    records = json_rows(Path(meta), report, python_literals=True, **options)
    return joined(events, records, _described, report, f"{Path(reviews).name} with {Path(meta).name}")


def joined(
    events: list[Event],
    records: Iterable[Row],
    describe: Callable[[Mapping[str, Any]], dict[str, Any]],
    report: ReadReport,
    source: str,
) -> Interactions:
    """Join events with the metadata of their items; that of other items is passed over.

    Args:
        events: The events.
        records: Metadata, one row an item, in catalog order.
        describe: Makes of a record what the catalog keeps, `item_id` and text columns.
        report: Takes counts and rejected rows.
        source: Where the events came from.

    Raises:
        DataError: Nothing usable is left.
    """
    bought = {item for item in (as_id(event.item_id) for event in events) if item is not None}
    rows = (row._replace(record=describe(row.record)) for row in records)
    return Interactions.from_events(ItemCatalog.from_rows(rows, report, keep=bought), events, report, source)


def find_amazon2018(argument: str | Path) -> tuple[Path, Path]:
    """Find the review file and the metadata file.

    Args:
        argument: `REVIEWS,META`, or a folder that holds one of each.

    Raises:
        DataError: It is neither, or the folder holds none or several of one kind.
    """
    reviews, comma, meta = str(argument).partition(",")
    if comma:
        return Path(reviews.strip()), Path(meta.strip())
    folder = Path(argument)
    if not folder.is_dir():
        raise DataError(f"amazon2018: needs REVIEWS,META or a folder that holds both, got {str(argument)!r}.")
    metas = sorted(folder.glob("meta_*.json*"))
    found = sorted({*folder.glob("reviews_*.json*"), *folder.glob("*_5.json*")} - set(metas))
    for kind, files in (("reviews_*.json.gz or *_5.json.gz", found), ("meta_*.json.gz", metas)):
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise DataError(f"{folder} must hold one file {kind}, found {names}. Name both as amazon2018:REVIEWS,META.")
    return found[0], metas[0]


def clean_title(value: Any) -> str:
    """Return a title without markup; "" where it is page code and no title.

    Args:
        value: The title as scraped.
    """
    text = as_text(value)
    if _SCRIPT.search(text):
        return ""
    return " ".join(_TAG.sub(" ", text).split()) if "<" in text else text


def clean_brand(value: Any) -> str:
    """Return a brand without the words of the page around it: "by Brand", "Visit Amazon's Brand Page"."""
    text = as_text(_BY.sub("", value.strip()) if isinstance(value, str) else value)
    page = _STORE.match(text)
    text = page.group(1) if page else text
    return "" if _SCRIPT.search(text) or _TAG.search(text) else text


def category_path(value: Any) -> str:
    """Return a category path as text, without its first element, the root, and without markup.

    Args:
        value: A list of names, or (2014) a list of such lists, of which the first counts.
    """
    if not isinstance(value, (list, tuple)):
        return ""
    path = value[0] if value and isinstance(value[0], (list, tuple)) else value
    return " ".join(filter(None, (as_text(name) for name in path[1:] if "<" not in str(name))))


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    categories = record.get("categories") if is_missing(record.get("category")) else record.get("category")
    return {
        "item_id": record.get("asin"),
        "title": clean_title(record.get("title")),
        "brand": clean_brand(record.get("brand")),
        "category": category_path(categories),
    }


def _review_time(record: Mapping[str, Any]) -> Any:
    """Return the time of a review; the printed date where the number is missing."""
    value = record.get("unixReviewTime")
    if not is_missing(value):
        return value
    printed = record.get("reviewTime")
    try:
        return dt.datetime.strptime(str(printed).strip(), "%m %d, %Y").replace(tzinfo=dt.UTC)
    except ValueError:
        return printed
