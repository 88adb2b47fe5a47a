"""Corrections of the geometry from unpaired items: centring, standardisation, whitening."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patch_retriever.patch.fit.statistics import (
    affine,
    inverse_deviations,
    inverse_root,
    mean_of,
    moments,
    with_unit_variance,
)
from patch_retriever.patch.operators import Affine, By


def centre(x_nd: Tensor, groups: Sequence[Tensor], by: By) -> Affine:
    """x - mean of the item's group."""
    means = [mean_of(x_nd, rows) for rows in groups]
    eye = torch.eye(x_nd.shape[1], dtype=torch.float64)
    return affine("centre", by, means, [eye] * len(means))


def weigh(x_nd: Tensor, d: int, first_weight: float) -> Affine:
    """Each part of d entries over its mean norm, the first part times `first_weight`, so that
    neither part of a readout of two outweighs the other by the scale of its activations."""
    norms = [float(part_nd.norm(dim=1).mean()) for part_nd in x_nd.split(d, dim=1)]
    weights = [first_weight / norms[0], *(1 / norm for norm in norms[1:])]
    diagonal_w = torch.tensor(weights, dtype=torch.float64).repeat_interleave(d)
    zero_w = torch.zeros(len(diagonal_w), dtype=torch.float64)
    return affine("weigh parts", "all", [zero_w], [torch.diag(diagonal_w)])


def standardise(x_nd: Tensor, groups: Sequence[Tensor], by: By) -> Affine:
    """(x - mean) / standard deviation, dimension by dimension and up to one scale for a group
    (I0T_post, arXiv 2412.14384).

    I0T standardises normalised vectors; this takes them as they are, since a normalisation in
    between is no affine map and could not be exported.
    """

    def weight(covariance_dd: Tensor) -> Tensor:
        return torch.diag(inverse_deviations(covariance_dd.diagonal()))

    return _from_covariance("standardise", x_nd, groups, by, weight)


def all_but_the_top(x_nd: Tensor, groups: Sequence[Tensor], by: By, r: int) -> Affine:
    """(x - mean) without its first `r` principal components (Mu & Viswanath, arXiv 1702.01417)."""

    def weight(covariance_dd: Tensor) -> Tensor:
        top_dr = torch.linalg.eigh(covariance_dd).eigenvectors[:, -r:]
        return torch.eye(len(top_dr), dtype=torch.float64) - top_dr @ top_dr.T

    return _from_covariance("all-but-the-top", x_nd, groups, by, weight)


def pca_whiten(x_nd: Tensor, groups: Sequence[Tensor], by: By, k: int) -> Affine:
    """(x - mean) U (Lambda + eps)^-1/2, U the first `k` principal components (Su et al., arXiv
    2103.15316); no shrinkage.

    Each group gets its own basis, which makes groups hard to compare: the largest entry of every
    component is positive, so that at least the signs of alike components agree.
    """

    def weight(covariance_dd: Tensor) -> Tensor:
        values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
        values_k, top_dk = values_d[-k:].flip(0), vectors_dd[:, -k:].flip(1)
        signs_1k = top_dk.gather(0, top_dk.abs().argmax(0, keepdim=True)).sign()
        return top_dk * signs_1k * inverse_deviations(values_k)

    return _from_covariance(f"pca whitening {k}", x_nd, groups, by, weight)


def realign(x_nd: Tensor, groups: Sequence[Tensor], by: By, beta: float) -> Affine:
    """ReAlign: (x - mu) U (Lambda + eps)^-1/2 U^T of the shrunk covariance (paper, Eq. 11-12)."""
    return _from_covariance(
        f"realign {beta:g}", x_nd, groups, by, lambda v_dd: inverse_root(v_dd, beta)
    )


def zca_whiten(x_nd: Tensor, groups: Sequence[Tensor], by: By) -> Affine:
    """(x - mean) U (Lambda + eps)^-1/2 U^T: ReAlign without shrinkage."""
    return replace(realign(x_nd, groups, by, 0.0), name="zca whitening")


def _from_covariance(
    name: str,
    x_nd: Tensor,
    groups: Sequence[Tensor],
    by: By,
    weight: Callable[[Tensor], Tensor],
) -> Affine:
    """(x - mean) times what `weight` makes of the covariance, group by group."""
    found = [moments(x_nd, rows) for rows in groups]
    means = [mean_d for mean_d, _ in found]
    weights = [weight(with_unit_variance(covariance_dd)) for _, covariance_dd in found]
    return affine(name, by, means, weights)


def principal_gains(x_nd: Tensor, gains_d: Tensor, vectors_dd: Tensor) -> Affine:
    """x V diag(g) V^T: a gain for every principal component (the columns of `vectors_dd`)."""
    weight_dd = (vectors_dd * gains_d) @ vectors_dd.T
    zero_d = torch.zeros(x_nd.shape[1], dtype=torch.float64)
    return affine("principal gains", "all", [zero_d], [weight_dd.double()])
