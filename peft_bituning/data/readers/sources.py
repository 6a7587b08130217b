"""One door to every source: a short name or a path, and the histories it stands for."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download

from ...errors import DataError
from ..interactions import Interactions
from ..rejects import DEFAULT_MAX_REJECTED, settled_report
from .amazon import find_amazon2018, read_amazon2018, read_amazon2023
from .atomic import read_atomic
from .frames import read_folder
from .text_files import TextOptions

#: The forms a source can be named in, with what each reads.
SOURCE_FORMS = {
    "ml-100k": "MovieLens-100K out of the installed recbole package",
    "folder:PATH": "a folder of items.jsonl and interactions.csv",
    "atomic:PATH": "RecBole or UniSRec atomic files, a folder or FOLDER/NAME",
    "amazon2018:REVIEWS,META": "Amazon 2018 five-core reviews and metadata, or amazon2018:FOLDER",
    "amazon2023:CATEGORY": "a category of Amazon-Reviews-2023 on the Hub",
}


def load_interactions(
    spec: str,
    *,
    rejects_path: str | Path | None = None,
    max_rejected: float = DEFAULT_MAX_REJECTED,
    fallback_encoding: str | None = None,
    root: str | Path | None = None,
    download: Callable[..., str] = hf_hub_download,
    progress: bool = False,
) -> Interactions:
    """Read the source a short name stands for: catalog, histories, and the report of what was read and rejected.

    Args:
        spec: `ml-100k`, `folder:PATH`, `atomic:PATH`, `amazon2018:REVIEWS,META` (or a folder that holds both) or
            `amazon2023:CATEGORY`.
        rejects_path: Where to write rejected rows (JSON lines with kind, file, line and reason).
        max_rejected: Largest share of rejected rows of one file, 0 to 1; exact duplicates do not count.
        fallback_encoding: Encoding of lines that are not UTF-8 (`folder:` and `atomic:`), such as `latin-1`.
        root: Local folder with the files of `amazon2023:`, in place of the Hub.
        download: Stand-in for `huggingface_hub.hf_hub_download`.
        progress: Show progress bars.

    Raises:
        DataError: The name is of no known form, a file is missing or empty or has other columns, or too many of its
            rows were rejected.
    """
    name, _, argument = spec.partition(":")
    options: TextOptions = {"fallback_encoding": fallback_encoding, "progress": progress}
    with settled_report(rejects_path, max_rejected) as report:
        if spec == "ml-100k":
            # MovieLens was published in Latin-1; copies come in both encodings.
            options["fallback_encoding"] = fallback_encoding or "latin-1"
            read = read_atomic(_movielens_folder(), report, "ml-100k", **options)
        elif name == "folder" and argument:
            read = read_folder(argument, report, **options)
        elif name == "atomic" and argument:
            read = read_atomic(argument, report, **options)
        elif name == "amazon2018" and argument:
            read = read_amazon2018(*find_amazon2018(argument), report, progress=progress)
        elif name == "amazon2023" and argument:
            read = read_amazon2023(argument, report, root=root, download=download, progress=progress)
        else:
            forms = "; ".join(f"{form} ({meaning})" for form, meaning in SOURCE_FORMS.items())
            raise DataError(f"A source must be one of: {forms}. Got {spec!r}.")
    return read


def _movielens_folder() -> Path:
    """Return the folder of MovieLens-100K in the installed recbole package, which is never imported."""
    spec = importlib.util.find_spec("recbole")
    for place in (spec.submodule_search_locations if spec else None) or []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if folder.is_dir():
            return folder
    raise DataError(
        "ml-100k is read out of the recbole package, which is not installed. Run: pip install --no-deps recbole==1.2.1"
    )
