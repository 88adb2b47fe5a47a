"""How few concepts hold the energy (the paper's Fig. 3)."""

from __future__ import annotations

from torch import Tensor


def concentration(energy_c: Tensor) -> Tensor:
    """Share of the energy that the n strongest concepts hold, (c,) for n = 1 .. c."""
    held_c = energy_c.double().sort(descending=True).values.cumsum(0)
    return held_c / held_c[-1].clamp(min=1e-30)


def concepts_for(energy_c: Tensor, share: float) -> int:
    """The fewest concepts that hold `share` of the energy."""
    short_c = concentration(energy_c) < share - 1e-12
    return min(int(short_c.sum()) + 1, len(energy_c))
