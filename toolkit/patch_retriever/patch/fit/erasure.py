"""Directions that are taken out: a given subspace, or all that tells labels apart."""

from __future__ import annotations

import torch
from torch import Tensor

from patch_retriever.patch.fit.decomposition import svd
from patch_retriever.patch.fit.statistics import RANK, Moments, affine
from patch_retriever.patch.operators import Affine


def remove_subspace(directions_md: Tensor, r: int | None = None) -> Affine:
    """x - V V^T x, V the first `r` right singular vectors of `directions_md` (paper, Eq. 8-10)."""
    _, _, vt = svd(directions_md.double(), full_matrices=False)
    v_rd = vt[: r or len(vt)]
    weight_dd = torch.eye(v_rd.shape[1], dtype=torch.float64) - v_rd.T @ v_rd
    return affine("remove-subspace", "all", [torch.zeros(v_rd.shape[1]).double()], [weight_dd])


def leace(moments: Moments, labels_n: Tensor) -> Affine:
    """LEACE: x - W^+ P W (x - mean), one map for all items (Belrose et al. 2023, arXiv 2306.03819).

    W = (Sigma_xx^1/2)^+, and P projects onto the columns of W Sigma_xz, z the labels one-hot. Of
    all affine maps after which no dimension correlates with a label, so that a linear classifier
    does no better than a constant, it changes x least in the mean square. The mean of all items
    stays. In place: the package `concept-erasure` has had no release since January 2024.

    Args:
        moments: of the vectors.
        labels_n: the label of every row of `moments.x_nd`.
    """
    mean_d, (values_d, vectors_dd) = moments.mean_d, moments.spectrum
    there_d = values_d > RANK * values_d[-1]
    roots_d, vectors_dr = values_d[there_d].sqrt(), vectors_dd[:, there_d]
    labels_m = labels_n.long()[moments.rows_m].to(moments.device)
    cross_zd = torch.zeros(int(labels_m.max()) + 1, len(mean_d), dtype=torch.float64).to(mean_d)
    starts = 0
    for x_md in moments.chunks():
        cross_zd.index_add_(0, labels_m[starts : starts + len(x_md)], x_md - mean_d)
        starts += len(x_md)
    cross_dz = cross_zd.T / (moments.n - 1)
    u_rz, s_z, _ = svd((vectors_dr / roots_d).T @ cross_dz, full_matrices=False)
    u_rz = u_rz[:, s_z > 1e-8]  # z sums to one, so its last direction is always empty
    removed_dd = (vectors_dr / roots_d @ u_rz) @ (vectors_dr * roots_d @ u_rz).T
    weight_dd = torch.eye(len(mean_d), dtype=torch.float64).to(removed_dd) - removed_dd
    bias_d = mean_d @ removed_dd
    return Affine("leace", "all", weight_dd[None].float().cpu(), bias_d[None].float().cpu())
