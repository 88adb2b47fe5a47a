"""Selections of concepts by their scores, and random concepts to compare them with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TEXT_DOMINANT = 0.8
"""Modality score above which a concept is text-dominant."""

UNIMODAL = 0.05
"""Modality score nearer than this to 0 or 1: a concept of one modality (IsoEnergy's bimodal mask,
arXiv 2602.06218)."""


_REACH = 20
"""Concepts near in energy among which one is drawn."""
_CLOSE = 0.01
"""Share of the energy by which a random draw may miss the selection's."""


def unimodal(modality_c: Tensor, eps: float = UNIMODAL) -> Tensor:
    """Which concepts fire for one modality only, (c,); never those that do not fire (0.5)."""
    return (modality_c < eps) | (modality_c > 1 - eps)


@dataclass(frozen=True)
class RandomConcepts:
    """Strengths of a selection on random concepts instead, (c,), and how well these match it."""

    strength_c: Tensor
    overlap: int
    """How many of them are selected themselves: 0 unless too few others fire."""
    energy_ratio: float
    """Their energy by strength as a share of the selection's."""

    @property
    def match(self) -> dict[str, float]:
        """For files: the overlap, and the share of the energy."""
        return {"overlap": self.overlap, "energy_ratio": float(f"{self.energy_ratio:.4g}")}


def random_outside(strength_c: Tensor, energy_c: Tensor, seed: int) -> RandomConcepts:
    """As many random concepts as have a strength, none of them selected, of nearly the same energy.

    Only concepts that fire are drawn. Each selected one is replaced by one of the `_REACH` nearest
    in energy that are left; then the draw is improved one exchange at a time until the sum of
    strength times energy is within `_CLOSE` of the selection's, or as near as the others allow.
    Where fewer others fire than are selected, selected ones fill the rest.
    """
    rng = np.random.default_rng(seed)
    energy_all = energy_c.double().numpy()
    selected_m = strength_c.nonzero()[:, 0].numpy()
    strength_m = strength_c.double().numpy()[selected_m]
    wanted = float(strength_m @ energy_all[selected_m])
    outside_p = np.setdiff1d(np.flatnonzero(energy_all > 0), selected_m)
    overlap = max(0, len(selected_m) - len(outside_p))
    pool_p = np.concatenate([outside_p, rng.choice(selected_m, overlap, replace=False)])
    pool_p = pool_p[np.argsort(energy_all[pool_p], kind="stable")]
    pool_energy_p = energy_all[pool_p]
    places_m = _near(energy_all[selected_m], pool_energy_p, rng)
    _exchange(places_m, strength_m, pool_energy_p, wanted)
    found_c = torch.zeros_like(strength_c)
    found_c[torch.from_numpy(pool_p[places_m])] = strength_c[torch.from_numpy(selected_m)]
    return _matched(found_c, strength_c, energy_c)


def shuffled(strength_c: Tensor, energy_c: Tensor, seed: int) -> RandomConcepts:
    """The strengths dealt out at random among all concepts that fire, selected or not."""
    fires_m = (energy_c > 0).nonzero()[:, 0]
    order_m = torch.randperm(len(fires_m), generator=torch.Generator().manual_seed(seed))
    found_c = torch.zeros_like(strength_c)
    found_c[fires_m[order_m]] = strength_c[fires_m]
    return _matched(found_c, strength_c, energy_c)


def _matched(found_c: Tensor, strength_c: Tensor, energy_c: Tensor) -> RandomConcepts:
    overlap = int(((found_c > 0) & (strength_c > 0)).sum())
    energies = [float(one_c.double() @ energy_c.double()) for one_c in (found_c, strength_c)]
    return RandomConcepts(found_c, overlap, energies[0] / max(energies[1], 1e-30))


def _near(
    wanted_m: NDArray[np.float64], pool_energy_p: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """For each wanted energy, in random order, a free place near it in the sorted pool."""
    free_p = np.ones(len(pool_energy_p), dtype=bool)
    places_m = np.empty(len(wanted_m), dtype=np.int64)
    for i in rng.permutation(len(wanted_m)):
        places = np.flatnonzero(free_p)
        middle = int(np.searchsorted(pool_energy_p[places], wanted_m[i]))
        low = max(0, min(middle - _REACH // 2, len(places) - _REACH))
        places_m[i] = rng.choice(places[low : low + _REACH])
        free_p[places_m[i]] = False
    return places_m


def _exchange(
    places_m: NDArray[np.int64],
    strength_m: NDArray[np.float64],
    pool_energy_p: NDArray[np.float64],
    wanted: float,
) -> None:
    """Exchange drawn places of the sorted pool for free ones while that brings the energy nearer to
    the wanted one, the best exchange first; in place."""
    free_p = np.ones(len(pool_energy_p), dtype=bool)
    free_p[places_m] = False
    for _ in range(4 * len(places_m)):
        places = np.flatnonzero(free_p)
        gap = wanted - float(strength_m @ pool_energy_p[places_m])
        if abs(gap) <= _CLOSE * wanted or not len(places):
            return
        ideal_m = pool_energy_p[places_m] + gap / strength_m
        above_m = np.searchsorted(pool_energy_p[places], ideal_m)
        best = (abs(gap), 0, 0)
        for side in (-1, 0):
            candidates_m = places[(above_m + side).clip(0, len(places) - 1)]
            change_m = strength_m * (pool_energy_p[candidates_m] - pool_energy_p[places_m])
            left_m = np.abs(gap - change_m)
            i = int(left_m.argmin())
            best = min(best, (float(left_m[i]), i, int(candidates_m[i])))
        left, i, place = best
        if left >= abs(gap) * (1 - 1e-9):
            return
        free_p[places_m[i]], free_p[place] = True, False
        places_m[i] = place
