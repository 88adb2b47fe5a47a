"""Learned gains of concepts, and their control: gains of principal components."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.gains import GainSettings, learn_gains
from patch_retriever.patch.methods.method import Method, one_patch
from patch_retriever.patch.methods.removal import subtracting
from patch_retriever.patch.operators import Affine


def rows(c: Calibration) -> Iterator[Method]:
    """Gains from pairs of texts and images, or from all pairs; with a penalty for every concept
    that is changed, or without."""
    which = ("text-image", "all")
    yield Method(
        "learned gains",
        "pairs",
        lambda **setting: _gained(c, **setting),
        tuple({"pairs": pairs, "sparsity": s} for pairs in which for s in (0.0, 0.3)),
    )
    yield Method(
        "gains on principal components",
        "pairs",
        lambda pairs: one_patch(c, *_principal_gains(c, pairs)),
        tuple({"pairs": pairs} for pairs in which),
    )


def _gained(c: Calibration, pairs: str, sparsity: float) -> list[Patch]:
    reason = f"learned gains from {pairs} pairs, sparsity {sparsity}"
    return subtracting(c, strengths_from_gains(c, pairs, sparsity), reason, "centre")


def strengths_from_gains(c: Calibration, pairs: str, sparsity: float) -> Tensor:
    """1 - gain of every concept (c,), learned on centred codes; gains above 0.98 leave a concept
    alone."""
    key = ("gains", pairs, sparsity)  # asked for again by every pair of methods with gains
    if key not in c.cache:
        gains_c = learn_gains(
            c.centred_nd,
            c.centred_codes_nc,
            c.dictionary_cw,
            _pairs(c, pairs),
            GainSettings(sparsity=sparsity),
            c.seed,
        )
        fires_c = c.features.codes.sum() > 0
        c.cache[key] = torch.where(fires_c & (gains_c < 0.98), 1 - gains_c, 0.0)
    return c.cache[key]


def _pairs(c: Calibration, which: str) -> list[Tensor]:
    if which == "all":
        return list(c.pairs.values())
    return [pairs for name, pairs in c.pairs.items() if name in ("t->i", "i->t")]


def _principal_gains(c: Calibration, pairs: str) -> tuple[Affine, Affine]:
    covariance_dd = c.centred_nd.T @ c.centred_nd / len(c.centred_nd)
    vectors_dd = torch.linalg.eigh(covariance_dd.double()).eigenvectors
    codes_nd = (c.centred_nd.double() @ vectors_dd).float()
    dictionary_dd = vectors_dd.T.float()
    gains_d = learn_gains(
        c.centred_nd, codes_nd, dictionary_dd, _pairs(c, pairs), GainSettings(), c.seed
    )
    by = c.sides[-1]
    centring = fit.centre(c.features.pooled_nd, c.groups(by), by)
    return centring, fit.principal_gains(c.centred_nd, gains_d.double(), vectors_dd)
