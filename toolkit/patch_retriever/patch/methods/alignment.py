"""Procrustes, CCA and ridge regression: every kind onto the images, from pairs."""

from __future__ import annotations

from collections.abc import Iterator

from patch_retriever.patch import fit
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.geometry import BETAS
from patch_retriever.patch.methods.method import Method, one_patch
from patch_retriever.patch.operators import Affine, Subtract

_PENALTIES = (0.01, 0.1, 1.0)
MAX_CANONICAL = 128
"""Canonical dimensions that CCA keeps at the most."""


_MEAN_WEIGHTS = (0.5, 1.0)
"""Of the mean beside the last token, in a readout of both."""


def rows(c: Calibration) -> Iterator[Method]:
    """Closed forms with statistics per modality."""
    why = unaligned(c)
    weights = _MEAN_WEIGHTS if c.n_parts > 1 else (None,)
    weighed = [{} if w is None else {"mean_weight": w} for w in weights]
    yield Method(
        "procrustes",
        "Procrustes",
        "pairs",
        lambda: one_patch(c, fit.procrustes(c.vectors().pairs)),
        left_out=why,
    )
    yield Method(
        "cca",
        "CCA",
        "pairs",
        lambda **setting: one_patch(c, *cca(c, **setting)),
        tuple({"shrinkage": s, **w} for w in weighed for s in BETAS),
        left_out=why,
    )
    yield Method(
        "ridge",
        "ridge regression",
        "pairs",
        lambda shrinkage: one_patch(c, fit.ridge(c.vectors().pairs, shrinkage)),
        tuple({"shrinkage": s} for s in _PENALTIES),
        left_out=why,
    )


def unaligned(c: Calibration) -> str:
    """Why nothing can be aligned; empty where it can."""
    if c.gate is None:
        return c.no_gate
    return "" if 0 in c.pairs_to_images else "no two pairs of a text and an image"


def cca(
    c: Calibration,
    shrinkage: float,
    mean_weight: float | None = None,
    subtract: Subtract | None = None,
) -> tuple[Affine, ...]:
    """CCA of what `subtract` leaves; the parts of a readout of two are weighed before it."""
    vectors, before = c.vectors(subtract), list[Affine]()
    if mean_weight is not None:
        vectors, *before = vectors.weighed(mean_weight)
    r = min(vectors.x_nd.shape[1], MAX_CANONICAL)
    return (*before, fit.cca(vectors.pairs, shrinkage, r))
