"""What the methods learn from: the calibration split and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patch_retriever.concepts.scores import ConceptTable
from patch_retriever.features import Features
from patch_retriever.patch.fit import choose_gate
from patch_retriever.patch.operators import Affine, By, Gate, Subtract
from patch_retriever.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Layer:
    """The decoder layer (`layers.N`) after which concepts are subtracted, if not at the readout.

    `patched` gives the calibration items' features at the readout, by the model without what it is
    told to subtract there; every new one costs a pass through the model.
    """

    site: str
    patched: Callable[[Mapping[str, Subtract]], Features]


@dataclass(frozen=True)
class Calibration:
    """Everything that methods may learn from: the calibration split and nothing else.

    `sae` and `concepts` are of activations at the readout or, where there is one, at the `layer`.
    `query_items` and `document_items` are item numbers by role, `pairs` are (query, relevant
    document) items by direction, each (n, 2). `no_gate` says what the gate cannot tell apart, and
    `sae_problem` why nothing may be made of the SAE's concepts; both are empty where all is well.
    """

    site: str
    features: Features
    sae: SparseAutoencoder
    concepts: ConceptTable
    gate: Gate | None
    query_items: Tensor
    document_items: Tensor
    pairs: Mapping[str, Tensor]
    seed: int
    layer: Layer | None = None
    no_gate: str = ""
    sae_problem: str = ""

    def without(self, subtract: Subtract) -> Calibration:
        """The same items by the model without what is subtracted at the layer."""
        assert self.layer is not None
        features = self.layer.patched({self.layer.site: subtract})
        gate, note = self.gate, self.no_gate
        if gate is not None:
            choice = choose_gate((features.mean_nd, features.kinds_n), self.asked)
            gate, note = choice.gate, choice.note
        return replace(self, features=features, gate=gate, no_gate=note)

    @property
    def asked(self) -> set[int]:
        """The kinds of the items that tasks hold."""
        return set(self.kinds_n[torch.cat([self.query_items, self.document_items])].tolist())

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What methods have learned already, by their settings."""
        return {}

    @property
    def sides(self) -> tuple[By, ...]:
        """What statistics can tell apart, coarse to fine: roles, and modalities with a gate."""
        return ("role", "modality") if self.gate is not None else ("role",)

    @property
    def kinds_n(self) -> Tensor:
        """Kinds of the items."""
        return self.features.kinds_n

    def groups(self, by: By) -> list[Tensor]:
        """The items of each group that `by` tells apart."""
        if by == "role":
            return [self.query_items, self.document_items]
        if by == "modality":
            return [(self.kinds_n == kind).nonzero()[:, 0] for kind in range(3)]
        return [torch.arange(len(self.kinds_n))]

    @cached_property
    def pairs_to_images(self) -> dict[int, Tensor]:
        """(item, image item) pairs by the kind of the first: texts (0) and both (2)."""
        found: dict[int, list[Tensor]] = {0: [], 2: []}
        for pairs_n2 in self.pairs.values():
            for pair in (pairs_n2, pairs_n2.flip(1)):
                kinds = self.kinds_n[pair]
                for kind in found:
                    found[kind].append(pair[(kinds[:, 0] == kind) & (kinds[:, 1] == 1)])
        return {k: torch.cat(v) for k, v in found.items() if sum(map(len, v)) > 1}

    @cached_property
    def centred_nd(self) -> Tensor:
        """Pooled vectors less the mean of their kind."""
        return self.features.pooled_nd - self._kind_means(self.features.pooled_nd)

    @cached_property
    def centred_codes_nc(self) -> Tensor:
        """Pooled codes less the mean of their kind."""
        codes_nc = self.features.codes.dense()
        return codes_nc - self._kind_means(codes_nc)

    def vectors_after(self, maps: tuple[Affine, ...], subtract: Subtract | None) -> Tensor:
        """Calibration vectors as they are after `subtract` and `maps`, by their true kinds (images
        for items with both that the gate does not tell from these)."""
        x_nd = self.features.pooled_nd
        if subtract is not None:
            x_nd = subtract.on_pooled(x_nd, self.features.codes)
        for step in maps:
            out_nd = torch.empty(len(x_nd), step.bias_ge.shape[1])
            for kind in range(3):
                both_as_image = self.gate is not None and not self.gate.tells_both
                g = step.group(1, min(kind, 1) if both_as_image else kind)
                rows = self.kinds_n == kind
                out_nd[rows] = x_nd[rows] @ step.weight_gde[g] + step.bias_ge[g]
            x_nd = out_nd
        return x_nd

    def _kind_means(self, x_nd: Tensor) -> Tensor:
        means_kd = torch.stack([x_nd[rows].mean(0) for rows in self.groups("modality")])
        return means_kd[self.kinds_n.long()]
