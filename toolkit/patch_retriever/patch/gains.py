"""Learned gains: one number in [0, 1] per concept, from pairs, by a contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GainSettings:
    """How gains are learned."""

    steps: int = 300
    lr: float = 0.05
    temperature: float = 0.05
    batch_size: int = 512
    sparsity: float = 0.0
    """Penalty on the mean of 1 - gain: how much a subtracted concept has to earn."""


def learn_gains(
    base_nd: Tensor,
    codes_nc: Tensor,
    dictionary_cd: Tensor,
    pairs: Sequence[Tensor],
    settings: GainSettings,
    seed: int,
) -> Tensor:
    """Gains (c,) that maximise the agreement of pairs against the other pairs of a batch.

    The embedding of item n is base_n - ((1 - g) * codes_n) D, where `base_nd` are centred pooled
    vectors and `codes_nc` centred codes. Each element of `pairs` is (n, 2), (query, document)
    items of one direction; steps take the directions in turn. Symmetric InfoNCE.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_c = torch.full((codes_nc.shape[1],), 2.0, requires_grad=True)  # gains start at 0.88
    optimiser = torch.optim.Adam([logits_c], settings.lr)
    for step in range(settings.steps):
        pairs_n2 = pairs[step % len(pairs)]
        picks = torch.randperm(len(pairs_n2), generator=generator)[: settings.batch_size]
        items_m, places_n2 = pairs_n2[picks].unique(return_inverse=True)
        removed_c = 1 - torch.sigmoid(logits_c)
        e_md = base_nd[items_m] - (codes_nc[items_m] * removed_c) @ dictionary_cd
        e_md = torch.nn.functional.normalize(e_md, dim=1)
        # index_select: the backward pass of plain indexing adds in no fixed order on many threads
        q_nd, d_nd = (e_md.index_select(0, places_n) for places_n in places_n2.T)
        loss = _info_nce(q_nd, d_nd, places_n2, settings.temperature)
        loss = loss + settings.sparsity * removed_c.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return torch.sigmoid(logits_c.detach())


def _info_nce(q_nd: Tensor, d_nd: Tensor, places_n2: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE; a document that occurs twice in the batch is no negative of itself."""
    scores_nn = q_nd @ d_nd.T / temperature
    target_n = torch.arange(len(q_nd))
    loss = torch.zeros(())
    for side, scores in ((1, scores_nn), (0, scores_nn.T)):
        same_nn = places_n2[:, side][:, None] == places_n2[:, side][None, :]
        same_nn.fill_diagonal_(False)
        loss = loss + torch.nn.functional.cross_entropy(scores.masked_fill(same_nn, -1e4), target_n)
    return loss / 2
