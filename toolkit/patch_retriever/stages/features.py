"""The features of every split: by the model as it is, and while layers of it are patched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patch_retriever.activations.collect import collect_features, collect_patched
from patch_retriever.activations.kept import KeptTokens
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import Readout
from patch_retriever.data import SPLITS, Data
from patch_retriever.features import Features
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.progress import Progress
from patch_retriever.sae.formats import load_sae

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

NO_CHANGE = nullcontext()

_KEPT = 8
"""Features that are kept in memory: methods come back to a setting's at once or not at all."""


def collect_splits(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae_folder: Path,
    folder: Path,
    batch_size: int,
    progress: Progress,
    splits: Sequence[str] = SPLITS,
    kept: KeptTokens | None = None,
) -> None:
    """Pooled vectors and pooled codes of every split (or of some), one file each; what is `kept`
    does not go through the model."""
    sae = load_sae(sae_folder).to(device_of(transformer))
    for split in splits:
        collection = data.splits[split]
        kinds_n = torch.from_numpy(collection.kinds())
        by_role = split == "calibration"  # what concepts are scored on
        found = collect_features(
            transformer,
            collection.items,
            readout,
            sae,
            kinds_n,
            batch_size,
            progress,
            by_role,
            kept,
        )
        found.save(folder / f"{split}.safetensors")


def collect_unpatched(
    transformer: Transformer, data: Data, readout: Readout, batch_size: int, folder: Path
) -> None:
    """Pooled vectors of every split at the readout, one file each, without codes."""
    for split in SPLITS:
        found = features_without(transformer, data, readout, batch_size, split, {})
        found.save(folder / f"{split}.safetensors")


class SavedFeatures:
    """Features of the splits at the readout, as a stage left them in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, split: str) -> Callable[[Patch], Features]:
        """Features of a split by the patch that they are for."""
        return lambda patch: self(split, patch.layers)

    def of_all(self, splits: Sequence[str], patch: Patch) -> Features:
        """Features of several splits, one after the other, for a patch."""
        return Features.joined([self(split, patch.layers) for split in splits])

    def __call__(self, split: str, layers: Mapping[str, Subtract]) -> Features:
        """Features of a split by the model without what is subtracted at `layers`."""
        assert not layers, "these need a pass through the model"
        return Features.load(self._folder / f"{split}.safetensors")


class PatchedFeatures(SavedFeatures):
    """The same, and those under any patch of layers, each for a pass through the model."""

    def __init__(
        self,
        folder: Path,
        transformer: Transformer,
        data: Data,
        readout: Readout,
        batch_size: int,
        weights: AbstractContextManager[object] = NO_CHANGE,
    ) -> None:
        """`weights` is entered for every pass: a reusable context that the model runs in."""
        super().__init__(folder)

        def run(split: str, layers: Mapping[str, Subtract]) -> Features:
            with weights:
                return features_without(transformer, data, readout, batch_size, split, layers)

        self._run = run
        self._kept: OrderedDict[object, Features] = OrderedDict()

    def __call__(self, split: str, layers: Mapping[str, Subtract]) -> Features:
        """Features of a split by the model without what is subtracted at `layers`."""
        key = (
            split,
            *(
                (site, s.input_scale, *map(_bytes, s.tensors.values()))
                for site, s in layers.items()
            ),
        )
        if key not in self._kept:
            made = self._run(split, layers) if layers else super().__call__(split, layers)
            self._kept[key] = made
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]


def features_without(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    batch_size: int,
    split: str,
    layers: Mapping[str, Subtract],
) -> Features:
    """Features of a split at the readout by the model without what is subtracted at `layers`."""
    collection = data.splits[split]
    kinds_n = torch.from_numpy(collection.kinds())
    return collect_patched(transformer, collection.items, readout, layers, kinds_n, batch_size)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
