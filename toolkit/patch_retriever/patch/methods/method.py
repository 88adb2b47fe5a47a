"""A row of the table: its id and title, what it needs, and patches for every setting it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.operators import Affine, Subtract

Needs = Literal["nothing", "unpaired items", "pairs", "training"]
Setting = dict[str, Any]

BASE = "base"
"""The id of the chosen readout without a patch."""
DRAWS = 3
"""Of every random control."""


@dataclass(frozen=True)
class Method:
    """One row of the table: patches for a setting; held-out data picks the setting.

    `make` gives one patch, or some draws for a control, or none where a setting selects no
    concept of this SAE: it would be another method under this one's name.
    """

    id: str
    """What files, options and code call it: kebab-case, and the same in every version."""
    title: str
    """What the table calls it."""
    needs: Needs
    make: Callable[..., list[Patch]]
    grid: tuple[Setting, ...] = ({},)
    control_of: str | None = None
    """The id of the method that it is a control of; a control is never chosen."""
    without: str | None = None
    """The id of the same method without concepts, to say what they add."""
    concepts: bool = False
    """Whether it is made of the SAE's concepts, so that it is no better than the SAE."""
    left_out: str = ""
    """Why it cannot be made here; empty where it can."""


def one_patch(
    c: Calibration, *maps: Affine, subtract: Subtract | None = None, reason: str = ""
) -> list[Patch]:
    """`subtract` (at the layer, if there is one), then `maps` in order, as the only patch of a
    setting."""
    about = {"reason": reason}
    if c.layer is not None and subtract is not None:
        return [Patch(c.site, None, maps, c.gate, about, {c.layer.site: subtract})]
    return [Patch(c.site, subtract, maps, c.gate, about)]
