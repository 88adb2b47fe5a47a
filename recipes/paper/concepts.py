"""Table 2: concepts of an SAE, their retrieval attribution, and the span of the highest removed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from paper.data import Captioned
from paper.embedding import Embedder
from paper.settings import Settings
from patch_retriever.errors import UserError
from patch_retriever.items import KINDS, Item
from patch_retriever.progress import Progress, Say, no_progress, silent

if TYPE_CHECKING:
    from patch_retriever.patch.operators import Affine
    from patch_retriever.sae.model import SparseAutoencoder
    from patch_retriever.sae.train import TrainedSAE

TOP_SHARE = 0.01
RANKS = (1, 4, 16, 64)
"""Of the subspace that is removed, besides the whole one: the paper does not say its own."""
DRAWS = 3
K = 50
"""Active concepts of the official SAEs."""
EPOCHS, BATCH, LR = 5, 4096, 8e-4
BLOCK_BYTES = 1 << 29
"""Of the activations that are shuffled together; up to three such blocks are in memory."""


def named_sae(source: str, width: int) -> SparseAutoencoder:
    """An SAE of the last layer: a folder, or a `.pt` file of the authors'.

    Raises:
        UserError: it cannot be read, or is of another width than the model.
    """
    from patch_retriever.sae.formats import load_sae

    sae = load_sae(source, K if source.endswith(".pt") else None)
    if sae.d_in != width:
        raise UserError(f"{source}: an SAE of width {sae.d_in}; the model's is {width}")
    return sae


def trained_sae(
    folder: Path,
    embedder: Embedder,
    rows: Sequence[Captioned],
    settings: Settings,
    say: Say = silent,
    progress: Progress = no_progress,
) -> SparseAutoencoder:
    """The SAE in a folder, trained there first on the tokens of COCO's pictures and captions.

    Its codes are the top `K`, as the official one's. nnsight wraps the backbone for training: what
    is to be embedded is embedded before.
    """
    from patch_retriever.sae.formats import load_sae, save_sae

    if not (folder / "cfg.json").exists():
        items = [Item(picture=row.picture) for row in rows]
        items += [Item(text=text) for row in rows for text in row.captions]
        trained = _train(folder, embedder, embedder.asked(items, "i->t"), settings, say, progress)
        save_sae(trained.sae, folder, trained.about())
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    sae = load_sae(folder)
    sae.k = min(K, sae.n_concepts)
    return sae


def _train(
    folder: Path,
    embedder: Embedder,
    items: Sequence[Item],
    s: Settings,
    say: Say,
    progress: Progress,
) -> TrainedSAE:
    from patch_retriever.activations.live import LiveSource
    from patch_retriever.backbones.load import readout_site
    from patch_retriever.backbones.readout import PLAIN, Readout
    from patch_retriever.sae.processes import Processes
    from patch_retriever.sae.settings import SAESettings
    from patch_retriever.sae.train import train_saes

    tokens, width = _tokens_an_item(embedder, items), embedder.width
    in_block = max(16, int(BLOCK_BYTES / (2 * width * tokens)))
    readout = Readout(PLAIN, readout_site(embedder.transformer))
    source = LiveSource(embedder.transformer, items, readout, s.batch_size, items_in_block=in_block)
    settings = SAESettings(
        expansion=s.model.expansion,
        k=min(K, s.model.expansion * width),
        steps=s.sae_steps or max(1, round(EPOCHS * tokens * len(items) / BATCH)),
        batch_size=BATCH,
        lr=LR,
        seed=0,
    )
    say(f"SAE: {settings.steps} steps on {len(items)} items of {tokens:.0f} tokens")
    (trained,) = train_saes(
        source,
        [settings],
        folder=folder / "checkpoint",
        processes=Processes(device=s.device),
        progress=progress,
    )
    return trained


def _tokens_an_item(embedder: Embedder, items: Sequence[Item]) -> float:
    """Mean length of some items, evenly spaced."""
    picks = np.unique(np.linspace(0, len(items) - 1, 64).astype(int))
    inputs = [embedder.transformer.preprocess([items[i].load()]) for i in picks]
    return float(np.mean([int(features["attention_mask"].sum()) for features in inputs]))


def top_concepts(sae: SparseAutoencoder, pooled_nd: torch.Tensor) -> torch.Tensor:
    """Dictionary rows (m, d) of the concepts with the highest retrieval attribution, the first 1%.

    `pooled_nd` are pooled vectors of n images, then of the n texts that belong to them; the SAE is
    applied to these, as in the paper (Eq. 6-8).
    """
    from patch_retriever.concepts.scores import IMAGE, TEXT, contribution

    n = len(pooled_nd) // 2
    images_n = torch.arange(n)
    kinds_n = torch.tensor([IMAGE] * n + [TEXT] * n)
    attribution_c = contribution(
        sae.codes(pooled_nd),
        kinds_n,
        torch.zeros(len(KINDS), sae.n_concepts),
        sae.W_dec_cd,
        torch.stack([images_n, images_n + n], dim=1),
    )
    m = max(1, round(TOP_SHARE * sae.n_concepts))
    return sae.W_dec_cd[attribution_c.argsort(descending=True, stable=True)[:m]]


def removals(top_md: torch.Tensor) -> dict[str, list[Affine]]:
    """The subspace's removal at several ranks, and that of random ones of the same rank."""
    from patch_retriever.patch.fit import remove_subspace

    m = min(top_md.shape)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Affine]] = {}
    for r in (*(r for r in RANKS if r < m), m):
        found[f"removal, rank {r}"] = [remove_subspace(top_md, r)]
        draws = [torch.randn(r, top_md.shape[1], generator=generator) for _ in range(DRAWS)]
        found[f"random, rank {r}"] = [remove_subspace(v_rd) for v_rd in draws]
    return found
