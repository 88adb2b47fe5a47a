"""SAEs on disk and on the hub, in the formats that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patch_retriever.sae.formats import saelens
from patch_retriever.sae.model import SparseAutoencoder


def save_sae(sae: SparseAutoencoder, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write an SAE in SAELens' layout, which is ours; `about` becomes its metadata."""
    saelens.save(sae, folder, about)


def load_sae(source: str | Path) -> SparseAutoencoder:
    """Read an SAE."""
    return saelens.load(Path(source))
