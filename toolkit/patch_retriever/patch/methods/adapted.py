"""The methods of an adapted model: all of the others fitted anew, and the patch it was trained
with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods import methods
from patch_retriever.patch.methods.method import Method

ALONE, OWN, ANEW = "adapter alone", "adapter, the patch it was trained with", "adapter, then "


def adapted_methods(c: Calibration, trained_with: Patch | None) -> Iterator[Method]:
    """The adapter alone, the patch it was trained with, if there was one, and every other method
    (`ANEW` before its name)."""
    alone, *others = methods(c)
    yield replace(alone, name=ALONE, needs="training")
    if trained_with is not None:
        own = replace(trained_with, about={"reason": trained_with.why})
        yield Method(OWN, "training", lambda: [own])
    for method in others:
        yield replace(method, name=ANEW + method.name, needs="training")
