"""Procrustes, CCA and ridge regression: every kind onto the images, from pairs."""

from __future__ import annotations

from collections.abc import Iterator

from patch_retriever.patch import fit
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.geometry import BETAS
from patch_retriever.patch.methods.method import Method, one_patch
from patch_retriever.patch.operators import Affine, Subtract

_PENALTIES = (0.01, 0.1, 1.0)


def rows(c: Calibration) -> Iterator[Method]:
    """Closed forms with statistics per modality."""
    why = unaligned(c)
    yield Method(
        "procrustes", "Procrustes", "pairs", lambda: one_patch(c, procrustes(c)), left_out=why
    )
    yield Method(
        "cca",
        "CCA",
        "pairs",
        lambda shrinkage: one_patch(c, cca(c, shrinkage)),
        tuple({"shrinkage": s} for s in BETAS),
        left_out=why,
    )
    x_nd, kinds_n = c.features.pooled_nd, c.kinds_n
    yield Method(
        "ridge",
        "ridge regression",
        "pairs",
        lambda shrinkage: one_patch(c, fit.ridge(x_nd, kinds_n, c.pairs_to_images, shrinkage)),
        tuple({"shrinkage": s} for s in _PENALTIES),
        left_out=why,
    )


def unaligned(c: Calibration) -> str:
    """Why nothing can be aligned; empty where it can."""
    if c.gate is None:
        return c.no_gate
    return "" if 0 in c.pairs_to_images else "no two pairs of a text and an image"


def procrustes(c: Calibration, *before: Affine, subtract: Subtract | None = None) -> Affine:
    """Rotations of what `subtract` and the maps `before` leave."""
    return fit.procrustes(c.vectors_after(before, subtract), c.kinds_n, c.pairs_to_images)


def cca(c: Calibration, shrinkage: float, subtract: Subtract | None = None) -> Affine:
    """CCA of what `subtract` leaves, in at most 128 dimensions."""
    x_nd = c.vectors_after((), subtract)
    r = min(x_nd.shape[1], 128)
    return fit.cca(x_nd, c.kinds_n, c.pairs_to_images, shrinkage, r)
