"""The hub: one SAE out of a repository, and one into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patch_retriever.errors import UserError, first_line


def fetch(source: str, names: list[str], revision: str | None) -> Path:
    """Where in the local cache "org/name", "org/name/folder" or "org/name/folder/file.pt" now lies.

    Of a folder, only the files called `names` are fetched: a repository may hold many SAEs.

    Raises:
        UserError: `source` is no hub id, or the hub does not give it.
    """
    organisation, _, rest = source.partition("/")
    name, _, within = rest.partition("/")
    if not name or organisation in ("", ".", "..", "~") or ".." in within.split("/"):
        raise UserError(
            f"{source}: no such file or folder; name an SAE's folder, a .pt file or a hub id "
            "(organisation/name or organisation/name/folder)"
        )
    if within.endswith(".pt"):
        wanted = [within]
    else:
        wanted = [f"{within}/{file}" if within else file for file in names]
    repository = f"{organisation}/{name}"
    with _errors(repository):
        from huggingface_hub import snapshot_download

        root = snapshot_download(repository, revision=revision, allow_patterns=wanted)
    return Path(root, within)


def upload(folder: Path, repository: str, names: list[str], private: bool) -> str:
    """Make the repository where there is none, and put the files called `names` there; its address.

    Raises:
        UserError: the hub does not take it.
    """
    with _errors(repository):
        from huggingface_hub import HfApi

        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=names,
            commit_message="Sparse autoencoder",
        )
        return str(made)


@contextmanager
def _errors(repository: str) -> Iterator[None]:
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
