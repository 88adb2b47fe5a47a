"""What the methods learn from: the calibration split and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patch_retriever.concepts.scores import ConceptTable
from patch_retriever.features import Features
from patch_retriever.patch import fit
from patch_retriever.patch.fit import GradedTask, PairStatistics, Statistics, choose_gate
from patch_retriever.patch.gains import CentredCodes
from patch_retriever.patch.operators import Affine, By, Gate, Subtract
from patch_retriever.sae.model import SparseAutoencoder

_KEPT = 4
"""Subtractions whose vectors and statistics are kept: settings of a method that differ only in what
comes after the subtraction follow each other."""


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
    document) items by direction, each (n, 2), `tasks` all that is known of what is relevant.
    Methods are fitted on `device`. Where the split has too many items, these are a sample of its
    `of_items` (`sampled_items`). `no_gate` says what the gate cannot tell apart, and `sae_problem`
    why nothing may be made of the SAE's concepts; both are empty where all is well.
    """

    site: str
    features: Features
    sae: SparseAutoencoder
    concepts: ConceptTable
    gate: Gate | None
    query_items: Tensor
    document_items: Tensor
    pairs: Mapping[str, Tensor]
    tasks: tuple[GradedTask, ...]
    seed: int
    layer: Layer | None = None
    device: str = "cpu"
    of_items: int | None = None
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

    @property
    def told_n(self) -> Tensor:
        """The kinds that maps go by, (n,): an image for items with both that the gate does not tell
        from these."""
        if self.gate is None or self.gate.tells_both:
            return self.kinds_n
        return self.kinds_n.clamp(max=1)

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What methods have learned already, by their settings."""
        return {}

    @property
    def n_parts(self) -> int:
        """Parts of a pooled vector: 2 where the readout has the mean beside the last token."""
        return self.features.pooled_nd.shape[1] // self.sae.d_in

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
        return pairs_to_images(self.pairs.values(), self.kinds_n)

    @cached_property
    def dictionary_cw(self) -> Tensor:
        """The SAE's dictionary in the space of pooled vectors: concepts are nothing in the second
        part of a readout of two."""
        width = self.features.pooled_nd.shape[1]
        return torch.nn.functional.pad(self.sae.W_dec_cd, (0, width - self.sae.d_in))

    def vectors(self, subtract: Subtract | None = None) -> Vectors:
        """The pooled vectors, as they are or after `subtract`, with their statistics: the same
        object for the same subtraction."""
        if subtract is None:
            return self._unpatched
        for known, vectors in self._after:
            if known.is_like(subtract):
                return vectors
        x_nd = subtract.on_pooled(self.features.pooled_nd, self.features.codes)
        self._after.insert(0, (subtract, Vectors(self, x_nd)))
        del self._after[_KEPT:]
        return self._after[0][1]

    @cached_property
    def _unpatched(self) -> Vectors:
        return Vectors(self, self.features.pooled_nd)

    @cached_property
    def _after(self) -> list[tuple[Subtract, Vectors]]:
        return []

    @cached_property
    def centred_nd(self) -> Tensor:
        """Pooled vectors less the mean of their kind."""
        x_nd = self.features.pooled_nd
        means_kd = torch.stack([x_nd[rows].mean(0) for rows in self.groups("modality")])
        return x_nd - means_kd[self.kinds_n.long()]

    @cached_property
    def centred_codes(self) -> CentredCodes:
        """Pooled codes less the mean of their kind, times the dictionary."""
        width = self.features.pooled_nd.shape[1]
        return CentredCodes.of(self.features.codes, self.kinds_n, self.sae.W_dec_cd, width)


@dataclass(frozen=True)
class Vectors:
    """Calibration's pooled vectors at one place of a patch, and what maps there are fitted on."""

    calibration: Calibration
    x_nd: Tensor
    _statistics: dict[By, Statistics] = field(default_factory=dict)
    _weighed: dict[float, tuple[Vectors, Affine]] = field(default_factory=dict)

    def statistics(self, by: By) -> Statistics:
        """Moments of the groups that `by` tells apart; the same object for all settings."""
        if by not in self._statistics:
            c = self.calibration
            self._statistics[by] = Statistics(self.x_nd, c.groups(by), by, c.device)
        return self._statistics[by]

    @cached_property
    def pairs(self) -> PairStatistics:
        """Moments of the pairs to images; the same object for all settings."""
        c = self.calibration
        return PairStatistics(self.x_nd, c.kinds_n, c.pairs_to_images, c.device)

    def weighed(self, mean_weight: float) -> tuple[Vectors, Affine]:
        """The vectors of a readout of two parts with the parts weighed, and the map that does it:
        the same objects for the same weight."""
        if mean_weight not in self._weighed:
            step = fit.weigh(self.x_nd, self.calibration.sae.d_in, mean_weight)
            self._weighed[mean_weight] = (self.after(step), step)
        return self._weighed[mean_weight]

    def after(self, *maps: Affine) -> Vectors:
        """The vectors as they are after `maps`, by the kinds that the gate tells."""
        x_nd = self.x_nd
        for step in maps:
            x_nd = step.by_kind(x_nd, self.calibration.told_n)
        return Vectors(self.calibration, x_nd)


def pairs_to_images(pairs: Iterable[Tensor], kinds_n: Tensor) -> dict[int, Tensor]:
    """(item, image item) numbers (n, 2) of all `pairs` (n, 2) that have an image alone on one side,
    by the kind of the other: texts (0) and both (2)."""
    found: dict[int, list[Tensor]] = {0: [], 2: []}
    for pairs_n2 in pairs:
        for pair in (pairs_n2, pairs_n2.flip(1)):
            kinds = kinds_n[pair]
            for kind in found:
                found[kind].append(pair[(kinds[:, 0] == kind) & (kinds[:, 1] == 1)])
    return {k: torch.cat(v) for k, v in found.items() if sum(map(len, v)) > 1}
