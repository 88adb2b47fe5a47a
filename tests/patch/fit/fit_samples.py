"""Vectors that the fitted operators are tried on."""

from __future__ import annotations

import torch

N, D = 60, 6
GROUPS_2 = [torch.arange(0, 25), torch.arange(25, N)]
ALL = [torch.arange(N)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(d=D, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed).double()).Q.float()


def make_x(seed=0):
    """Correlated vectors with a large mean; the two groups lie apart."""
    x_nd = normal(N, D, seed=seed) @ normal(D, D, seed=seed + 1) + 5
    x_nd[GROUPS_2[1]] += 3 * normal(D, seed=seed + 2)
    return x_nd


def mapped(step, x_nd, group=0):
    return x_nd @ step.weight_gde[group] + step.bias_ge[group]


def covariance(x_nd):
    return torch.cov(x_nd.double().T).float()


def three_kinds(gap):
    """Vectors of three kinds around points `gap` away from the origin."""
    kinds_n = torch.arange(90) % 3
    means_kd = gap * torch.eye(3, D)
    return normal(90, D, seed=4) + means_kd[kinds_n], kinds_n
