"""Amazon reviews: the dumps of 2014 and 2018, and Amazon-Reviews-2023 through the raw files of its Hub repository."""

import datetime as dt
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ...errors import DataError
from ..interactions import Event, Interactions
from ..items import ItemCatalog
from ..rejects import ReadReport, Row
from ..values import as_id, as_text, is_missing
from .text_files import TextOptions, json_rows, table_rows

logger = logging.getLogger(__name__)

REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"
REVISION = "2aa726ef444e72c6a1364c4baa0bcdfb1de55db6"

# fmt: off
#: The 33 categories of the data set, and its rest.
CATEGORIES = (
    "All_Beauty", "Amazon_Fashion", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Baby_Products",
    "Beauty_and_Personal_Care", "Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food",
    "Handmade_Products", "Health_and_Household", "Health_and_Personal_Care", "Home_and_Kitchen",
    "Industrial_and_Scientific", "Kindle_Store", "Magazine_Subscriptions", "Movies_and_TV", "Musical_Instruments",
    "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies", "Software", "Sports_and_Outdoors",
    "Subscription_Boxes", "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games", "Unknown",
)

#: Categories whose five-core split upstream does not offer.
WITHOUT_SPLIT = frozenset((
    "Amazon_Fashion", "Appliances", "Digital_Music", "Handmade_Products", "Health_and_Personal_Care",
    "Subscription_Boxes",
))
# fmt: on

_CORE = 5
_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>?")
_SCRIPT = re.compile(r"getTime\(\)|function\s*\(|\bvar\s+\w+\s*=")
_BY = re.compile(r"^by\s*\n\s*")
_STORE = re.compile(r"^Visit Amazon's (.+) Page$")


def read_amazon2018(
    reviews: str | Path, meta: str | Path, report: ReadReport, **options: Unpack[TextOptions]
) -> Interactions:
    """Read a five-core review file and the metadata of its category, JSON lines or (in old dumps) Python literals.

    Reviews have `reviewerID`, `asin` and `unixReviewTime` (or `reviewTime`, as in "09 13, 2009"), metadata `asin`,
    `title`, `brand` and `category` (in 2014 `categories`). The catalog holds the items that were reviewed and have
    metadata, in the metadata's order. Titles that are page code count as missing; the category is the path without
    its root.
    """
    events = [
        Event(row.record.get("reviewerID"), row.record.get("asin"), _review_time(row.record), row.file, row.line)
        for row in json_rows(Path(reviews), report, python_literals=True, **options)
    ]
    records = json_rows(Path(meta), report, python_literals=True, **options)
    return _joined(events, records, _described2018, report, f"{Path(reviews).name} with {Path(meta).name}")


def find_amazon2018(argument: str | Path) -> tuple[Path, Path]:
    """Find the review file and the metadata file: `REVIEWS,META`, or a folder that holds one of each."""
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


def read_amazon2023(
    category: str,
    report: ReadReport,
    *,
    root: str | Path | None = None,
    download: Callable[..., str] = hf_hub_download,
    **options: Unpack[TextOptions],
) -> Interactions:
    """Read one of the `CATEGORIES`: its five-core leave-last-out split and its metadata, joined on `parent_asin`.

    The three parts of the split are put together and ordered by time, so that leaving one out gives the published
    split. A category without one is cut to five events a user and an item here, out of its raw reviews. Files come
    from the local folder `root` (in the repository's folders, or all in one), or else by `download`.
    """
    if category not in CATEGORIES:
        raise DataError(f"Amazon-Reviews-2023 has no category {category!r}. It has: {', '.join(CATEGORIES)}.")
    files = _Repository(None if root is None else Path(root), download)
    events = [] if category in WITHOUT_SPLIT else _split_events(category, report, files, **options)
    if not events:
        logger.warning("%s has no five-core split; cutting its raw reviews to five events a user and item.", category)
        events = _core_events(category, report, files, **options)
    records = json_rows(files.fetch(f"raw/meta_categories/meta_{category}.jsonl"), report, **options)
    return _joined(events, records, _described2023, report, f"Amazon-Reviews-2023 {category} ({REVISION[:8]})")


def core(pairs: Sequence[tuple[Any, Any]], size: int = _CORE) -> list[int]:
    """Return the places, ascending, of the (user, item) pairs left when every user and item must have `size`."""
    left = list(range(len(pairs)))
    while True:
        users = Counter(pairs[place][0] for place in left)
        items = Counter(pairs[place][1] for place in left)
        fit = [place for place in left if users[pairs[place][0]] >= size and items[pairs[place][1]] >= size]
        if len(fit) == len(left):
            return left
        left = fit


