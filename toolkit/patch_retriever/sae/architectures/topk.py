"""TopK: the k largest pre-activations of every token (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.sae.architectures.base import Architecture
from patch_retriever.sae.ops import Entries, PreActivations, topk_concepts


@dataclass(frozen=True)
class TopK(Architecture):
    """Every token has exactly k active concepts (fewer where pre-activations are negative)."""

    name = "topk"
    threshold = "per concept"

    def select(self, pre_activations: PreActivations, threshold_c: Tensor) -> Entries:  # noqa: ARG002
        """The k largest of every row."""
        found = [topk_concepts(u_cn, self.k) for _, u_cn in pre_activations]
        return Entries.of_columns(torch.cat(found))
