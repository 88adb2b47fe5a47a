"""Directions that are taken out: a given subspace, or all that tells labels apart."""

from __future__ import annotations

import torch
from torch import Tensor

from patch_retriever.patch.fit.statistics import RANK, affine, moments
from patch_retriever.patch.operators import Affine


def remove_subspace(directions_md: Tensor, r: int | None = None) -> Affine:
    """x - V V^T x, V the first `r` right singular vectors of `directions_md` (paper, Eq. 8-10)."""
    _, _, vt = torch.linalg.svd(directions_md.double(), full_matrices=False)
    v_rd = vt[: r or len(vt)]
    weight_dd = torch.eye(v_rd.shape[1], dtype=torch.float64) - v_rd.T @ v_rd
    return affine("remove-subspace", "all", [torch.zeros(v_rd.shape[1]).double()], [weight_dd])


def leace(x_nd: Tensor, labels_n: Tensor) -> Affine:
    """LEACE: x - W^+ P W (x - mean), one map for all items (Belrose et al. 2023, arXiv 2306.03819).

    W = (Sigma_xx^1/2)^+, and P projects onto the columns of W Sigma_xz, z the labels one-hot. Of
    all affine maps after which no dimension correlates with a label, so that a linear classifier
    does no better than a constant, it changes x least in the mean square. The mean of all items
    stays. In place: the package `concept-erasure` has had no release since January 2024.
    """
    mean_d, covariance_dd = moments(x_nd, torch.arange(len(x_nd)))
    values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
    there_d = values_d > RANK * values_d[-1]
    roots_d, vectors_dr = values_d[there_d].sqrt(), vectors_dd[:, there_d]
    labels_nz = torch.nn.functional.one_hot(labels_n.long()).double()
    cross_dz = (x_nd.double() - mean_d).T @ (labels_nz - labels_nz.mean(0)) / (len(x_nd) - 1)
    u_rz, s_z, _ = torch.linalg.svd((vectors_dr / roots_d).T @ cross_dz, full_matrices=False)
    u_rz = u_rz[:, s_z > 1e-8]  # z sums to one, so its last direction is always empty
    removed_dd = (vectors_dr / roots_d @ u_rz) @ (vectors_dr * roots_d @ u_rz).T
    weight_dd = torch.eye(len(mean_d), dtype=torch.float64) - removed_dd
    return Affine("leace", "all", weight_dd[None].float(), (mean_d @ removed_dd)[None].float())