@dataclass(frozen=True)
class _Repository:
    """The files of the data set: in a local folder, or downloaded where that is None."""

    root: Path | None
    download: Callable[..., str]

    def find(self, filename: str) -> Path | None:
        """Return the local path of a file, or `None` if there is none of that name."""
        if self.root is not None:
            places = (self.root / filename, self.root / Path(filename).name)
            return next((path for path in places if path.is_file()), None)
        try:
            return Path(self.download(repo_id=REPOSITORY, filename=filename, repo_type="dataset", revision=REVISION))
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise DataError(
                f"{filename} of {REPOSITORY} cannot be fetched from the Hub. Check the connection, or download the "
                "files and name their folder with root=."
            ) from error

    def fetch(self, filename: str) -> Path:
        """Return the local path of a file that must be there."""
        path = self.find(filename)
        if path is None:
            raise DataError(
                f"There is no file {filename} of {REPOSITORY} at {REVISION[:8]}. Put it into the folder of root=."
            )
        return path


def _split_events(category: str, report: ReadReport, files: _Repository, **options: Unpack[TextOptions]) -> list[Event]:
    """Read the parts of the published split; there are no events where a part is missing or empty."""
    columns = ("user_id", "parent_asin", "timestamp")
    events: list[Event] = []
    for part in ("train", "valid", "test"):
        path = files.find(f"benchmark/5core/last_out/{category}.{part}.csv")
        if path is None or path.stat().st_size == 0:
            return []
        events += [Event.from_row(row, *columns) for row in table_rows(path, report, columns, **options)]
    return events


def _core_events(category: str, report: ReadReport, files: _Repository, **options: Unpack[TextOptions]) -> list[Event]:
    """Cut the raw reviews to the core; those without ids stay, to be rejected with all other events."""
    path = files.fetch(f"raw/review_categories/{category}.jsonl")
    events = [Event.from_row(row, "user_id", "parent_asin") for row in json_rows(path, report, **options)]
    pairs = [(as_id(event.user_id), as_id(event.item_id)) for event in events]
    known = [place for place, pair in enumerate(pairs) if None not in pair]
    left = core([pairs[place] for place in known])
    report.note("below_five_core", len(known) - len(left))
    if not left:
        raise DataError(f"{category} has no user and item with five events each; take another category.")
    unknown = [event for event, pair in zip(events, pairs, strict=True) if None in pair]
    return unknown + [events[known[place]] for place in left]


def _joined(
    events: list[Event],
    records: Iterable[Row],
    describe: Callable[[Mapping[str, Any]], dict[str, Any]],
    report: ReadReport,
    source: str,
) -> Interactions:
    """Join events with what `describe` makes of their items' metadata; that of other items is passed over."""
    bought = {item for item in (as_id(event.item_id) for event in events) if item is not None}
    rows = (row._replace(record=describe(row.record)) for row in records)
    return Interactions.from_events(ItemCatalog.from_rows(rows, report, keep=bought), events, report, source)


def _described2018(record: Mapping[str, Any]) -> dict[str, Any]:
    categories = record.get("categories") if is_missing(record.get("category")) else record.get("category")
    return {
        "item_id": record.get("asin"),
        "title": clean_title(record.get("title")),
        "brand": clean_brand(record.get("brand")),
        "category": category_path(categories),
    }


def _described2023(record: Mapping[str, Any]) -> dict[str, Any]:
    details = record.get("details")
    if isinstance(details, str):  # as some copies of the data hold them
        try:
            details = json.loads(details)
        except json.JSONDecodeError:
            details = None
    brand = details.get("Brand") if isinstance(details, Mapping) else None
    return {
        "item_id": record.get("parent_asin"),
        "title": clean_title(record.get("title")),
        "brand": clean_brand(brand) or clean_brand(record.get("store")),
        "category": category_path(record.get("categories")),
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


def clean_title(value: Any) -> str:
    """Return a title without markup; "" where it is page code and no title."""
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

    A path is a list of names, or (2014) a list of such lists, of which the first counts.
    """
    if not isinstance(value, (list, tuple)):
        return ""
    path = value[0] if value and isinstance(value[0], (list, tuple)) else value
    return " ".join(filter(None, (as_text(name) for name in path[1:] if "<" not in str(name))))
