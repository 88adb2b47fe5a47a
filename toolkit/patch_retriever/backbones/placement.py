"""Device maps: where the parts of a model are, and where it takes its inputs."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from patch_retriever.backbones.families import family_of
from patch_retriever.errors import UserError

if TYPE_CHECKING:
    import torch
    from sentence_transformers.base.modules import Transformer

DeviceMap = str | dict[str, str | int]
"""A word ("auto"), or a device for every part."""


def device_of(transformer: Transformer) -> torch.device:
    """Where a transformer takes its inputs; parts of one with a device map may lie elsewhere."""
    import torch

    placed = getattr(transformer.model, "hf_device_map", {}).values()
    on_devices = [device for device in placed if device not in ("cpu", "disk")]
    if placed:
        return torch.device(on_devices[0] if on_devices else "cpu")
    return next(transformer.parameters()).device


def check_placed(transformer: Transformer, device_map: DeviceMap, name: str) -> None:
    """Refuse a device map with a part that the model does not have (transformers takes it), and one
    that offloads a part which cannot be.

    Raises:
        UserError: it is such a one.
    """
    model = transformer.model
    if isinstance(device_map, dict):
        known = {path for path, _ in (*model.named_modules(), *model.named_parameters())}
        if unknown := sorted(set(device_map) - known):
            parts = ", ".join(part for part, _ in model.named_children())
            raise UserError(
                f"{name}: a device map with no part of this model ({unknown[0]}); its parts are "
                f"{parts}"
            )
    placed = getattr(model, "hf_device_map", {})
    offloaded = {"disk"} if set(placed.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    family = family_of(transformer.config)
    for kept, (part, place) in product(family.kept if family else (), placed.items()):
        if place in offloaded and (_within(kept, part) or _within(part, kept)):
            raise UserError(
                f"{name}: its {kept} cannot be offloaded; name a device for it in a device map of "
                "your own"
            )


def _within(path: str, part: str) -> bool:
    return part == "" or f"{path}.".startswith(f"{part}.")
