"""Removal of concepts in the middle of the model, felt by all later layers; and its control."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from patch_retriever.concepts.selection import TEXT_DOMINANT
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.method import Method
from patch_retriever.patch.methods.removal import THEN, Selection, removals, top_concepts

_N_CONCEPTS = (16, 64, 256)


def rows(c: Calibration, site: str) -> Iterator[Method]:
    """Text-dominant concepts, and those that attribution or discriminative attribution names as
    distractors, by their codes at `site`; each with nothing or centring after it.

    Every selection and every control runs the calibration and validation items through the model
    once more: 14 passes. So the settings are few, and a control is one draw.
    """
    text_c = c.concepts.modality > TEXT_DOMINANT
    selection = Selection(
        "layer-text-dominant",
        f"text-dominant concepts removed at {site}",
        f"text-dominant ones at {site}",
        "unpaired items",
        text_c.float,
        [{}],
    )
    yield from removals(c, selection, THEN, draws=1)
    rankings = {
        "attribution": ("by attribution", c.concepts.attribution),
        "discriminative-centred": (
            "by discriminative attribution, centred",
            -c.concepts.discriminative_centred,
        ),
    }
    settings = [{"n": n} for n in _N_CONCEPTS if n < c.sae.n_concepts]
    for name, (title, ranking_c) in rankings.items():
        strengths = partial(top_concepts, c, ranking_c)
        titled = f"{title}, at {site}"
        selection = Selection(
            f"layer-{name}", f"removed {titled}", titled, "pairs", strengths, settings
        )
        yield from removals(c, selection, THEN, draws=1)
