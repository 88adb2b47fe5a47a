"""Stand-ins for real MLLMs: small random models of each family's classes, on disk as on the hub.

`FAMILIES[name](folder)` writes one; `NEEDS[name]` are the packages that its processor needs beyond
ours. Nothing here makes a processor: its files are written as the hub has them, and transformers'
own class reads them when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from families.gemma import gemma3, paligemma2
from families.idefics import idefics3, smolvlm
from families.llava import internvl, llava, llava_next, llava_onevision
from families.meta import chameleon
from families.qwen import qwen2_5_vl, qwen2_vl, qwen3_vl

FAMILIES: dict[str, Callable[[Path], None]] = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma2": paligemma2,
    "chameleon": chameleon,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "internvl": internvl,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "llava-onevision": ("torchvision",),
    "smolvlm": ("torchvision", "num2words"),
    "qwen2-vl": ("torchvision",),
    "qwen2.5-vl": ("torchvision",),
    "qwen3-vl": ("torchvision",),
    "internvl": ("torchvision",),
}
"""The video half of these processors cannot be made without them."""


def missing(name: str) -> list[str]:
    """The packages that a family's processor needs and that are not installed."""
    return [package for package in NEEDS.get(name, ()) if find_spec(package) is None]


def parameter(name: str) -> Any:
    """A family as a test's parameter, skipped where its processor lacks a package."""
    lacking = ", ".join(missing(name))
    why = f"{name}: its processor needs {lacking}; see vision_operators.py"
    return pytest.param(name, marks=[pytest.mark.skipif(bool(lacking), reason=why)])
