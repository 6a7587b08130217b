"""The manifest of a saved folder: the sha256 of every file it needs."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from ..artifacts import sha256_of_file, write_whole
from ..errors import ArtifactError

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of a folder.

    Args:
        folder: the folder.
        names: its files, relative, with forward slashes.
    """
    digests = {name: sha256_of_file(folder / name) for name in sorted(names)}
    write_whole(folder / MANIFEST_FILE, json.dumps({"sha256": digests}, indent=2) + "\n")


def check_manifest(folder: Path, editable: Collection[str] = ()) -> dict[str, str]:
    """Check every file of a folder against its manifest.

    Args:
        folder: a folder that `write_manifest` saw.
        editable: files that may be changed or missing, such as the model card, which people edit on the Hub.

    Returns:
        The sha256 of its files, by name.

    Raises:
        ArtifactError: the manifest or a file is missing, or a file is not the one that was saved.
    """
    listed = listed_files(folder)
    digests = {name: digest for name, digest in listed.items() if name not in editable}
    missing = [name for name in digests if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{len(missing)} files are missing, first {missing[0]}; the download or copy is incomplete, repeat it"
        )
    changed = [name for name, digest in digests.items() if sha256_of_file(folder / name) != digest]
    if changed:
        raise ArtifactError(
            f"{len(changed)} files are not the ones that were saved (sha256 differs), first {changed[0]}; they are "
            "truncated or were changed, download or save the folder again"
        )
    return listed


def listed_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of a folder's files, by name, as its manifest has it, or raise an ArtifactError."""
    path = folder / MANIFEST_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} holds no {MANIFEST_FILE}, so it is no saved LaserRecommender; give the output_dir of a finished "
            "training run, or load a bare adapter with peft.PeftModel.from_pretrained"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{MANIFEST_FILE} cannot be read ({error}); download or save the folder again") from error
