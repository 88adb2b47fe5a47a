"""The Hugging Face hub: what its client says in one line, and Parquet files of datasets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patch_retriever.errors import UserError, first_line


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Say in one line what the hub's client says in many."""
    try:
        yield
    except Exception as error:  # of the client, of its HTTP library or of the system
        said = hub_error(repository, error)
        raise said or UserError(f"{repository}: the hub failed ({first_line(error)})") from None


def hub_error(repository: str, error: BaseException) -> UserError | None:
    """What the hub's client says in `error` or in what it was raised from, in one line; None where
    it was something else that failed."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    match error:
        case GatedRepoError():
            said = "gated; accept its terms on its page of the hub, then `hf auth login`"
        case RepositoryNotFoundError():
            said = (
                "no such folder here and no such repository on the hub; if it is private, "
                "`hf auth login` first"
            )
        case RevisionNotFoundError():
            said = "has no such revision"
        case LocalEntryNotFoundError() | RevisionResolutionError():
            said = (
                "no such folder here, and the hub cannot be reached; check the network (and that "
                "HF_HUB_OFFLINE is not set)"
            )
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            said = "the hub does not allow it; `hf auth login` with a token that does"
        case HfHubHTTPError():
            said = f"the hub failed ({first_line(error)})"
        case _:
            return None if error.__cause__ is None else hub_error(repository, error.__cause__)
    return UserError(f"{repository}: {said}")


def commit_of(repository: str, revision: str | None = None) -> str:
    """The commit that a revision (a branch, a tag, a commit; None: the newest) now is; without a
    network, the one that was fetched last.

    Raises:
        UserError: the hub does not say.
    """
    with hub_errors(repository):
        from huggingface_hub import resolve_revision

        return resolve_revision(repository, revision=revision).resolved


def is_hub_id(location: str) -> bool:
    """Whether this can be "organisation/name"."""
    return re.fullmatch(r"\w[\w.-]*/[\w.@-]+", location) is not None


def fetch_parquet(repository: str, folder: str | None = None) -> Path:
    """Where the Parquet files of a dataset now lie, or those of one folder of it.

    Raises:
        UserError: the hub does not give them.
    """
    wanted = f"{folder}/*.parquet" if folder else "*.parquet"
    with hub_errors(repository):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=[wanted]))
