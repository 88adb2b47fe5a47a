"""Learned gains of concepts, and their control: gains of principal components."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.gains import Components, GainSettings, learn_gains
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
            c.centred_codes,
            _pairs(c, pairs),
            GainSettings(sparsity=sparsity),
            c.seed,
            c.device,
        )
        fires_c = c.features.codes.sum() > 0
        c.cache[key] = torch.where(fires_c & (gains_c < 0.98), 1 - gains_c, 0.0)
    return c.cache[key]


def _pairs(c: Calibration, which: str) -> list[Tensor]:
    if which == "all":
        return list(c.pairs.values())
    return [pairs for name, pairs in c.pairs.items() if name in ("t->i", "i->t")]


def _principal_gains(c: Calibration, pairs: str) -> tuple[Affine, Affine]:
    vectors_dd = _principal_components(c)
    parts = Components.of(c.centred_nd, vectors_dd)
    gains_d = learn_gains(
        c.centred_nd, parts, _pairs(c, pairs), GainSettings(), c.seed, c.device
    ).to(vectors_dd)
    centring = fit.centre(c.vectors().statistics(c.sides[-1]))
    return centring, fit.principal_gains(gains_d, vectors_dd)


def _principal_components(c: Calibration) -> Tensor:
    """Eigenvectors (d, d), in columns, of the covariance within kinds."""
    if "components" not in c.cache:
        everything = torch.arange(len(c.kinds_n))
        c.cache["components"] = fit.Moments(c.centred_nd, everything, c.device).spectrum[1]
    return c.cache["components"]
