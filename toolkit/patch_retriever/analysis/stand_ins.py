"""Whitening, a linear map and selections that `patch` and `concepts` do not offer yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patch_retriever.patch.fit import EPSILON
from patch_retriever.patch.operators import Affine, By

UNIMODAL = 0.05
"""Modality score nearer than this to 0 or 1 (IsoEnergy's bimodal mask, arXiv 2602.06218)."""


def pca_whitening(x_nd: Tensor, groups: Sequence[Tensor], by: By) -> Affine:
    """(x - mu) U (Lambda + eps)^-1/2 for each group: BERT-whitening (Su 2021, arXiv 2103.15316).

    ZCA whitening, which turns back by U^T, is `realign` at beta 0.
    """
    means, weights = [], []
    for rows in groups:
        x = x_nd[rows].double()
        mean_d = x.mean(0)
        centred_nd = x - mean_d
        covariance_dd = centred_nd.T @ centred_nd / max(len(x) - 1, 1)
        scale = (covariance_dd.trace() / len(covariance_dd)).clamp(min=1e-30)
        values_d, vectors_dd = torch.linalg.eigh(covariance_dd / scale)
        means.append(mean_d)
        weights.append(vectors_dd * (values_d.clamp(min=0) + EPSILON).rsqrt())
    return _affine("pca whitening", by, means, weights)


def ridge(x_nd: Tensor, kinds_n: Tensor, pairs_n2: Tensor, strength: float) -> Affine:
    """Texts mapped onto the images they are paired with by a linear map; other kinds centred.

    W = argmin ||A W - B||^2 + s ||W||^2 on centred pairs (text, image), s being `strength` times
    the mean eigenvalue of A^T A. What centres an item is the mean of all of its kind.
    """
    x = x_nd.double()
    means = [x[kinds_n == k].mean(0) if (kinds_n == k).any() else x.mean(0) for k in range(3)]
    a_nd, b_nd = (x[side] - x[side].mean(0) for side in pairs_n2.T)
    gram_dd = a_nd.T @ a_nd
    eye_dd = torch.eye(len(gram_dd), dtype=torch.float64)
    penalty = strength * (gram_dd.trace() / len(gram_dd)).clamp(min=1e-30)
    weight_dd = torch.linalg.solve(gram_dd + penalty * eye_dd, a_nd.T @ b_nd)
    return _affine("ridge", "modality", means, [weight_dd, eye_dd, eye_dd])


def unimodal(modality_c: Tensor, energy_c: Tensor) -> Tensor:
    """Whether a concept fires, and for one modality only, (c,)."""
    return (energy_c > 0) & ((modality_c - 0.5).abs() > 0.5 - UNIMODAL)


def matched_in_energy(energy_c: Tensor, ranking_m: Tensor, seed: int, reach: int = 20) -> Tensor:
    """A random concept for each in `ranking_m`: all concepts change places in the order of energy,
    one for one, with others at most `reach` places away."""
    order = energy_c.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    generator = torch.Generator().manual_seed(seed)
    jitter = reach * torch.rand(len(order), generator=generator)
    near = (torch.arange(len(order)) + jitter).argsort(stable=True)
    return order[near[place[ranking_m]]]


def _affine(name: str, by: By, means: Sequence[Tensor], weights: Sequence[Tensor]) -> Affine:
    """(x - mean_g) W_g, as weights and biases in float32."""
    biases = [-mean_d @ weight_dd for mean_d, weight_dd in zip(means, weights, strict=True)]
    return Affine(name, by, torch.stack(list(weights)).float(), torch.stack(biases).float())
