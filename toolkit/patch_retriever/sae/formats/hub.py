"""The hub: one SAE out of a repository, and one into it."""

from __future__ import annotations

from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.hub import hub_errors


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
    with hub_errors(repository):
        from huggingface_hub import snapshot_download

        root = snapshot_download(repository, revision=revision, allow_patterns=wanted)
    return Path(root, within)


def upload(folder: Path, repository: str, names: list[str], private: bool) -> str:
    """Make the repository where there is none, and put the files called `names` there; its address.

    Raises:
        UserError: the hub does not take it.
    """
    with hub_errors(repository):
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
