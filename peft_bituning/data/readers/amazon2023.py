"""Amazon-Reviews-2023, through the raw files of its Hub repository."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport
from ..values import as_id
from .amazon import category_path, clean_brand, clean_title
from .text_files import Row, json_rows, require_columns, table_rows

logger = logging.getLogger(__name__)

REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"
REVISION = "2aa726ef444e72c6a1364c4baa0bcdfb1de55db6"

#: The 33 categories of the data set, and its rest.
CATEGORIES = (
    "All_Beauty",
    "Amazon_Fashion",
    "Appliances",
    "Arts_Crafts_and_Sewing",
    "Automotive",
    "Baby_Products",
    "Beauty_and_Personal_Care",
    "Books",
    "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry",
    "Digital_Music",
    "Electronics",
    "Gift_Cards",
    "Grocery_and_Gourmet_Food",
    "Handmade_Products",
    "Health_and_Household",
    "Health_and_Personal_Care",
    "Home_and_Kitchen",
    "Industrial_and_Scientific",
    "Kindle_Store",
    "Magazine_Subscriptions",
    "Movies_and_TV",
    "Musical_Instruments",
    "Office_Products",
    "Patio_Lawn_and_Garden",
    "Pet_Supplies",
    "Software",
    "Sports_and_Outdoors",
    "Subscription_Boxes",
    "Tools_and_Home_Improvement",
    "Toys_and_Games",
    "Video_Games",
    "Unknown",
)

#: Categories whose five-core split upstream does not offer.
WITHOUT_SPLIT = frozenset(
    {
        "Amazon_Fashion",
        "Appliances",
        "Digital_Music",
        "Handmade_Products",
        "Health_and_Personal_Care",
        "Subscription_Boxes",
    }
)

_CORE = 5


def read_amazon2023(
    category: str,
    report: ReadReport,
    *,
    root: str | Path | None = None,
    download: Callable[..., str] = hf_hub_download,
    progress: bool = False,
) -> Interactions:
    """Read one category: its five-core leave-last-out split and its metadata, joined on `parent_asin`.

    The three parts of the split are put together and ordered by time, so that leaving one out gives the published
    split. A category without one is cut to five events a user and an item here, out of its raw reviews.

    Args:
        category: One of `CATEGORIES`.
        report: Takes counts and rejected rows.
        root: A local folder with the repository's files (in its folders, or all in one); `None` downloads.
        download: `huggingface_hub.hf_hub_download`, or a stand-in with its keywords.
        progress: Show progress bars.

    Raises:
        DataError: The category does not exist, or a file can neither be found nor fetched.
    """
    if category not in CATEGORIES:
        raise DataError(f"Amazon-Reviews-2023 has no category {category!r}. It has: {', '.join(CATEGORIES)}.")
    find = partial(_found, root=None if root is None else Path(root), download=download)
    fetch = partial(_fetched, find=find)
    events = [] if category in WITHOUT_SPLIT else _split_events(category, report, find, progress)
    if not events:
        logger.warning("%s has no five-core split; cutting its raw reviews to five events a user and item.", category)
        events = _core_events(category, report, fetch, progress)
    bought = {item for item in (as_id(event.item_id) for event in events) if item is not None}
    meta = fetch(f"raw/meta_categories/meta_{category}.jsonl")
    items = ItemCatalog.from_rows(_described(json_rows(meta, report, progress=progress)), report, keep=bought)
    return Interactions.from_events(items, events, report, f"Amazon-Reviews-2023 {category} ({REVISION[:8]})")


def core(pairs: list[tuple[str, str]], size: int = _CORE) -> list[int]:
    """Return which (user, item) pairs are left when every user and item must have `size` of them.

    Args:
        pairs: One pair an event.
        size: Events a user and an item must have.

    Returns:
        The places of the pairs left, ascending.
    """
    left = list(range(len(pairs)))
    while True:
        users = Counter(pairs[place][0] for place in left)
        items = Counter(pairs[place][1] for place in left)
        fit = [place for place in left if users[pairs[place][0]] >= size and items[pairs[place][1]] >= size]
        if len(fit) == len(left):
            return left
        left = fit


def _split_events(category: str, report: ReadReport, find: Callable[[str], Path | None], progress: bool) -> list[Event]:
    events: list[Event] = []
    for part in ("train", "valid", "test"):
        path = find(f"benchmark/5core/last_out/{category}.{part}.csv")
        if path is None or path.stat().st_size == 0:
            return []
        check = partial(require_columns, required=("user_id", "parent_asin", "timestamp"))
        events += [
            Event(row.record["user_id"], row.record["parent_asin"], row.record["timestamp"], row.file, row.line)
            for row in table_rows(path, report, check, progress=progress)
        ]
    return events


def _core_events(category: str, report: ReadReport, fetch: Callable[[str], Path], progress: bool) -> list[Event]:
    events: list[Event] = []
    for row in json_rows(fetch(f"raw/review_categories/{category}.jsonl"), report, progress=progress):
        record = row.record
        event = Event(as_id(record.get("user_id")), as_id(record.get("parent_asin")), record.get("timestamp"), *row[:2])
        if event.user_id is None or event.item_id is None:
            kind = "missing_user_id" if event.user_id is None else "missing_item_id"
            report.reject(kind, row.file, row.line, "no usable id")
        else:
            events.append(event)
    left = core([(event.user_id, event.item_id) for event in events])
    report.note("below_five_core", len(events) - len(left))
    if not left:
        raise DataError(f"{category} has no user and item with five events each; take another category.")
    return [events[place] for place in left]


def _found(filename: str, *, root: Path | None, download: Callable[..., str]) -> Path | None:
    """Return the local path of a file of the repository, or `None` if there is none of that name.

    Raises:
        DataError: The Hub cannot be reached.
    """
    if root is not None:
        return next((path for path in (root / filename, root / Path(filename).name) if path.is_file()), None)
    try:
        return Path(download(repo_id=REPOSITORY, filename=filename, repo_type="dataset", revision=REVISION))
    except LocalEntryNotFoundError as error:
        raise DataError(_unreachable(filename)) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise DataError(_unreachable(filename)) from error


def _fetched(filename: str, *, find: Callable[[str], Path | None]) -> Path:
    path = find(filename)
    if path is None:
        raise DataError(
            f"There is no file {filename} of {REPOSITORY} at {REVISION[:8]}. Put it into the folder of root=."
        )
    return path


def _unreachable(filename: str) -> str:
    return (
        f"{filename} of {REPOSITORY} cannot be fetched from the Hub. Check the connection, or download the files and "
        "name their folder with root=."
    )


def _described(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        record = row.record
        described = {
            "item_id": record.get("parent_asin"),
            "title": clean_title(record.get("title")),
            "brand": clean_brand(_details(record).get("Brand")) or clean_brand(record.get("store")),
            "category": category_path(record.get("categories")),
        }
        yield row._replace(record=described)


def _details(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an item's details, which some copies of the data hold as JSON text."""
    details = record.get("details")
    if isinstance(details, str):
        try:
            details = json.loads(details)
        except json.JSONDecodeError:
            return {}
    return details if isinstance(details, Mapping) else {}
