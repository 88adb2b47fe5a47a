"""Models whose folder holds code: ours is known, others' runs only where the user says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError
from patch_retriever.patch.deep import CODE

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn


def load_model(
    path: str, device: str, revision: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A sentence-transformers model from a folder, or from the hub at a commit.

    Where its code is byte for byte this package's, the package's is used and nothing is run that
    lies in the folder.

    Raises:
        UserError: it has other code and `trust_remote_code` is not given.
    """
    from sentence_transformers import SentenceTransformer

    ours = _our_classes(path, revision, trust_remote_code)
    options: dict[str, Any] = {"device": device, "revision": revision}
    if ours:
        return SentenceTransformer._load_with_module_classes(path, ours, **options)
    return SentenceTransformer(path, trust_remote_code=trust_remote_code, **options)


def _our_classes(
    path: str, revision: str | None, trust_remote_code: bool
) -> dict[str, type[nn.Module]]:
    """Our classes by what `modules.json` calls them; none where it names stock modules only, or
    others' that are trusted."""
    from sentence_transformers.util import load_file_path

    found = load_file_path(path, "modules.json", revision=revision)
    modules = [] if found is None else json.loads(Path(found).read_text())
    types = {module["type"] for module in modules}
    foreign = {name for name in types if not name.startswith("sentence_transformers.")}
    if not foreign:
        return {}
    files = {name.split(".")[0] for name in foreign}
    if files == {CODE.stem}:
        file = load_file_path(path, CODE.name, revision=revision)
        if file is not None and Path(file).read_bytes() == CODE.read_bytes():
            from patch_retriever.patch import patched_transformer

            return {name: getattr(patched_transformer, name.split(".")[1]) for name in foreign}
    if not trust_remote_code:
        raise UserError(
            f"{path}: its modules.json asks to run code that is not this version's of "
            f"patch-retriever ({', '.join(sorted(f'{file}.py' for file in files))}); read it, and "
            "if you trust it, add --trust-remote-code (in Python: trust_remote_code=True)"
        )
    return {}
