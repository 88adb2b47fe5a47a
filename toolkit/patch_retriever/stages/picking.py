"""Another row of the table for export than the one that held-out queries chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_retriever.backbones.readout import Readout
from patch_retriever.errors import UserError
from patch_retriever.stages.fit import Fit
from patch_retriever.stages.selection import save_patch

CONCEPTS = "concepts"
"""In place of an id: the best patch on held-out queries that subtracts concepts."""


@dataclass(frozen=True)
class Picked:
    """A row that somebody named: the fit that it is of, and its entry in `selection.json`."""

    fit: Fit
    choice: dict[str, Any]

    def save(self, readout: Readout, instead_of: str, folder: Path) -> None:
        """Write its patch into `folder/patch`; `instead_of` is what would have been exported."""
        method = next(one for one in self.fit.methods if one.id == self.choice["id"])
        save_patch(
            method,
            self.choice,
            self.fit.calibration,
            readout,
            folder / "patch",
            picked_instead_of=instead_of,
        )


def pick(fits: Sequence[Fit], method: str) -> Picked:
    """The row of one of `fits` that `find` finds.

    Raises:
        UserError: there is none.
    """
    number, choice = find([one.selection for one in fits], method)
    return Picked(fits[number], choice)


def find(selections: Sequence[dict[str, Any]], method: str) -> tuple[int, dict[str, Any]]:
    """The row with an id, in the setting that was chosen for it, and which of `selections` (as in
    `selection.json`) it is of; for `CONCEPTS` the best on held-out queries of those that subtract
    concepts in that setting.

    Raises:
        UserError: no row has the id, it is a control, or it was left out.
    """
    rows = [(i, choice) for i, one in enumerate(selections) for choice in one["methods"]]
    free = [(i, choice) for i, choice in rows if choice["control_of"] is None]
    left_out = [left for one in selections for left in one["left_out"]]
    if method == CONCEPTS:
        subtracting = [row for row in free if _of_setting(row[1])["concepts"]]
        if not subtracting:
            why = "; ".join(dict.fromkeys(left["why"] for left in left_out))
            raise UserError(f"--method {CONCEPTS}: no row subtracts concepts ({why})")
        return max(subtracting, key=lambda row: float(row[1]["validation_score"]))
    for i, choice in rows:
        if choice["id"] == method:
            if of := choice["control_of"]:
                raise UserError(f"--method {method}: a control of {of}, which is not exported")
            return i, choice
    for left in left_out:
        if left["id"] == method:
            raise UserError(f"--method {method}: left out of this build ({left['why']})")
    ids = ", ".join(choice["id"] for _, choice in free)
    raise UserError(f"--method {method}: no such row; there are {ids}, and {CONCEPTS}")


def _of_setting(choice: dict[str, Any]) -> dict[str, Any]:
    """What was tried with the setting that was chosen."""
    return next(tried for tried in choice["tried"] if tried["setting"] == choice["setting"])
