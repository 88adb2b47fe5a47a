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
_SIDES: tuple[By, ...] = ("role", "modality")
_ALL: tuple[By, ...] = ("all", *_SIDES)


def rows(c: Calibration) -> Iterator[Method]:
    """All of them, each with statistics as coarse and as fine as there are; those per modality are
    left out where there is no gate.

    PCA whitening has no finer statistics than those of all items: its groups would each have axes
    of their own. Standardisation has no coarser ones than I0T's.
    """
    d = c.features.pooled_nd.shape[1]

    def row(name: str, title: str, by: By, fitted: Callable[..., Affine], *grid: Setting) -> Method:
        def make(**setting: Any) -> list[Patch]:
            return one_patch(c, fitted(c.vectors().statistics(by), **setting))

        return Method(
            f"{name}-{by}",
            f"{title}, {_BY_NAME[by]}",
            "unpaired items",
            make,
            grid or ({},),
            left_out=c.no_gate if by == "modality" and c.gate is None else "",
        )

    for by in _ALL:
        yield row("centre", "centring", by, fit.centre)
    for by in _SIDES:
        yield row("standardise", "standardisation (I0T)", by, fit.standardise)
    for by in _ALL:
        ranks = [r for r in (1, 2, 4, 8, 16) if r < d // 2]
        grid = [{"r": r} for r in ranks]
        yield row("all-but-the-top", "all-but-the-top", by, fit.all_but_the_top, *grid)
    sizes = sorted({max(1, d // part) for part in (8, 4, 2, 1)})
    yield row("pca-whiten", "PCA whitening", "all", fit.pca_whiten, *({"k": k} for k in sizes))
    for by in _ALL:
        yield row("zca-whiten", "ZCA whitening", by, fit.zca_whiten)
    for by in _SIDES:
        yield row("realign", "ReAlign", by, fit.realign, *({"beta": beta} for beta in BETAS))
    alike = len(c.kinds_n.unique()) < 2
    yield Method(
        "leace",
        "LEACE on the modality",
        "unpaired items",
        lambda then: _leace(c, then),
        tuple({"then": then} for then in ("nothing", "centre")),
        left_out="all items are of one kind" if alike else "",
    )


def _leace(c: Calibration, then: str) -> list[Patch]:
    """Erased kinds; LEACE leaves the mean of all items, which centring takes away."""
    (moments,) = c.vectors().statistics("all").moments
    erasure = fit.leace(moments, c.kinds_n)
    if then == "nothing":
        return one_patch(c, erasure)
    return one_patch(c, erasure, fit.centre(c.vectors().after(erasure).statistics("all")))
