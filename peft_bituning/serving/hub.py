"""The two calls that reach the Hub."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from ..errors import ArtifactError


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload",
    create_pr: bool = False,
) -> str:
    """Save into a temporary folder and upload that, so that nothing else on disk can slip in.

    Args:
        save: writes the files into the folder it is given.
        repo_id: `user/name`; it is made where it is missing.
        private: whether a new repository is private.
        token: Hub token.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=commit_message, create_pr=create_pr
        )
    return str(commit.commit_url)


def download(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a repository into the Hub cache and return its local folder.

    Raises:
        ArtifactError: there is neither such a folder nor such a repository, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token))
    except HFValidationError as error:
        raise ArtifactError(f"{repo_id!r} is no folder here and cannot be a Hub repository; check the path") from error
    except RepositoryNotFoundError as error:
        raise ArtifactError(
            f"{repo_id!r} is neither a folder here nor a repository on the Hub; check the path, or the name and the "
            "token for a private one"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ArtifactError(
            f"{repo_id!r} is no folder here, is not in the Hub cache, and the Hub cannot be reached; check the path, "
            f"or connect and try again ({error})"
        ) from error
    except HfHubHTTPError as error:
        raise ArtifactError(
            f"{repo_id!r} cannot be fetched from the Hub; check name, revision and token ({error})"
        ) from error
