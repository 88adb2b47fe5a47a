"""Learned gains: one number in [0, 1] per concept, from pairs, by a contrastive loss.

What gains weigh are the parts of an item: its centred codes times the dictionary, or its
coordinates on principal components. Codes stay sparse: a step touches the active entries of its
batch, and one row of means for each kind of item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from patch_retriever.sae.codes import Codes


@dataclass(frozen=True)
class GainSettings:
    """How gains are learned."""

    steps: int = 150
    lr: float = 0.1
    temperature: float = 0.05
    batch_size: int = 512


class Parts(Protocol):
    """What the vectors of items are made of: one part for every gain."""

    @property
    def n_gains(self) -> int:
        """Number of parts."""
        ...

    def weighted(self, items_m: Tensor, weight_c: Tensor) -> Tensor:
        """Sums (m, d) of some items' parts times weights; differentiable in `weight_c`."""
        ...

    def to(self, device: str) -> Parts:
        """The same on a device."""
        ...


@dataclass(frozen=True)
class CentredCodes:
    """Codes less the mean of their item's kind, times the dictionary, in vectors of `width` entries
    of which the dictionary has the first d.

    `means_kc` are the mean codes, `kinds_n` every item's row there; a row of zeros leaves codes as
    they are. (z - mean) D is the active entries' rows of D less one product for each kind.
    """

    codes: Codes
    means_kc: Tensor
    kinds_n: Tensor
    dictionary_cd: Tensor
    width: int

    @classmethod
    def of(
        cls, codes: Codes, kinds_n: Tensor, dictionary_cd: Tensor, width: int | None = None
    ) -> CentredCodes:
        """Codes less the mean of their kind; those of no kind (-1) as they are."""
        means = [codes[torch.eq(kinds_n, k).nonzero()[:, 0]].mean() for k in range(3)]
        means_kc = torch.stack([*means, torch.zeros(codes.n_concepts)])
        rows_n = torch.where(kinds_n < 0, len(means), kinds_n.long())
        return cls(codes, means_kc, rows_n, dictionary_cd, width or dictionary_cd.shape[1])

    @property
    def n_gains(self) -> int:
        """Number of concepts."""
        return self.codes.n_concepts

    def weighted(self, items_m: Tensor, weight_c: Tensor) -> Tensor:
        """((codes - means) * weights) D of some items, (m, width)."""
        active_md = self.codes[items_m].weighted_matmul(weight_c, self.dictionary_cd)
        mean_kd = (self.means_kc * weight_c) @ self.dictionary_cd
        parts_md = active_md - mean_kd.index_select(0, self.kinds_n[items_m])
        return torch.nn.functional.pad(parts_md, (0, self.width - parts_md.shape[1]))

    def to(self, device: str) -> CentredCodes:
        """The same on a device."""
        return CentredCodes(
            self.codes.to(device),
            self.means_kc.to(device),
            self.kinds_n.to(device),
            self.dictionary_cd.to(device),
            self.width,
        )


@dataclass(frozen=True)
class Components:
    """Coordinates on a few directions, dense: `coordinates_nc` times the rows of `rows_cd`."""

    coordinates_nc: Tensor
    rows_cd: Tensor

    @classmethod
    def of(cls, x_nd: Tensor, vectors_dd: Tensor) -> Components:
        """Vectors on principal components (the columns of `vectors_dd`)."""
        return cls((x_nd.to(vectors_dd) @ vectors_dd).float(), vectors_dd.T.float())

    @property
    def n_gains(self) -> int:
        """Number of directions."""
        return len(self.rows_cd)

    def weighted(self, items_m: Tensor, weight_c: Tensor) -> Tensor:
        """(coordinates * weights) times the directions, of some items, (m, d)."""
        return (self.coordinates_nc[items_m] * weight_c) @ self.rows_cd

    def to(self, device: str) -> Components:
        """The same on a device."""
        return Components(self.coordinates_nc.to(device), self.rows_cd.to(device))


def learn_gains(
    base_nd: Tensor,
    parts: Parts,
    pairs: Sequence[Tensor],
    settings: GainSettings,
    seed: int,
    device: str = "cpu",
) -> Tensor:
    """Gains (c,) that maximise the agreement of pairs against the other pairs of a batch.

    The embedding of item n is base_n - (its parts times 1 - g), where `base_nd` are centred pooled
    vectors. Each element of `pairs` is (n, 2), (query, document) items of one direction; steps
    take the directions in turn. Symmetric InfoNCE, on `device`.
    """
    base_nd, parts = base_nd.to(device), parts.to(device)
    generator = torch.Generator().manual_seed(seed)
    # gains start at 0.88
    logits_c = torch.full((parts.n_gains,), 2.0, requires_grad=True, device=device)
    optimiser = torch.optim.Adam([logits_c], settings.lr)
    for step in range(settings.steps):
        pairs_n2 = pairs[step % len(pairs)]
        picks = torch.randperm(len(pairs_n2), generator=generator)[: settings.batch_size]
        items_m, places_n2 = pairs_n2[picks].to(device).unique(return_inverse=True)
        removed_c = 1 - torch.sigmoid(logits_c)
        e_md = base_nd[items_m] - parts.weighted(items_m, removed_c)
        e_md = torch.nn.functional.normalize(e_md, dim=1)
        # index_select: the backward pass of plain indexing adds in no fixed order on many threads
        q_nd, d_nd = (e_md.index_select(0, places_n) for places_n in places_n2.T)
        loss = _info_nce(q_nd, d_nd, places_n2, settings.temperature)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return torch.sigmoid(logits_c.detach()).cpu()


def _info_nce(q_nd: Tensor, d_nd: Tensor, places_n2: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE; a document that occurs twice in the batch is no negative of itself."""
    scores_nn = q_nd @ d_nd.T / temperature
    target_n = torch.arange(len(q_nd), device=q_nd.device)
    loss = q_nd.new_zeros(())
    for side, scores in ((1, scores_nn), (0, scores_nn.T)):
        places_n = places_n2[:, side]
        if len(places_n.unique()) < len(places_n):
            same_nn = places_n[:, None] == places_n[None, :]
            scores = scores.masked_fill(same_nn.fill_diagonal_(False), -1e4)
        loss = loss + torch.nn.functional.cross_entropy(scores, target_n)
    return loss / 2
