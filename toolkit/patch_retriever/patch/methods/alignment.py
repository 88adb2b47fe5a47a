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
    yield Method("Procrustes", "pairs", lambda: one_patch(c, fit.procrustes(c.vectors().pairs)))
    yield Method(
        "CCA",
        "pairs",
        lambda shrinkage: one_patch(c, cca(c, shrinkage)),
        tuple({"shrinkage": s} for s in BETAS),
    )
    yield Method(
        "ridge regression",
        "pairs",
        lambda shrinkage: one_patch(c, fit.ridge(c.vectors().pairs, shrinkage)),
        tuple({"shrinkage": s} for s in _PENALTIES),
    )


def cca(c: Calibration, shrinkage: float, subtract: Subtract | None = None) -> Affine:
    """CCA of what `subtract` leaves, in at most 128 dimensions."""
    r = min(c.features.pooled_nd.shape[1], 128)
    return fit.cca(c.vectors(subtract).pairs, shrinkage, r)
