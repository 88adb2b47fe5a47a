"""patch-retriever: turn multimodal LLMs into good retrievers by patching them.

The main job from Python::

    import patch_retriever

    result = patch_retriever.build_retriever("my-patched-retriever")   # built-in model and world
    print(result.table)

and then, with sentence-transformers alone::

    model = SentenceTransformer("my-patched-retriever")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from patch_retriever.build import build_retriever as build_retriever
    from patch_retriever.config import BuildConfig as BuildConfig
    from patch_retriever.export import export_patch as export_patch
    from patch_retriever.patch.artefact import Patch as Patch
    from patch_retriever.retriever import PatchedRetriever as PatchedRetriever
    from patch_retriever.sae.settings import SAESettings as SAESettings
    from patch_retriever.sae_training import train_sae as train_sae

_HOMES = {
    "build_retriever": "patch_retriever.build",
    "BuildConfig": "patch_retriever.config",
    "export_patch": "patch_retriever.export",
    "Patch": "patch_retriever.patch.artefact",
    "PatchedRetriever": "patch_retriever.retriever",
    "SAESettings": "patch_retriever.sae.settings",
    "train_sae": "patch_retriever.sae_training",
}
__all__ = [
    "BuildConfig",
    "Patch",
    "PatchedRetriever",
    "SAESettings",
    "__version__",
    "build_retriever",
    "export_patch",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import patch_retriever` does not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'patch_retriever' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
