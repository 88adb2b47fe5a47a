"""The methods of the table: each makes patches from calibration data, for every setting it has.

Methods are grouped by what they need: nothing, unpaired items, or pairs. Controls (random
concepts, random subspaces, gains on what is no concept) name what they control for; they are never
chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods import (
    alignment,
    combinations,
    contrastive,
    gains,
    geometry,
    layers,
    removal,
    subspace,
)
from patch_retriever.patch.methods.method import BASE, Method, one_patch

__all__ = ["BASE", "Method", "methods"]


def methods(c: Calibration) -> Iterator[Method]:
    """All rows, in the order of the table; those that cannot be made here say why (`left_out`).

    Statistics per modality need a gate, methods made of concepts an SAE that explains the tokens.
    Where concepts are subtracted after a layer, only what does without their codes at the readout
    is tried. A control is left out with its method.
    """
    absent: dict[str | None, str] = {}
    for method in _rows(c):
        withheld = c.sae_problem if method.concepts else ""
        why = method.left_out or withheld or absent.get(method.control_of, "")
        if why:
            absent[method.id] = why
        yield replace(method, left_out=why)


def _rows(c: Calibration) -> Iterator[Method]:
    yield Method(BASE, "base, chosen readout", "nothing", lambda: one_patch(c))
    yield from geometry.rows(c)
    if c.layer is not None:
        yield from layers.rows(c, c.layer.site)
    for method in _rows_with_codes(c):
        why = (
            "" if c.layer is None else f"not tried where concepts are subtracted at {c.layer.site}"
        )
        yield replace(method, left_out=method.left_out or why)


def _rows_with_codes(c: Calibration) -> Iterator[Method]:
    """Those that take codes at the readout, and what is compared with them."""
    yield from removal.rows_from_unpaired_items(c)
    yield from subspace.rows(c)
    yield from removal.rows_from_pairs(c)
    yield from gains.rows(c)
    yield from alignment.rows(c)
    yield from combinations.rows(c)
    yield from contrastive.rows(c)
