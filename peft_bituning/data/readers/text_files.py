"""Rows of text files, each with its line number; what cannot be read as a row is rejected by kind."""

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypedDict, Unpack, cast

from tqdm.auto import tqdm

from ...errors import DataError
from ..rejects import ReadReport, Row

_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_LINES_PER_TICK = 4096


class TextOptions(TypedDict, total=False):
    """How text files are read."""

    fallback_encoding: str | None  # for lines that are not UTF-8, where the source declares one
    progress: bool


def text_lines(
    path: Path, report: ReadReport, count_from: int = 1, *, fallback_encoding: str | None = None, progress: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 text file, gzipped or not, without line ends; blank lines are skipped.

    Lines count as rows from `count_from` on (2 where line 1 is a header); one that is not text is rejected as
    `bad_encoding`. A DataError says that the file is missing, empty or damaged, or that its header is not text.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    number, size = 0, path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"Reading {path.name}", disable=not progress)
    with path.open("rb") as raw, bar:
        zipped = raw.peek(2)[:2] == _GZIP_MAGIC
        stream: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw
        try:
            for number, line in enumerate(stream, start=1):
                if number % _LINES_PER_TICK == 0:
                    bar.update(raw.tell() - bar.n)
                data = line.removeprefix(_BOM) if number == 1 else line
                if not data.strip():
                    continue
                if number >= count_from:
                    report.add_row(path.name)
                text = _decoded(data, fallback_encoding)
                if text is not None:
                    yield number, text.rstrip("\r\n")
                elif number < count_from:
                    raise DataError(
                        f"The header of {path.name} is not UTF-8 text. Convert the file, or declare its "
                        "encoding with fallback_encoding=."
                    )
                else:
                    report.reject("bad_encoding", path.name, number, "the line is not UTF-8 text")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path.name} is damaged after line {number} ({error}). Download it again.") from error
        bar.update(size - bar.n)
    if number == 0:
        raise DataError(f"{path.name} is empty. Check that it was written or downloaded completely.")


def json_rows(
    path: Path, report: ReadReport, python_literals: bool = False, **options: Unpack[TextOptions]
) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file; other lines are rejected as `broken_json`.

    Lines that are Python literals, as in old Amazon files, are read too where `python_literals` says so.
    """
    for number, text in text_lines(path, report, **options):
        reason = "not a JSON object"
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            record, reason = None, f"not JSON: {error}"
            if python_literals:
                try:
                    record = ast.literal_eval(text)
                except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                    reason = f"neither JSON nor a Python literal: {error}"
        if isinstance(record, dict):
            yield Row(path.name, number, record)
        else:
            report.reject("broken_json", path.name, number, reason)


def table_rows(
    path: Path,
    report: ReadReport,
    required: Sequence[str],
    any_of: Sequence[str] = (),
    delimiter: str = ",",
    typed_header: bool = False,
    **options: Unpack[TextOptions],
) -> Iterator[Row]:
    """Yield the rows of a table with a header, all values as text, one line a row; quotes count beside commas alone.

    Rows with more or fewer values than the header are rejected as `wrong_column_count`, unclosed quotes as
    `broken_row`. The table must have all columns `required`, and one of `any_of` where there are some. With a
    `typed_header`, column names carry a type behind a colon, which is taken off.
    """
    columns: list[str] | None = None
    for number, text in text_lines(path, report, count_from=2, **options):
        try:
            has_quotes = delimiter == "," and '"' in text
            values = next(csv.reader([text], strict=True)) if has_quotes else text.split(delimiter)
        except csv.Error as error:
            report.reject("broken_row", path.name, number, f"not a row of values: {error}")
            continue
        if columns is None:
            columns = [name.strip().split(":")[0] if typed_header else name.strip() for name in values]
            require_columns(columns, path.name, required, any_of)
        elif len(values) != len(columns):
            report.reject("wrong_column_count", path.name, number, f"{len(values)} values for {len(columns)} columns")
        else:
            yield Row(path.name, number, dict(zip(columns, values, strict=True)))
    if columns is None:
        raise DataError(f"{path.name} holds no header. Check that it was written or downloaded completely.")


def require_columns(found: Sequence[str], file: str, required: Sequence[str], any_of: Sequence[str] = ()) -> None:
    """Raise a DataError unless all of `required` and one of `any_of` are among the columns found."""
    lacking = [name for name in required if name not in found]
    if lacking or (any_of and not set(any_of) & set(found)):
        expected = ", ".join(required) + (f" and one of {', '.join(any_of)}" if any_of else "")
        raise DataError(
            f"{file} must have the columns {expected}; found {', '.join(found) or 'none'}. Rename its columns."
        )


def _decoded(data: bytes, fallback_encoding: str | None) -> str | None:
    for encoding in filter(None, ("utf-8", fallback_encoding)):
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return None
