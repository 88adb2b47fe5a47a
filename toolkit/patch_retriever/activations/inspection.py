"""A first look at a model: norms, sinks and token roles at every site, from a handful of items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.activations.sinks import SinkCounter, SinkReport
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import set_readout
from patch_retriever.backbones.readout import LAST, Prompt, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.items import KINDS, Item
from patch_retriever.probe import Probe
from patch_retriever.progress import Progress, no_progress

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

HANDFUL = 8
"""Items of each modality: enough for every template, and a minute or so of a large model."""


@dataclass(frozen=True)
class Inspection:
    """What a handful of items show of a model."""

    items: dict[str, int]
    """How many of each modality."""
    roles: dict[str, int]
    """Tokens of each token role."""
    image_tokens: tuple[int, int] | None
    """The fewest and the most image tokens of an item that has images."""
    sites: dict[str, SinkReport]
    """In the order of the forward pass."""

    @property
    def warnings(self) -> list[str]:
        """A line about the sites that overflow, and one about those that come near float16's end:
        each says how bad it is at the worst of them."""
        overflowing = [site for site, one in self.sites.items() if one.not_finite]
        near = [s for s, one in self.sites.items() if one.warning and not one.not_finite]
        lines = []
        for sites in (overflowing, near):
            if sites:
                worst = max(sites, key=lambda s: (self.sites[s].not_finite, self.sites[s].largest))
                more = f" and {len(sites) - 1} more sites" if len(sites) > 1 else ""
                lines.append(f"{worst}{more}: {self.sites[worst].warning}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        sites = {site: found.to_json() for site, found in self.sites.items()}
        return {**vars(self), "sites": sites, "warnings": self.warnings}


def inspect(
    transformer: Transformer,
    items: Sequence[Item],
    prompt: Prompt,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> Inspection:
    """Run `items` once, and look at every layer and the last hidden state in each forward pass."""
    set_readout(transformer, Readout(prompt))
    sites = [*(f"layers.{n}" for n in range(n_layers(transformer.model))), LAST]
    probe, roles_of = Probe(transformer), TokenRoles(transformer)
    counters = {site: SinkCounter() for site in sites}
    tokens_r = torch.zeros(len(ROLES), dtype=torch.long)
    image_tokens: list[int] = []
    for _, features in item_batches(transformer, items, batch_size, progress):
        mask_nt, roles_nt = features["attention_mask"].bool(), roles_of(features)
        for site, tokens_ntd in probe.read(features, sites).items():
            counters[site].add(tokens_ntd, mask_nt, roles_nt)
        tokens_r += torch.bincount(roles_nt[mask_nt.cpu()], minlength=len(ROLES))
        image_tokens += roles_nt.eq(ROLES.index("image")).sum(1).tolist()
    shown = [count for count in image_tokens if count]
    return Inspection(
        dict(Counter(item.kind for item in items)),
        dict(zip(ROLES, tokens_r.tolist(), strict=True)),
        (min(shown), max(shown)) if shown else None,
        {site: counter.report() for site, counter in counters.items()},
    )


def handful(items: Sequence[Item]) -> list[Item]:
    """Up to `HANDFUL` items of each modality, from all over `items`; where none holds an image and
    a text, some are joined."""
    chosen = {kind: _spread([item for item in items if item.kind == kind]) for kind in KINDS}
    if not chosen["both"]:
        pairs = zip(chosen["text"], chosen["image"], strict=False)
        chosen["both"] = [Item.of(text.text, image.pictures) for text, image in pairs]
    return [item for of_kind in chosen.values() for item in of_kind]


def _spread(items: Sequence[Item]) -> list[Item]:
    n = min(HANDFUL, len(items))
    return [items[i * len(items) // n] for i in range(n)]
