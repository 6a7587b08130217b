"""What UniSRec's processed downloads need beside plain atomic files: histories out of cuts, fields out of text."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..interactions import IN_FILE_ORDER, Event
from ..rejects import ReadReport, Row

#: First element of the category path of every item, by Amazon 2018 domain.
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


def chained_events(
    training: Iterable[Row],
    held_out: Iterable[Row],
    report: ReadReport,
    user_ids: Mapping[str, str] | None = None,
    item_ids: Mapping[str, str] | None = None,
) -> Iterator[Event]:
    """Yield every event of histories once, each user's in time order, out of rows of (user, items before, next item).

    Training rows are all cuts of a user's training part; items before are the most recent ones (at most 50 upstream),
    so a longer history is chained from row to row. Upstream writes the longest cut first; both directions are
    understood, and every row is checked against the history as far as it is known.

    Args:
        training: Rows of `user_id`, `item_id_list` and `item_id`.
        held_out: The same, validation first, then test.
        report: Takes the rows that do not fit (`inconsistent_history`).
        user_ids: Index to original id of users; `None` where rows hold ids.
        item_ids: The same for items.
    """
    users, items = user_ids or {}, item_ids or {}
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
                yield Event(users.get(user, user), items.get(item, item), IN_FILE_ORDER, row.file, row.line)


def _items_before(row: Row) -> list[str]:
    return row.record["item_id_list"].split()


def _continuation(history: Sequence[str], row: Row) -> list[str] | None:
    """Return what a row adds to the history known so far, or `None` if it does not follow from it."""
    before, target = _items_before(row), row.record["item_id"]
    if not history:
        return [*before, target]
    if list(history[-len(before) :]) == before or not before:
        return [target]
    if len(before) > 1 and list(history[-len(before) + 1 :]) == before[:-1]:
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
    """Split UniSRec's item texts into title, category and brand where they can be.

    Upstream joins `TITLE. CATEGORY PATH. BRAND.` for Amazon items, and every path starts with the domain's name, by
    which it is found. Texts of other domains, where none is found in at least half of them, become the title as they
    are, without the last full stop; so does a single text without it. Upstream leaves out quotation marks.

    Args:
        texts: One text an item.

    Returns:
        One dictionary an item, with `title` and, where found, `category` (without the domain's name) and `brand`.
    """
    found = Counter(root for text in texts for root in AMAZON_ROOTS if f". {root}" in text)
    root, number = found.most_common(1)[0] if found else ("", 0)
    if number == 0 or number * 2 < len(texts):
        return [{"title": text.strip().removesuffix(".").rstrip()} for text in texts]
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
        return {"title": text.removesuffix(".").rstrip()}
    return {
        "title": title.strip(),
        "category": category.strip().removesuffix(".").strip(),
        "brand": brand.strip().removesuffix(".").strip(),
    }
