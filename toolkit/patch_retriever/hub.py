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
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repository}: gated; accept its terms on its page of the hub, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repository}: no such folder here and no such repository on the hub; if it is "
            "private, `hf auth login` first"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository}: has no such revision") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repository}: no such folder here, and the hub cannot be reached; check the network "
            "(and that HF_HUB_OFFLINE is not set)"
        ) from None
    except Exception as error:  # of the client, of its HTTP library or of the system
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(
                f"{repository}: the hub does not allow it; `hf auth login` with a token that does"
            ) from None
        raise UserError(f"{repository}: the hub failed ({first_line(error)})") from None


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
