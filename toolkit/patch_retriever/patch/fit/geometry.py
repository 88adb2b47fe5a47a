"""Corrections of the geometry from unpaired items: centring, standardisation, whitening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from patch_retriever.patch.fit.statistics import (
    Moments,
    Statistics,
    affine,
    inverse_deviations,
)
from patch_retriever.patch.operators import Affine


def centre(statistics: Statistics) -> Affine:
    """x - mean of the item's group."""
    means = [moments.mean_d for moments in statistics.moments]
    return affine("centre", statistics.by, means, [_eye(moments) for moments in statistics.moments])


def weigh(x_nd: Tensor, d: int, first_weight: float) -> Affine:
    """Each part of d entries over its mean norm, the first part times `first_weight`, so that
    neither part of a readout of two outweighs the other by the scale of its activations."""
    norms = [float(part_nd.norm(dim=1).mean()) for part_nd in x_nd.split(d, dim=1)]
    weights = [first_weight / norms[0], *(1 / norm for norm in norms[1:])]
    diagonal_w = torch.tensor(weights, dtype=torch.float64).repeat_interleave(d)
    zero_w = torch.zeros(len(diagonal_w), dtype=torch.float64)
    return affine("weigh parts", "all", [zero_w], [torch.diag(diagonal_w)])


def standardise(statistics: Statistics) -> Affine:
    """(x - mean) / standard deviation, dimension by dimension and up to one scale for a group
    (I0T_post, arXiv 2412.14384).

    I0T standardises normalised vectors; this takes them as they are, since a normalisation in
    between is no affine map and could not be exported.
    """

    def weight(moments: Moments) -> Tensor:
        return torch.diag(inverse_deviations(moments.covariance_dd.diagonal() / moments.scale))

    return _group_by_group("standardise", statistics, weight)


def all_but_the_top(statistics: Statistics, r: int) -> Affine:
    """(x - mean) without its first `r` principal components (Mu & Viswanath, arXiv 1702.01417)."""

    def weight(moments: Moments) -> Tensor:
        top_dr = moments.spectrum[1][:, -r:]
        return _eye(moments) - top_dr @ top_dr.T

    return _group_by_group("all-but-the-top", statistics, weight)


def pca_whiten(statistics: Statistics, k: int) -> Affine:
    """(x - mean) U (Lambda + eps)^-1/2, U the first `k` principal components (Su et al., arXiv
    2103.15316); no shrinkage.

    Each group gets its own basis, which makes groups hard to compare: the largest entry of every
    component is positive, so that at least the signs of alike components agree.
    """

    def weight(moments: Moments) -> Tensor:
        values_d, vectors_dd = moments.unit_spectrum
        values_k, top_dk = values_d[-k:].flip(0), vectors_dd[:, -k:].flip(1)
        signs_1k = top_dk.gather(0, top_dk.abs().argmax(0, keepdim=True)).sign()
        return top_dk * signs_1k * inverse_deviations(values_k)

    return _group_by_group(f"pca whitening {k}", statistics, weight)


def realign(statistics: Statistics, beta: float) -> Affine:
    """ReAlign: (x - mu) U (Lambda + eps)^-1/2 U^T of the shrunk covariance (paper, Eq. 11-12)."""
    return _group_by_group(f"realign {beta:g}", statistics, lambda m: m.inverse_root(beta))


def zca_whiten(statistics: Statistics) -> Affine:
    """(x - mean) U (Lambda + eps)^-1/2 U^T: ReAlign without shrinkage."""
    return replace(realign(statistics, 0.0), name="zca whitening")


def _group_by_group(
    name: str, statistics: Statistics, weight: Callable[[Moments], Tensor]
) -> Affine:
    """(x - mean) times what `weight` makes of the moments of each group."""
    found = statistics.moments
    return affine(name, statistics.by, [m.mean_d for m in found], [weight(m) for m in found])


def _eye(moments: Moments) -> Tensor:
    return torch.eye(moments.x_nd.shape[1], dtype=torch.float64, device=moments.device)


def principal_gains(gains_d: Tensor, vectors_dd: Tensor) -> Affine:
    """x V diag(g) V^T: a gain for every principal component (the columns of `vectors_dd`)."""
    weight_dd = (vectors_dd * gains_d) @ vectors_dd.T
    zero_d = torch.zeros_like(weight_dd[0])
    return affine("principal gains", "all", [zero_d], [weight_dd])
