"""Items of every kind, and patches of every kind made by hand for the random model."""

from __future__ import annotations

import torch
from PIL import Image

from patch_retriever import PatchedRetriever
from patch_retriever.activations.collect import collect_features
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, PAPER, Readout
from patch_retriever.items import KINDS, Item
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import GROUPS, Affine, Subtract
from patch_retriever.sae.model import SparseAutoencoder

WIDTH, C = 32, 64
READOUTS = (
    Readout(PAPER),
    Readout(ONE_WORD, LAST, "lasttoken"),
    Readout(PAPER, "layers.1", "mean"),
    Readout(ONE_WORD, LAST, "mean+lasttoken", cut="layers.0.attention"),
)
PATCHES = ("nothing", "subtract", "by all", "by role", "by modality", "everything")


class Drawn:
    """A picture with two colours."""

    def __init__(self, i):
        self.name, self.i = f"picture {i}", i

    def open(self):
        picture = Image.new("RGB", (72, 72), (40 * self.i % 256, 200 - 20 * self.i, 90))
        picture.paste((250, 250, 30), (5 * self.i, 8, 5 * self.i + 20, 40))
        return picture


TEXTS = ("a cat", "two small cats on a grey mat", "no", "seven dogs behind a fence, far away")
ITEMS = (
    *(Item(text) for text in TEXTS),
    *(Item(picture=Drawn(i)) for i in range(4)),
    *(Item(text, Drawn(4 + i)) for i, text in enumerate(TEXTS)),
)
INPUTS = [item.load() for item in ITEMS]
KINDS_N = torch.tensor([KINDS.index(item.kind) for item in ITEMS])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(spread, width=WIDTH, seed=0, input_scale="none"):
    """An SAE for activations of such a spread; that of standardised ones is always alike."""
    if input_scale == "token":
        spread = 0.7
    rows_cd = torch.nn.functional.normalize(normal(C, width, seed=seed), dim=1)
    return SparseAutoencoder(
        rows_cd.T.contiguous(),
        torch.zeros(C),
        rows_cd,
        torch.zeros(width) if input_scale == "none" else 0.1 * normal(width, seed=seed + 2),
        spread * (0.5 + normal(C, seed=seed + 1).abs()),
        input_scale=input_scale,
    )


def make_map(by, spread, seed, width=WIDTH):
    g = len(GROUPS[by])
    weight_gde = torch.eye(width) + 0.5 * normal(g, width, width, seed=seed) / width**0.5
    return Affine(f"map {by}", by, weight_gde, 0.1 * spread * normal(g, width, seed=seed + 10))


def make_patches(model_folder, readout, items=ITEMS, input_scale="none"):
    """An SAE, the features of the items under a readout, and a patch for each of PATCHES."""
    transformer = load_backbone(model_folder)
    kinds_n = torch.tensor([KINDS.index(item.kind) for item in items])
    spread = float(
        collect_features(transformer, items, readout, make_sae(1.0), kinds_n).pooled_nd.std()
    )
    sae = make_sae(spread, input_scale=input_scale)
    features = collect_features(transformer, items, readout, sae, kinds_n)
    gate = fit.fit_gate(features.mean_nd, kinds_n)
    subtract = Subtract.from_sae(sae, normal(C, seed=2).clamp(0, 1))
    groups = [(kind == kinds_n).nonzero()[:, 0] for kind in range(3)]
    centring = fit.centre(fit.Statistics(features.pooled_nd, groups, "modality"))
    width = features.pooled_nd.shape[1]
    role, every = make_map("role", spread, 3, width), make_map("all", spread, 4, width)
    about = {"readout": readout.to_json()}
    patches = {
        "nothing": Patch(readout.site, about=about),
        "subtract": Patch(readout.site, subtract, (), gate, about),
        "by all": Patch(readout.site, None, (every,), gate, about),
        "by role": Patch(readout.site, subtract, (role,), None, about),
        "by modality": Patch(readout.site, None, (centring,), gate, about),
        "everything": Patch(readout.site, subtract, (centring, role, every), gate, about),
    }
    return sae, features, patches


def live(model_folder, readout, patch, sae=None):
    return PatchedRetriever(with_readout(load_backbone(model_folder), readout), patch, sae)
