"""Removal of concepts that a score selects, and for each its control: random concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patch_retriever.concepts.selection import TEXT_DOMINANT, like_in_energy, unimodal
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
    `settings`, 0 for those that stay. `name` and `alike` are what the row and its control say."""

    name: str
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
            "text-dominant concepts removed",
            "text-dominant ones",
            "unpaired items",
            lambda threshold, strength: strength * (modality_c > threshold).float(),
            [{"threshold": t, "strength": s} for t in _TEXT_DOMINANT for s in _STRENGTHS],
        ),
        Selection(
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
        yield from removals(c, selection, _THEN_REALIGN, ", then ReAlign")


def rows_from_pairs(c: Calibration) -> Iterator[Method]:
    """The n concepts that attribution or discriminative attribution names as distractors."""
    rankings = {
        "by attribution": c.concepts.attribution,
        "by discriminative attribution, raw": -c.concepts.discriminative,
        "by discriminative attribution, centred": -c.concepts.discriminative_centred,
    }
    settings = [{"n": n} for n in _N_CONCEPTS if n < c.sae.n_concepts]
    for name, ranking_c in rankings.items():
        strengths = partial(top_concepts, c, ranking_c)
        selection = Selection(f"removed {name}", name, "pairs", strengths, settings)
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
    """Removal of a selection, and what comes after; and its control, random concepts of matched
    energy and the same strengths."""
    grid = tuple({**setting, **after} for setting in selection.settings for after in afterwards)

    def removed(then: str, beta: float = 0.0, **setting: Any) -> list[Patch]:
        return subtracting(c, selection.strengths(**setting), selection.name, then, beta)

    def random(then: str, beta: float = 0.0, **setting: Any) -> list[Patch]:
        moved = _random_like(c, selection.strengths(**setting), draws)
        return [p for moved_c in moved for p in subtracting(c, moved_c, "random", then, beta)]

    yield Method(selection.name + suffix, selection.needs, removed, grid)
    control = f"random concepts, energy as {selection.alike}{suffix}"
    yield Method(control, selection.needs, random, grid, control=True)


def _random_like(c: Calibration, strength_c: Tensor, draws: int) -> Iterator[Tensor]:
    """Draws of the same strengths on random concepts of about the same energy."""
    for draw in range(draws):
        moved_c = torch.empty_like(strength_c)
        moved_c[like_in_energy(c.concepts.energy, c.seed * 1000 + draw)] = strength_c
        yield moved_c
