"""What the closed forms are made of: means, covariances and their roots, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patch_retriever.patch.operators import Affine, By

EPSILON = 1e-5
"""Added to variances before they are inverted (paper, Eq. 12)."""
RANK = 1e-10
"""Variance, as a share of the largest, below which nothing varies in a direction."""


def mean_of(x_nd: Tensor, rows: Tensor) -> Tensor:
    """Mean (d,) of some rows; of all where there are too few."""
    return _enough(x_nd, rows).mean(0)


def moments(x_nd: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of some rows; of all where there are too few."""
    x = _enough(x_nd, rows)
    mean_d = x.mean(0)
    centred_nd = x - mean_d
    return mean_d, centred_nd.T @ centred_nd / (len(x) - 1)


def _enough(x_nd: Tensor, rows: Tensor) -> Tensor:
    return (x_nd[rows] if len(rows) > 1 else x_nd).double()


def with_unit_variance(covariance_dd: Tensor) -> Tensor:
    """Scaled to mean variance one, so that `EPSILON` means the same at any scale of the
    activations; embeddings are normalised afterwards, so the scale does not matter."""
    return covariance_dd / covariance_dd.diagonal().mean().clamp(min=1e-30)


def inverse_root(covariance_dd: Tensor, beta: float) -> Tensor:
    """(covariance shrunk by `beta` + eps)^-1/2, symmetric (ZCA), for mean variance one."""
    eye = torch.eye(len(covariance_dd), dtype=torch.float64)
    shrunk_dd = (1 - beta) * with_unit_variance(covariance_dd) + beta * eye
    values_d, vectors_dd = torch.linalg.eigh(shrunk_dd)
    return vectors_dd * inverse_deviations(values_d) @ vectors_dd.T


def inverse_deviations(variances_d: Tensor) -> Tensor:
    """(variance + eps)^-1/2, and 0 where nothing varies: fewer items than dimensions say nothing
    of the others, and a gain of eps^-1/2 would show noise there."""
    there_d = variances_d > RANK * variances_d.max()
    return torch.where(there_d, (variances_d.clamp(min=0) + EPSILON).rsqrt(), 0.0)


def affine(name: str, by: By, means: Sequence[Tensor], weights: Sequence[Tensor]) -> Affine:
    """(x - mean_g) W_g, as weights and biases in float32."""
    biases = [-mean_d @ weight_de for mean_d, weight_de in zip(means, weights, strict=True)]
    return Affine(name, by, torch.stack(list(weights)).float(), torch.stack(biases).float())
