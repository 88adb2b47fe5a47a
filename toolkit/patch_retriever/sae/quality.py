"""Whether an SAE explains what retrieval is about well enough to choose patches by its concepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORST_FVU = 0.5
"""Fraction of variance unexplained above which nothing is made of an SAE's concepts."""

_CONTENT = ("text", "image")


def problem(metrics: Mapping[str, Any]) -> str | None:
    """Why nothing should be made of an SAE's concepts, in a line; None where nothing is wrong.

    `metrics` are those of `sae.metrics.measure` as JSON: it is the tokens of texts and images that
    count (`fvu_by_role`), whichever there are, and not those of prompt and template.
    """
    by_role = metrics.get("fvu_by_role", {})
    bad = [
        f"{100 * by_role[role]:.0f}% of the variance of {role} tokens"
        for role in _CONTENT
        if by_role.get(role, 0.0) > WORST_FVU
    ]
    if not bad:
        return None
    return (
        f"the SAE leaves {' and '.join(bad)} unexplained (more than {100 * WORST_FVU:.0f}%), so "
        "its concepts are not to be trusted"
    )
