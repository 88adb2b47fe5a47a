"""An alignment learned from pairs by a contrastive loss, by itself and together with concepts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.alignment import cca, unaligned
from patch_retriever.patch.methods.method import Method, one_patch
from patch_retriever.patch.operators import Affine, Subtract

_SHRINKAGE, _MEAN_WEIGHT = 0.5, 1.0
"""Of the CCA that it starts from."""
_LEAST = 0.02
"""Strength below which a concept is left alone."""


def rows(c: Calibration) -> Iterator[Method]:
    """The alignment; with the strength of every concept learned beside it, before the mean; and the
    control, in which what is subtracted is another concept's row.

    Concepts fire or not, which no affine map can say: so there is something that they can add to
    the best of maps. The control has that as well. It is one draw, since it is learned.
    """
    why = unaligned(c)
    yield Method(
        "contrastive", "contrastive alignment", "pairs", lambda: [_aligned(c)], left_out=why
    )
    yield Method(
        "contrastive-concepts",
        "contrastive alignment with concepts",
        "pairs",
        lambda: _patches(c, [None]),
        without="contrastive",
        concepts=True,
        left_out=why,
    )
    yield Method(
        "contrastive-concepts-shuffled",
        "contrastive alignment with shuffled concepts",
        "pairs",
        lambda: _patches(c, [0]),
        control_of="contrastive-concepts",
        concepts=True,
        left_out=why,
    )


def _patches(c: Calibration, draws: Iterable[int | None]) -> list[Patch]:
    """One for each draw that subtracts anything, learned once."""
    for draw in draws:
        if (key := ("contrastive", draw)) not in c.cache:
            c.cache[key] = _with_concepts(c, draw)
    return [patch for draw in draws for patch in c.cache["contrastive", draw]]


def _aligned(c: Calibration) -> Patch:
    if "contrastive" not in c.cache:
        *before, start = cca(c, _SHRINKAGE, _mean_weight(c))
        step, _ = _learned(c, before, start)
        (c.cache["contrastive"],) = one_patch(c, *before, step)
    return c.cache["contrastive"]


def _with_concepts(c: Calibration, draw: int | None) -> list[Patch]:
    """Both learned together; in a `draw` of the control another row stands for every concept."""
    rows_c = torch.arange(c.sae.n_concepts)
    if draw is not None:
        generator = torch.Generator().manual_seed(c.seed * 1000 + draw)
        rows_c = torch.randperm(c.sae.n_concepts, generator=generator)
    *before, start = cca(c, _SHRINKAGE, _mean_weight(c))
    dictionary_cd, d = c.sae.W_dec_cd[rows_c], c.sae.d_in
    for step in before:  # parts are weighed by themselves
        dictionary_cd = dictionary_cd @ step.weight_gde[0, :d, :d]
    concepts = fit.ConceptCodes(c.features.codes, dictionary_cd)
    step, strength_c = _learned(c, before, start, concepts)
    assert strength_c is not None
    strength_c = torch.where(strength_c.abs() < _LEAST, 0.0, strength_c)
    if not bool(strength_c.any()):
        return []
    subtract = Subtract.from_sae(c.sae, strength_c)
    subtract = replace(subtract, W_dec_md=c.sae.W_dec_cd[rows_c[subtract.concepts_m]])
    reason = "strengths learned with the alignment"
    return one_patch(c, *before, step, subtract=subtract, reason=reason)


def _learned(
    c: Calibration,
    before: Sequence[Affine],
    start: Affine,
    concepts: fit.ConceptCodes | None = None,
) -> tuple[Affine, Tensor | None]:
    return fit.contrastive(
        c.vectors().after(*before).x_nd,
        c.told_n,
        start,
        c.tasks,
        fit.ContrastiveSettings(),
        c.seed,
        concepts,
        c.device,
    )


def _mean_weight(c: Calibration) -> float | None:
    return _MEAN_WEIGHT if c.n_parts > 1 else None
