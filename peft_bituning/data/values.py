"""Single values out of files and tables: ids, timestamps, text."""

import datetime as dt
import html
import json
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# A Unix time in seconds stays below 1e11 until the year 5138, so larger numbers are finer units.
_UNIT_LIMITS = ((1e17, 10**9), (1e14, 10**6), (1e11, 10**3))


def is_missing(value: Any) -> bool:
    """Say whether a value stands for nothing: `None`, NaN, `pandas.NA`, `NaT`, or blank text."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple, Mapping)):
        return not value
    if getattr(value, "ndim", False):
        return False  # an array
    try:
        return bool(value != value)  # NaN and NaT
    except (TypeError, ValueError):
        return True  # pandas.NA has no truth value


def as_id(value: Any) -> str | None:
    """Return an id as the user's own string, or `None` where there is none.

    Text stays as it is ("007" stays "007"). Whole numbers lose a decimal point that a table gave them (7.0, from a
    column of integers with gaps, is "7").

    Args:
        value: A cell of a file or a table.

    Returns:
        The id, or `None` for a missing value or one that cannot be an id (a truth value, a list, half a character).
    """
    if is_missing(value) or isinstance(value, (bool, list, tuple, Mapping)) or getattr(value, "ndim", False):
        return None
    if isinstance(value, str):
        return str(value) if value.isascii() or _is_encodable(value) else None
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        number = float(value)
        if not math.isfinite(number):
            return None
        return str(int(number)) if number.is_integer() else str(value)
    return str(value)


def as_timestamp(value: Any, scale: bool = True) -> float | int | None:
    """Return a point in time as a number that orders events, or `None` where the value is not one.

    Args:
        value: A number, a numeric string, an ISO 8601 string (no zone means UTC), or a date object.
        scale: Bring milliseconds, microseconds and nanoseconds to seconds (told apart by size). Off for plain order
            numbers.

    Returns:
        Seconds since 1970, or the order number itself; `None` for missing, NaN, infinite and unreadable values.
    """
    if isinstance(value, bool) or is_missing(value):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return _from_iso(text)
        number: float | int = int(text) if text.lstrip("+-").isdigit() else float(text)
    elif isinstance(value, dt.datetime):
        return _seconds(value)
    elif isinstance(value, dt.date):
        return _seconds(dt.datetime(value.year, value.month, value.day))
    elif isinstance(value, numbers.Integral):
        number = int(value)
    elif isinstance(value, numbers.Real):
        number = float(value)
    else:
        return _from_iso(str(value))  # numpy.datetime64 prints itself as ISO 8601
    if not math.isfinite(number):
        return None
    if scale:
        for limit, divisor in _UNIT_LIMITS:
            if abs(number) >= limit:
                return number / divisor
    return number


def as_text(value: Any) -> str:
    """Return an attribute as one line of text: HTML entities decoded, whitespace collapsed, "" where missing.

    Args:
        value: Text, a number (whole numbers without a decimal point), a list (joined by spaces), or an object.
    """
    if is_missing(value):
        return ""
    if getattr(value, "ndim", False):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return " ".join(filter(None, (as_text(part) for part in value)))
    if isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False, default=str)
    elif not isinstance(value, (str, bool)):
        value = as_id(value) or str(value)
    return " ".join(html.unescape(str(value)).split()).encode("utf-8", "replace").decode("utf-8")


def shown(value: object) -> str:
    """Return a value as messages show it, no longer than a line of 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_encodable(text: str) -> bool:
    """Say whether text can be written to a file; half a surrogate pair (from broken JSON escapes) cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _from_iso(text: str) -> float | None:
    try:
        # numpy prints nanoseconds; Python reads microseconds.
        return _seconds(dt.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)))
    except ValueError:
        return None


def _seconds(moment: dt.datetime) -> float | None:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)).total_seconds()
