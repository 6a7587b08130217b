"""Amazon-Reviews-2023, through the raw files of its Hub repository."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ...errors import DataError
from ..interactions import Event, Interactions
from ..rejects import ReadReport
from ..values import as_id
from .amazon import category_path, clean_brand, clean_title, joined
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


def read_amazon2023(
    category: str,
    report: ReadReport,
    *,
    root: str | Path | None = None,
    download: Callable[..., str] = hf_hub_download,
    **options: Unpack[TextOptions],
) -> Interactions:
    """Read one category: its five-core leave-last-out split and its metadata, joined on `parent_asin`.

    The three parts of the split are put together and ordered by time, so that leaving one out gives the published
    split. A category without one is cut to five events a user and an item here, out of its raw reviews.

    Args:
        category: One of `CATEGORIES`.
        report: Takes counts and rejected rows.
        root: A local folder with the repository's files (in its folders, or all in one); `None` downloads.
        download: `huggingface_hub.hf_hub_download`, or a stand-in with its keywords.
        **options: See `TextOptions`.

    Raises:
        DataError: The category does not exist, or a file can neither be found nor fetched.
    """
    if category not in CATEGORIES:
        raise DataError(f"Amazon-Reviews-2023 has no category {category!r}. It has: {', '.join(CATEGORIES)}.")
    files = _Repository(None if root is None else Path(root), download)
    events = [] if category in WITHOUT_SPLIT else _split_events(category, report, files, **options)
    if not events:
        logger.warning("%s has no five-core split; cutting its raw reviews to five events a user and item.", category)
        events = _core_events(category, report, files, **options)
    records = json_rows(files.fetch(f"raw/meta_categories/meta_{category}.jsonl"), report, **options)
    return joined(events, records, _described, report, f"Amazon-Reviews-2023 {category} ({REVISION[:8]})")


def core(pairs: Sequence[tuple[Any, Any]], size: int = _CORE) -> list[int]:
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
    rows = json_rows(path, report, **options)
    events = [Event.from_row(row, "user_id", "parent_asin") for row in rows]
    pairs = [(as_id(event.user_id), as_id(event.item_id)) for event in events]
    known = [place for place, pair in enumerate(pairs) if None not in pair]
    left = core([pairs[place] for place in known])
    report.note("below_five_core", len(known) - len(left))
    if not left:
        raise DataError(f"{category} has no user and item with five events each; take another category.")
    unknown = [event for event, pair in zip(events, pairs, strict=True) if None in pair]
    return unknown + [events[known[place]] for place in left]


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "item_id": record.get("parent_asin"),
        "title": clean_title(record.get("title")),
        "brand": clean_brand(_details(record).get("Brand")) or clean_brand(record.get("store")),
        "category": category_path(record.get("categories")),
    }


def _details(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an item's details, which some copies of the data hold as JSON text."""
    details = record.get("details")
    if isinstance(details, str):
        try:
            details = json.loads(details)
        except json.JSONDecodeError:
            return {}
    return details if isinstance(details, Mapping) else {}
