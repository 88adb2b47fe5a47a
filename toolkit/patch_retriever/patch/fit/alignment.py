"""Alignments from pairs, in closed form: each kind is mapped onto the images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patch_retriever.patch.fit.decomposition import svd
from patch_retriever.patch.fit.statistics import PairStatistics, affine
from patch_retriever.patch.operators import Affine


def procrustes(pairs: PairStatistics) -> Affine:
    """Each kind turned onto the images by the rotation that fits its pairs best.

    R = U V^T of the SVD of the centred cross-covariance (orthogonal Procrustes, Schoenemann 1966).
    A kind without pairs is only centred.
    """

    def rotation(kind: int) -> Tensor:
        u, _, vt = svd(pairs.cross[kind])
        return u @ vt

    return _onto_images("procrustes", pairs, rotation)


def ridge(pairs: PairStatistics, shrinkage: float) -> Affine:
    """Each kind mapped onto the images by ridge regression from its pairs.

    W minimises |A W - B|^2 + penalty |W|^2 with penalty = `shrinkage` tr(A^T A) / d, A and B the
    centred pairs. A kind without pairs is only centred.
    """

    def regression(kind: int) -> Tensor:
        return _ridge_weight(pairs, kind, pairs.cross[kind], shrinkage)

    return _onto_images(f"ridge {shrinkage:g}", pairs, regression)


def _onto_images(name: str, pairs: PairStatistics, weight: Callable[[int], Tensor]) -> Affine:
    """Each kind less its mean, times what `weight` makes of its pairs."""
    weights = [weight(kind) if kind in pairs.sides else pairs.eye() for kind in range(3)]
    return affine(name, "modality", pairs.means, weights)


def cca(pairs: PairStatistics, shrinkage: float, r: int) -> Affine:
    """Canonical correlation analysis of texts and images, each canonical pair weighted by its
    correlation; items with both are regressed onto the image they are paired with.

    Whitened with covariances shrunk by `shrinkage`; `r` canonical dimensions are kept.
    """
    text, both = 0, 2
    text_root, image_root = (side.inverse_root(shrinkage) for side in pairs.sides[text])
    u, s_d, vt = svd(text_root @ pairs.cross[text] @ image_root)
    gain_r = (s_d[:r] / s_d[0]).sqrt()
    weights = [text_root @ u[:, :r] * gain_r, image_root @ vt[:r].T * gain_r]
    if both in pairs.sides:
        weights.append(_ridge_weight(pairs, both, pairs.cross[both] @ weights[1], shrinkage))
    else:
        weights.append(weights[1])
    return affine("cca", "modality", pairs.means, weights)


def _ridge_weight(
    pairs: PairStatistics, kind: int, products_de: Tensor, shrinkage: float
) -> Tensor:
    """(d, e) that minimises |A W - B|^2 + penalty |W|^2, A the kind's centred items and
    `products_de` A^T B."""
    moments = pairs.sides[kind][0]
    scatter_dd = moments.covariance_dd * (moments.n - 1)
    penalty = shrinkage * scatter_dd.diagonal().mean()
    return torch.linalg.solve(scatter_dd + penalty * pairs.eye(), products_de)
