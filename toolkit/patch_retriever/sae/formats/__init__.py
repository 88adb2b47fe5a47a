"""SAEs on disk and on the hub, in the formats that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError
from patch_retriever.sae.formats import dictionary_learning, hub, overcomplete, saelens, sparsify
from patch_retriever.sae.model import SparseAutoencoder

FOLDERS = (saelens, sparsify, dictionary_learning)
"""The formats that are folders, with a config that says what gates the codes."""


def save_sae(sae: SparseAutoencoder, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write an SAE in SAELens' layout, which is ours; `about` becomes its metadata."""
    saelens.save(sae, folder, about)


def load_sae(
    source: str | Path, k: int | None = None, revision: str | None = None
) -> SparseAutoencoder:
    """Read an SAE of ours, SAELens', sparsify's, dictionary_learning's or overcomplete's.

    Its codes are those that the package itself would give for the same raw activations.

    Args:
        source: a folder, a `.pt` file, or either on the hub: "org/name" or "org/name/folder".
        k: number of active concepts per token, for a `.pt` file, which does not say it.
        revision: branch, tag or commit of a repository on the hub.

    Raises:
        UserError: there is no SAE, it is damaged, or of a kind whose codes ours could not equal.
    """
    path = Path(source)
    if not path.exists():
        names = sorted({name for format in FOLDERS for name in (format.CONFIG, format.WEIGHTS)})
        path = hub.fetch(str(source), names, revision)
    elif revision is not None:
        raise UserError(f"{source}: lies here, so it has no revision {revision!r}; leave that out")
    if overcomplete.recognises(path):
        return overcomplete.load(path, k)
    for format in FOLDERS:
        if format.recognises(path):
            if k is not None:
                raise UserError(f"{source}: its own config says what is active; leave k={k} out")
            return format.load(path)
    known = ", ".join(f"{format.CONFIG} with {format.WEIGHTS}" for format in FOLDERS)
    raise UserError(
        f"{source}: no SAE ({known}, or a .pt file); of a repository with many SAEs name one's "
        "folder: organisation/name/folder"
    )


def push_sae(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload a folder that `save_sae` wrote to the hub, with its README.md if it has one.

    Args:
        folder: the SAE's folder.
        repository: "organisation/name"; it is made where it does not exist.
        private: whether a repository that is made is private.

    Returns:
        The repository's address.

    Raises:
        UserError: the folder is not one of ours or damaged, or the hub refuses.
    """
    folder = Path(folder)
    if not saelens.is_ours(folder):
        raise UserError(f"{folder}: no SAE that patch-retriever saved; load_sae it and save_sae it")
    saelens.load(folder)
    return hub.upload(folder, repository, [saelens.CONFIG, saelens.WEIGHTS, "README.md"], private)
