"""Singular value decompositions that end."""

from __future__ import annotations

import torch
from torch import Tensor


def svd(x_mn: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and V^T, by divide and conquer (LAPACK's gesdd).

    That does not converge on some matrices of low rank (the cross-covariance of few pairs, say: on
    one thread, not on two); then by QR iteration (gesvd), which does.
    """
    try:
        u, s, vt = torch.linalg.svd(x_mn, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        from scipy.linalg import svd as lapack_svd

        found = lapack_svd(x_mn.cpu().numpy(), full_matrices, lapack_driver="gesvd")
        u, s, vt = (torch.from_numpy(part).to(x_mn.device) for part in found)
    return u, s, vt
