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
    """Say whether a value stands for nothing: `None`, NaN, `pandas.NA`, `NaT`, blank text, or an empty list."""
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
    """Return an id as the user's own string, or `None` where there is none or the value cannot be one.

    Text stays as it is ("007" stays "007"). Whole numbers lose a decimal point that a table gave them (7.0, from a
    column of integers with gaps, is "7").
    """
    if is_missing(value) or isinstance(value, (bool, list, tuple, Mapping)) or getattr(value, "ndim", False):
        return None
    if isinstance(value, str):
        # half a surrogate pair, out of broken JSON escapes, cannot be written to a file
        return str(value) if value.isascii() or value.encode("utf-8", "replace").decode("utf-8") == value else None
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        number = float(value)
        if not math.isfinite(number):
            return None
        return str(int(number)) if number.is_integer() else str(value)
    return str(value)


def as_timestamp(value: Any, scale: bool = True) -> float | int | None:
    """Return a point in time as a number that orders events, or `None` where the value is not one.

    Read are numbers, numeric strings, ISO 8601 strings (no zone means UTC) and date objects. With `scale`,
    milliseconds, microseconds and nanoseconds become seconds (told apart by size); it is off for plain order numbers.
    """
    if isinstance(value, bool) or is_missing(value):
        return None
    if isinstance(value, numbers.Real):
        number: float | int = int(value) if isinstance(value, numbers.Integral) else float(value)
    else:
        text = str(value).strip()  # date objects print themselves as ISO 8601
        if not _NUMBER.fullmatch(text):
            return _from_iso(text)
        number = int(text) if text.lstrip("+-").isdigit() else float(text)
    if not math.isfinite(number):
        return None
    if scale:
        for limit, divisor in _UNIT_LIMITS:
            if abs(number) >= limit:
                return number / divisor
    return number


def as_text(value: Any) -> str:
    """Return an attribute as one line of text: HTML entities decoded, whitespace collapsed, "" where missing.

    Whole numbers have no decimal point, and the parts of a list are joined by spaces.
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


def _from_iso(text: str) -> float | None:
    try:
        # numpy and pandas print nanoseconds; Python reads microseconds.
        moment = dt.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)).total_seconds()
