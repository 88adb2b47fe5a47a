"""The methods of the table: each makes patches from calibration data, for every setting it has.

Methods are grouped by what they need: nothing, unpaired items, or pairs. Controls (random
concepts, random subspaces) stand beside what they control for; they are never chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from patch_retriever.patch.methods.method import Method, one_patch

__all__ = ["Method", "methods"]


def methods(c: Calibration) -> Iterator[Method]:
    """All rows, in the order of the table.

    Without a gate (kinds that no hyperplane tells apart) statistics per modality cannot be
    exported, and their rows are left out. Where concepts are subtracted after a layer, only what
    does without their codes at the readout is tried.
    """
    yield Method("base, chosen readout", "nothing", lambda: one_patch(c))
    yield from geometry.rows(c)
    if c.layer is not None:
        yield from layers.rows(c, c.layer.site)
        return
    yield from removal.rows_from_unpaired_items(c)
    yield from subspace.rows(c)
    yield from removal.rows_from_pairs(c)
    yield from gains.rows(c)
    if c.gate is not None and 0 in c.pairs_to_images:
        yield from alignment.rows(c)
        yield from combinations.rows(c)
        yield from contrastive.rows(c)
