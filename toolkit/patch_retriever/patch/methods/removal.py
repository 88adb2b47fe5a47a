"""Removal of concepts that a score selects, and for each its control: random concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patch_retriever.concepts.selection import (
    TEXT_DOMINANT,
    RandomConcepts,
    random_outside,
    unimodal,
)
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.method import DRAWS, Method, Needs, Setting, one_patch
from patch_retriever.patch.operators import Subtract

_N_CONCEPTS = (16, 64, 128, 256, 512)
_TEXT_DOMINANT = (0.6, TEXT_DOMINANT, 0.95)
_STRENGTHS = (0.5, 1.0)
_UNIMODAL = (0.01, 0.05, 0.1, 0.2)

THEN: tuple[Setting, ...] = ({"then": "nothing"}, {"then": "centre"})
_THEN_REALIGN: tuple[Setting, ...] = (
    {"then": "ReAlign", "beta": 0.3},
    {"then": "ReAlign", "beta": 0.8},
)


@dataclass(frozen=True)
class Selection:
    """How concepts are selected: `strengths` gives the strength of every concept (c,) for each of
    `settings`, 0 for those that stay. `title` and `alike` are what the row and its control say."""

    id: str
    title: str
    alike: str
    needs: Needs
    strengths: Callable[..., Tensor]
    settings: Sequence[Setting]


def rows_from_unpaired_items(c: Calibration) -> Iterator[Method]:
    """Text-dominant concepts, and concepts of one modality (IsoEnergy, arXiv 2602.06218); each
    also before ReAlign.

    IsoEnergy keeps concepts with eps <= modality score <= 1 - eps and embeds by what they rebuild;
    here the others are subtracted, so that what the SAE misses stays.
    """
    modality_c = c.concepts.modality  # 0.5 where a concept never fires
    selections = (
        Selection(
            "text-dominant",
            "text-dominant concepts removed",
            "text-dominant ones",
            "unpaired items",
            lambda threshold, strength: strength * (modality_c > threshold).float(),
            [{"threshold": t, "strength": s} for t in _TEXT_DOMINANT for s in _STRENGTHS],
        ),
        Selection(
            "unimodal",
            "unimodal concepts removed",
            "unimodal ones",
            "unpaired items",
            lambda eps: unimodal(modality_c, eps).float(),
            [{"eps": eps} for eps in _UNIMODAL],
        ),
    )
    for selection in selections:
        yield from removals(c, selection, THEN)
    for selection in selections:
        before = replace(selection, id=f"{selection.id}-realign")
        yield from removals(c, before, _THEN_REALIGN, ", then ReAlign")


def rows_from_pairs(c: Calibration) -> Iterator[Method]:
    """The n concepts that attribution or discriminative attribution names as distractors."""
    by, scores = "by discriminative attribution", c.concepts
    rankings = {
        "attribution": ("by attribution", scores.attribution),
        "discriminative-raw": (f"{by}, raw", -scores.discriminative),
        "discriminative-centred": (f"{by}, centred", -scores.discriminative_centred),
    }
    settings = [{"n": n} for n in _N_CONCEPTS if n < c.sae.n_concepts]
    for name, (title, ranking_c) in rankings.items():
        strengths = partial(top_concepts, c, ranking_c)
        selection = Selection(name, f"removed {title}", title, "pairs", strengths, settings)
        yield from removals(c, selection, THEN)


def top_concepts(c: Calibration, ranking_c: Tensor, n: int) -> Tensor:
    """Strength one for the `n` concepts that `ranking_c` puts first, of those that ever fire."""
    fires_c = c.concepts.energy > 0
    chosen_m = ranking_c.masked_fill(~fires_c, -torch.inf).argsort(descending=True)[:n]
    strength_c = torch.zeros(len(ranking_c))
    strength_c[chosen_m] = fires_c[chosen_m].float()
    return strength_c


def subtracting(
    c: Calibration, strength_c: Tensor, reason: str, then: str, beta: float = 0.0
) -> list[Patch]:
    """Subtract concepts by strength, then centre or ReAlign as finely as can be exported, or do
    nothing more. No patch where no concept is selected."""
    if not bool(strength_c.any()):
        return []
    subtract = Subtract.from_sae(c.sae, strength_c)
    if c.layer is not None:
        c = c.without(subtract)
    if then == "nothing":
        return one_patch(c, subtract=subtract, reason=reason)
    vectors = c.vectors(subtract if c.layer is None else None)
    statistics = vectors.statistics(c.sides[-1])
    step = fit.centre(statistics) if then == "centre" else fit.realign(statistics, beta)
    return one_patch(c, step, subtract=subtract, reason=reason)


def removals(
    c: Calibration,
    selection: Selection,
    afterwards: Sequence[Setting],
    suffix: str = "",
    draws: int = DRAWS,
) -> Iterator[Method]:
    """Removal of a selection, and what comes after; and its control, random concepts outside of it
    with the same strengths and, as nearly as can be, the same energy."""
    grid = tuple({**setting, **after} for setting in selection.settings for after in afterwards)

    def removed(then: str, beta: float = 0.0, **setting: Any) -> list[Patch]:
        return subtracting(c, selection.strengths(**setting), selection.title, then, beta)

    def random(then: str, beta: float = 0.0, **setting: Any) -> list[Patch]:
        strength_c = selection.strengths(**setting)
        if not bool(strength_c.any()):
            return []
        found = []
        for draw in range(draws):
            other = random_outside(strength_c, c.concepts.energy, c.seed * 1000 + draw)
            patches = subtracting(c, other.strength_c, "random", then, beta)
            found += [with_match(patch, other) for patch in patches]
        return found

    title = selection.title + suffix
    yield Method(selection.id, title, selection.needs, removed, grid, concepts=True)
    yield Method(
        f"{selection.id}-random",
        f"random concepts, energy as {selection.alike}{suffix}",
        selection.needs,
        random,
        grid,
        control_of=selection.id,
        concepts=True,
    )


def with_match(patch: Patch, drawn: RandomConcepts) -> Patch:
    """A control's patch that says how well its concepts match those it controls for."""
    return replace(patch, about={**patch.about, "match": drawn.match})
