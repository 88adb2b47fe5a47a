"""The methods of an adapted model: all of the others fitted anew, and the patch it was trained
with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods import methods
from patch_retriever.patch.methods.method import BASE, Method

ALONE, OWN = "adapter", "adapter-trained-patch"
_REFIT = "adapter-then-"


def adapted_methods(c: Calibration, trained_with: Patch | None) -> Iterator[Method]:
    """The adapter alone, the patch it was trained with, if there was one, and every other method
    fitted anew."""
    for method in methods(c):
        if method.id == BASE:
            yield replace(method, id=ALONE, title="adapter alone", needs="training")
            if trained_with is not None:
                yield _own(trained_with)
            continue
        of, without = method.control_of, method.without
        yield replace(
            method,
            id=_REFIT + method.id,
            title=f"adapter, then {method.title}",
            needs="training",
            control_of=None if of is None else _REFIT + of,
            without=None if without is None else _REFIT + without,
        )


def _own(trained_with: Patch) -> Method:
    patch = replace(trained_with, about={"reason": trained_with.why})
    title = "adapter, the patch it was trained with"
    return Method(OWN, title, "training", lambda: [patch])


def is_refit(method_id: str) -> bool:
    """Whether it is a method of the backbone that was fitted anew on the adapted model."""
    return method_id.startswith(_REFIT)
