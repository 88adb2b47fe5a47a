"""What a model gives for every item before it is trained: embeddings and energies of concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.adapters.forward import PatchedForward
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.items import Item
from patch_retriever.patch.artefact import DOCUMENT, QUERY
from patch_retriever.progress import Progress, no_progress


@dataclass(frozen=True)
class Profile:
    """The unadapted model on every item: embeddings as queries and documents, and energies."""

    as_query_ne: Tensor
    as_document_ne: Tensor
    energy_n3: Tensor | None


@torch.no_grad()
def profile(
    forward: PatchedForward,
    items: Sequence[Item],
    batch_size: int,
    progress: Progress = no_progress,
    energies: bool = True,
) -> Profile:
    """Embeddings of all items as queries and documents, and their energies, on the CPU."""
    sides: dict[int, list[Tensor]] = {QUERY: [], DOCUMENT: []}
    order: list[int] = []
    found: list[Tensor] = []
    for numbers, features in item_batches(forward.transformer, items, batch_size, progress):
        order += numbers
        pooled = forward.pooled(features, energies)
        for role, parts in sides.items():
            parts.append(forward.embed(pooled, role).cpu())
        if pooled.energy_ng is not None:
            found.append(pooled.energy_ng.cpu())
    place = torch.tensor(order).argsort()
    as_query, as_document = (torch.cat(sides[role])[place] for role in (QUERY, DOCUMENT))
    return Profile(as_query, as_document, torch.cat(found)[place] if found else None)
