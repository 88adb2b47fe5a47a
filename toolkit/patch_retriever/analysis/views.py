"""Views: the many ways of pooling that one forward pass per prompt serves, judged on test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from patch_retriever.backbones.families import n_layers, residual_norm
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import set_readout
from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import LAST, Prompt, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.data import Data
from patch_retriever.files import write_tensors
from patch_retriever.items import KINDS
from patch_retriever.probe import Probe
from patch_retriever.progress import Progress
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import Outcome, evaluate_embeddings

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

Pooling = Literal["mean", "lasttoken", "max", "min"]
POOLINGS: tuple[Pooling, ...] = ("mean", "lasttoken", "max", "min")
MASKED = ("image", "instruction", "special")
"""The token roles that Fig. 4 leaves out, each by itself."""
AFTER = ("nothing", "centring")
"""What is done to pooled vectors: nothing, or centring per modality."""
OUTCOMES = "outcomes.safetensors"


@dataclass(frozen=True)
class View:
    """A site, a pooling and, for the mean, a token role that is left `without`."""

    site: str = LAST
    pooling: Pooling = "mean"
    without: str = ""

    @property
    def key(self) -> str:
        """For files."""
        return f"{self.site}|{self.pooling}|{self.without}"


Outcomes = dict[tuple[View, str], Outcome]
"""By view, and what was done after it (`AFTER`)."""


def views_of(transformer: Transformer, swept: bool) -> list[View]:
    """All views of a prompt; those of single layers and token roles only where it is `swept`."""
    layers = n_layers(transformer.model)
    views = [View(LAST, pooling) for pooling in POOLINGS]
    if residual_norm(transformer.model) is not None:
        site = f"layers.{layers - 1}.attention"
        views += [View(site, "mean"), View(site, "lasttoken")]
    if swept:
        views += [View(f"layers.{i}", p) for i in range(layers) for p in POOLINGS[:2]]
        views += [View(LAST, "mean", role) for role in MASKED]
    return views


def pooled_view(tokens_ntd: Tensor, mask_nt: Tensor, roles_nt: Tensor, view: View) -> Tensor:
    """Pooled vectors (n, d) of one view. An item that would have no token left keeps all."""
    if view.without:
        kept_nt = mask_nt & (roles_nt != ROLES.index(view.without))
        mask_nt = torch.where(kept_nt.any(1, keepdim=True), kept_nt, mask_nt)
    if view.pooling in ("mean", "lasttoken"):
        return pool(tokens_ntd, pooling_weights(mask_nt, view.pooling))
    out = ~mask_nt[..., None]
    if view.pooling == "max":
        return tokens_ntd.float().masked_fill(out, -torch.inf).amax(1)
    return tokens_ntd.float().masked_fill(out, torch.inf).amin(1)


def pooled_batches(
    transformer: Transformer,
    collection: Collection,
    prompt: Prompt,
    views: Sequence[View],
    batch_size: int,
    progress: Progress,
) -> Iterator[tuple[list[int], dict[View, Tensor]]]:
    """Item numbers and their pooled vectors in every view, batch by batch: nothing is kept."""
    set_readout(transformer, Readout(prompt))
    probe, roles_of = Probe(transformer), TokenRoles(transformer)
    sites = sorted({view.site for view in views})
    for numbers, features in item_batches(transformer, collection.items, batch_size, progress):
        tokens = probe.read(features, sites)
        mask_nt = features["attention_mask"].bool()
        roles_nt = roles_of(features).to(mask_nt.device)
        yield (
            numbers,
            {view: pooled_view(tokens[view.site], mask_nt, roles_nt, view).cpu() for view in views},
        )


def judge_views(
    transformer: Transformer,
    data: Data,
    prompt: Prompt,
    views: Sequence[View],
    batch_size: int,
    folder: Path,
    progress: Progress,
) -> None:
    """Outcomes on test of every view, raw and centred, into `folder/outcomes.safetensors`.

    Calibration gives the mean of every kind of item, nothing else. Vectors of test lie on disk
    while they are needed, one file per view.
    """
    calibration, test = data.splits["calibration"], data.splits["test"]
    kinds = torch.from_numpy(calibration.kinds()).long()
    counts_k1 = torch.bincount(kinds, minlength=len(KINDS))[:, None]
    sums: dict[View, Tensor] = {}
    for numbers, pooled in pooled_batches(
        transformer, calibration, prompt, views, batch_size, progress
    ):
        for view, pooled_nd in pooled.items():
            if view not in sums:
                sums[view] = torch.zeros(len(KINDS), pooled_nd.shape[1], dtype=torch.float64)
            sums[view].index_add_(0, kinds[numbers], pooled_nd.double())
    vectors = folder / "vectors"
    files = _on_disk(transformer, test, prompt, views, batch_size, vectors, progress)
    tensors: dict[str, Tensor] = {}
    test_kinds = torch.from_numpy(test.kinds()).long()
    for view, pooled_nd in files.items():
        raw_nd = torch.from_numpy(np.asarray(pooled_nd))
        means_kd = (sums[view] / counts_k1.clamp(min=1)).float()
        for after, x_nd in zip(AFTER, (raw_nd, raw_nd - means_kd[test_kinds]), strict=True):
            unit = torch.nn.functional.normalize(x_nd, dim=1).numpy()
            for task, hits in evaluate_embeddings(unit, unit, test).hits_by_task.items():
                tensors[f"{view.key}|{after}|{task}"] = torch.from_numpy(hits).to(torch.uint8)
    write_tensors(folder / OUTCOMES, tensors)
    files.clear()
    shutil.rmtree(vectors)


def _on_disk(
    transformer: Transformer,
    collection: Collection,
    prompt: Prompt,
    views: Sequence[View],
    batch_size: int,
    folder: Path,
    progress: Progress,
) -> dict[View, Any]:
    """Pooled vectors (n, d) of every view as arrays that lie in files."""
    folder.mkdir()
    files: dict[View, Any] = {}
    for numbers, pooled in pooled_batches(
        transformer, collection, prompt, views, batch_size, progress
    ):
        for view, pooled_nd in pooled.items():
            if view not in files:
                shape = (len(collection.items), pooled_nd.shape[1])
                path = folder / f"{len(files)}.npy"
                files[view] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            files[view][numbers] = pooled_nd.numpy()
    return files


def load_outcomes(folder: Path) -> Outcomes:
    """What `judge_views` wrote."""
    from safetensors.torch import load_file

    found: dict[tuple[View, str], dict[str, Any]] = {}
    for key, hits in load_file(folder / OUTCOMES).items():
        site, pooling, without, after, task = key.split("|", 4)
        view = View(site, pooling, without)  # type: ignore[arg-type]
        found.setdefault((view, after), {})[task] = hits.numpy().astype(np.float64)
    return {key: Outcome(hits_by_task) for key, hits_by_task in found.items()}
