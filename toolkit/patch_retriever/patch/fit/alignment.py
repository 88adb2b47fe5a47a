"""Alignments from pairs, in closed form: each kind is mapped onto the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patch_retriever.patch.fit.statistics import affine, inverse_root, mean_of
from patch_retriever.patch.operators import Affine

Pairs = Mapping[int, Tensor]
"""(item of that kind, image item) numbers (n, 2), by kind."""


def procrustes(x_nd: Tensor, kinds_n: Tensor, pairs_by_kind: Pairs) -> Affine:
    """Each kind turned onto the images by the rotation that fits its pairs best.

    R = U V^T of the SVD of the centred cross-covariance (orthogonal Procrustes, Schoenemann 1966).
    A kind without pairs is only centred.
    """

    def rotation(a_nd: Tensor, b_nd: Tensor) -> Tensor:
        u, _, vt = torch.linalg.svd(a_nd.T @ b_nd)
        return u @ vt

    return _onto_images("procrustes", x_nd, kinds_n, pairs_by_kind, rotation)


def ridge(x_nd: Tensor, kinds_n: Tensor, pairs_by_kind: Pairs, shrinkage: float) -> Affine:
    """Each kind mapped onto the images by ridge regression from its pairs.

    W minimises |A W - B|^2 + penalty |W|^2 with penalty = `shrinkage` tr(A^T A) / d, A and B the
    centred pairs. A kind without pairs is only centred.
    """
    return _onto_images(
        f"ridge {shrinkage:g}",
        x_nd,
        kinds_n,
        pairs_by_kind,
        lambda a_nd, b_nd: _ridge_weight(a_nd, b_nd, shrinkage),
    )


def _onto_images(
    name: str,
    x_nd: Tensor,
    kinds_n: Tensor,
    pairs_by_kind: Pairs,
    weight: Callable[[Tensor, Tensor], Tensor],
) -> Affine:
    """Each kind less its mean, times what `weight` makes of its centred pairs."""
    x, weights = x_nd.double(), []
    for kind in range(3):
        if kind in pairs_by_kind:
            weights.append(weight(*_centred_pairs(x, pairs_by_kind[kind])))
        else:
            weights.append(torch.eye(x.shape[1], dtype=torch.float64))
    return affine(name, "modality", _means(x_nd, kinds_n), weights)


def cca(x_nd: Tensor, kinds_n: Tensor, pairs_by_kind: Pairs, shrinkage: float, r: int) -> Affine:
    """Canonical correlation analysis of texts and images, each canonical pair weighted by its
    correlation; items with both are regressed onto the image they are paired with.

    Whitened with covariances shrunk by `shrinkage`; `r` canonical dimensions are kept.
    """
    x = x_nd.double()
    text, image, both = 0, 1, 2
    a_nd, b_nd = _centred_pairs(x, pairs_by_kind[text])
    roots = {
        k: inverse_root(m.T @ m / (len(m) - 1), shrinkage) for k, m in ((text, a_nd), (image, b_nd))
    }
    cross_dd = roots[text] @ (a_nd.T @ b_nd) @ roots[image]
    u, s_d, vt = torch.linalg.svd(cross_dd)
    gain_r = (s_d[:r] / s_d[0]).sqrt()
    weights = [roots[text] @ u[:, :r] * gain_r, roots[image] @ vt[:r].T * gain_r]
    if both in pairs_by_kind:
        c_nd, target_nd = _centred_pairs(x, pairs_by_kind[both])
        weights.append(_ridge_weight(c_nd, target_nd @ weights[image], shrinkage))
    else:
        weights.append(weights[image])
    return affine("cca", "modality", _means(x_nd, kinds_n), weights)


def _ridge_weight(a_nd: Tensor, b_ne: Tensor, shrinkage: float) -> Tensor:
    """(d, e) that minimises |a W - b|^2 + penalty |W|^2, a and b centred."""
    eye = torch.eye(a_nd.shape[1], dtype=torch.float64)
    penalty = shrinkage * a_nd.pow(2).sum() / a_nd.shape[1]
    return torch.linalg.solve(a_nd.T @ a_nd + penalty * eye, a_nd.T @ b_ne)


def _means(x_nd: Tensor, kinds_n: Tensor) -> list[Tensor]:
    return [mean_of(x_nd, (kinds_n == kind).nonzero()[:, 0]) for kind in range(3)]


def _centred_pairs(x_nd: Tensor, pairs_n2: Tensor) -> tuple[Tensor, Tensor]:
    a_nd, b_nd = x_nd[pairs_n2[:, 0]], x_nd[pairs_n2[:, 1]]
    return a_nd - a_nd.mean(0), b_nd - b_nd.mean(0)
