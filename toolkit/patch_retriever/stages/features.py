"""The stage that makes the features of every split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patch_retriever.activations.collect import collect_features
from patch_retriever.backbones.load import device_of
from patch_retriever.backbones.readout import Readout
from patch_retriever.data import SPLITS, Data
from patch_retriever.progress import Progress
from patch_retriever.sae.formats import load_sae

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def collect_splits(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae_folder: Path,
    folder: Path,
    batch_size: int,
    progress: Progress,
) -> None:
    """Pooled vectors and pooled codes of every split, one file each."""
    sae = load_sae(sae_folder).to(device_of(transformer))
    for split in SPLITS:
        collection = data.splits[split]
        kinds_n = torch.from_numpy(collection.kinds())
        by_role = split == "calibration"  # what concepts are scored on
        found = collect_features(
            transformer, collection.items, readout, sae, kinds_n, batch_size, progress, by_role
        )
        found.save(folder / f"{split}.safetensors")
