"""The paper's ablation: the span of concepts of high attribution is removed; and its control."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.method import DRAWS, Method, one_patch
from patch_retriever.patch.methods.removal import top_concepts

_RANKS = (1, 4, 16)


def rows(c: Calibration) -> Iterator[Method]:
    """The first r right singular vectors of the n concepts of highest attribution, and of n random
    directions: a random subspace of rank r.

    The paper takes the top 1% and does not say which r; here the whole span and less, and more
    concepts, are tried too.
    """
    ns = [n for n in sorted({max(1, c.sae.n_concepts // 100), 32, 64}) if n < c.sae.d_in]
    grid = tuple({"n": n, "r": r} for n in ns for r in (*(r for r in _RANKS if r < n), n))
    yield Method(
        "attribution-subspace",
        "attribution subspace removed (the paper's)",
        "pairs",
        lambda n, r: _attribution_subspace(c, n, r),
        grid,
        concepts=True,
    )
    yield Method(
        "attribution-subspace-random",
        "random subspace removed",
        "pairs",
        lambda n, r: _random_subspaces(c, n, r),
        grid,
        control_of="attribution-subspace",
    )


def _attribution_subspace(c: Calibration, n: int, r: int) -> list[Patch]:
    chosen_c = top_concepts(c, c.concepts.attribution, n) > 0
    if not bool(chosen_c.any()):
        return []
    return one_patch(c, fit.remove_subspace(c.dictionary_cw[chosen_c], r))


def _random_subspaces(c: Calibration, n: int, r: int) -> list[Patch]:
    """Draws of the first `r` singular vectors of `n` random directions, removed."""
    d = c.features.pooled_nd.shape[1]
    generator = torch.Generator().manual_seed(c.seed * 1000 + n)
    draws = [torch.randn(n, d, generator=generator) for _ in range(DRAWS)]
    return [patch for v in draws for patch in one_patch(c, fit.remove_subspace(v, r))]
