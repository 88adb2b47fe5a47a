"""Centring, standardisation, all-but-the-top, whitening, ReAlign, LEACE: from unpaired items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.method import Method, Setting, one_patch
from patch_retriever.patch.operators import Affine, By

BETAS = (0.1, 0.3, 0.5, 0.8)
"""Shrinkages of covariances."""

_BY_NAME = {"all": "all items", "role": "per side", "modality": "per modality"}


def rows(c: Calibration) -> Iterator[Method]:
    """All of them, each with statistics as coarse and as fine as can be exported.

    PCA whitening has no finer statistics than those of all items: its groups would each have axes
    of their own. Standardisation has no coarser ones than I0T's.
    """
    d = c.features.pooled_nd.shape[1]

    def row(name: str, by: By, fitted: Callable[..., Affine], *grid: Setting) -> Method:
        def make(**setting: Any) -> list[Patch]:
            return one_patch(c, fitted(c.vectors().statistics(by), **setting))

        return Method(f"{name}, {_BY_NAME[by]}", "unpaired items", make, grid or ({},))

    for by in ("all", *c.sides):
        yield row("centring", by, fit.centre)
    for by in c.sides:
        yield row("standardisation (I0T)", by, fit.standardise)
    for by in ("all", *c.sides):
        ranks = [r for r in (1, 2, 4, 8, 16) if r < d // 2]
        yield row("all-but-the-top", by, fit.all_but_the_top, *({"r": r} for r in ranks))
    sizes = sorted({max(1, d // part) for part in (8, 4, 2, 1)})
    yield row("PCA whitening", "all", fit.pca_whiten, *({"k": k} for k in sizes))
    for by in ("all", *c.sides):
        yield row("ZCA whitening", by, fit.zca_whiten)
    for by in c.sides:
        yield row("ReAlign", by, fit.realign, *({"beta": beta} for beta in BETAS))
    if len(c.kinds_n.unique()) > 1:  # else there is nothing to tell apart
        grid = tuple({"then": then} for then in ("nothing", "centre"))
        yield Method("LEACE on the modality", "unpaired items", lambda then: _leace(c, then), grid)


def _leace(c: Calibration, then: str) -> list[Patch]:
    """Erased kinds; LEACE leaves the mean of all items, which centring takes away."""
    (moments,) = c.vectors().statistics("all").moments
    erasure = fit.leace(moments, c.kinds_n)
    if then == "nothing":
        return one_patch(c, erasure)
    return one_patch(c, erasure, fit.centre(c.vectors().after(erasure).statistics("all")))
