"""Fitting the affine operators: statistics from calibration vectors, closed forms only.

Every function takes the vectors `x_nd` as they are where the operator will stand, and `groups`:
the item numbers of each group that the operator tells apart (`GROUPS[by]`). A group with too few
items takes the statistics of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patch_retriever.patch.operators import Affine, By, Gate

EPSILON = 1e-5
"""Added to eigenvalues before they are inverted (paper, Eq. 12)."""


def _moments(x_nd: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of some rows, in float64."""
    x = (x_nd[rows] if len(rows) > 1 else x_nd).double()
    mean_d = x.mean(0)
    centred_nd = x - mean_d
    return mean_d, centred_nd.T @ centred_nd / (len(x) - 1)


def _affine(name: str, by: By, means: Sequence[Tensor], weights: Sequence[Tensor]) -> Affine:
    """(x - mean_g) W_g, as weights and biases in float32."""
    biases = [-mean_d @ weight_de for mean_d, weight_de in zip(means, weights, strict=True)]
    return Affine(name, by, torch.stack(list(weights)).float(), torch.stack(biases).float())


def centre(x_nd: Tensor, groups: Sequence[Tensor], by: By) -> Affine:
    """x - mean of the item's group."""
    means = [_moments(x_nd, rows)[0] for rows in groups]
    eye = torch.eye(x_nd.shape[1], dtype=torch.float64)
    return _affine("centre", by, means, [eye] * len(means))


def all_but_the_top(x_nd: Tensor, groups: Sequence[Tensor], by: By, r: int) -> Affine:
    """(x - mean) without its first `r` principal components (Mu & Viswanath, arXiv 1702.01417)."""
    means, weights = [], []
    for rows in groups:
        mean_d, covariance_dd = _moments(x_nd, rows)
        top_dr = torch.linalg.eigh(covariance_dd).eigenvectors[:, -r:]
        means.append(mean_d)
        weights.append(torch.eye(len(mean_d), dtype=torch.float64) - top_dr @ top_dr.T)
    return _affine("all-but-the-top", by, means, weights)


def remove_subspace(directions_md: Tensor, r: int | None = None) -> Affine:
    """x - V V^T x, V the first `r` right singular vectors of `directions_md` (paper, Eq. 8-10)."""
    _, _, vt = torch.linalg.svd(directions_md.double(), full_matrices=False)
    v_rd = vt[: r or len(vt)]
    weight_dd = torch.eye(v_rd.shape[1], dtype=torch.float64) - v_rd.T @ v_rd
    return _affine("remove-subspace", "all", [torch.zeros(v_rd.shape[1]).double()], [weight_dd])


def realign(x_nd: Tensor, groups: Sequence[Tensor], by: By, beta: float) -> Affine:
    """ReAlign: (x - mu) U (Lambda + eps)^-1/2 U^T of the shrunk covariance (paper, Eq. 11-12).

    The covariance is scaled to mean variance one first, so that `EPSILON` means the same at any
    scale of the activations; embeddings are normalised afterwards, so the scale does not matter.
    """
    means, weights = [], []
    for rows in groups:
        mean_d, covariance_dd = _moments(x_nd, rows)
        weights.append(_inverse_root(covariance_dd, beta))
        means.append(mean_d)
    return _affine(f"realign {beta:g}", by, means, weights)


def _inverse_root(covariance_dd: Tensor, beta: float) -> Tensor:
    """(shrunk covariance + eps)^-1/2, symmetric (ZCA)."""
    d = len(covariance_dd)
    eye = torch.eye(d, dtype=torch.float64)
    scaled_dd = covariance_dd / (covariance_dd.trace() / d).clamp(min=1e-30)
    values_d, vectors_dd = torch.linalg.eigh((1 - beta) * scaled_dd + beta * eye)
    return vectors_dd * (values_d.clamp(min=0) + EPSILON).rsqrt() @ vectors_dd.T


def principal_gains(x_nd: Tensor, gains_d: Tensor, vectors_dd: Tensor) -> Affine:
    """x V diag(g) V^T: a gain for every principal component (the columns of `vectors_dd`)."""
    weight_dd = (vectors_dd * gains_d) @ vectors_dd.T
    zero_d = torch.zeros(x_nd.shape[1], dtype=torch.float64)
    return _affine("principal gains", "all", [zero_d], [weight_dd.double()])


def procrustes(x_nd: Tensor, kinds_n: Tensor, pairs_by_kind: dict[int, Tensor]) -> Affine:
    """Each kind turned onto the images by the rotation that fits its pairs best.

    `pairs_by_kind[kind]` are (item of that kind, image item) numbers. R = U V^T of the SVD of the
    centred cross-covariance (orthogonal Procrustes, Schoenemann 1966). A kind without pairs is
    only centred.
    """
    means, weights = [], []
    x = x_nd.double()
    for kind in range(3):
        rows = (kinds_n == kind).nonzero()[:, 0]
        mean_d, _ = _moments(x_nd, rows)
        weight_dd = torch.eye(x.shape[1], dtype=torch.float64)
        if kind in pairs_by_kind:
            a_nd, b_nd = _centred_pairs(x, pairs_by_kind[kind])
            u, _, vt = torch.linalg.svd(a_nd.T @ b_nd)
            weight_dd = u @ vt
        means.append(mean_d)
        weights.append(weight_dd)
    return _affine("procrustes", "modality", means, weights)


def cca(
    x_nd: Tensor, kinds_n: Tensor, pairs_by_kind: dict[int, Tensor], shrinkage: float, r: int
) -> Affine:
    """Canonical correlation analysis of texts and images, each canonical pair weighted by its
    correlation; items with both are regressed onto the image they are paired with.

    Whitened with covariances shrunk by `shrinkage`; `r` canonical dimensions are kept.
    """
    x = x_nd.double()
    text, image = 0, 1
    a_nd, b_nd = _centred_pairs(x, pairs_by_kind[text])
    roots = {
        k: _inverse_root(m.T @ m / (len(m) - 1), shrinkage)
        for k, m in ((text, a_nd), (image, b_nd))
    }
    cross_dd = roots[text] @ (a_nd.T @ b_nd) @ roots[image]
    u, s_d, vt = torch.linalg.svd(cross_dd)
    gain_r = (s_d[:r] / s_d[0]).sqrt()
    weights = {text: roots[text] @ u[:, :r] * gain_r, image: roots[image] @ vt[:r].T * gain_r}
    means = {k: _moments(x_nd, (kinds_n == k).nonzero()[:, 0])[0] for k in range(3)}
    both = 2
    if both in pairs_by_kind:
        c_nd, target_nd = _centred_pairs(x, pairs_by_kind[both])
        ridge = shrinkage * c_nd.pow(2).sum() / c_nd.shape[1] * torch.eye(c_nd.shape[1]).double()
        weights[both] = torch.linalg.solve(
            c_nd.T @ c_nd + ridge, c_nd.T @ (target_nd @ weights[image])
        )
    else:
        weights[both] = weights[image]
    return _affine("cca", "modality", [means[k] for k in range(3)], [weights[k] for k in range(3)])


def _centred_pairs(x_nd: Tensor, pairs_n2: Tensor) -> tuple[Tensor, Tensor]:
    a_nd, b_nd = x_nd[pairs_n2[:, 0]], x_nd[pairs_n2[:, 1]]
    return a_nd - a_nd.mean(0), b_nd - b_nd.mean(0)


def fit_gate(mean_nd: Tensor, kinds_n: Tensor) -> Gate | None:
    """The two hyperplanes between kinds (linear support vector machines), or None.

    None where some calibration item lies on the wrong side: statistics per modality cannot be
    exported exactly then. A kind that does not occur is never chosen.
    """
    from sklearn.svm import LinearSVC

    x_nd = mean_nd.double()
    mean_d = x_nd.mean(0)
    scale = (x_nd - mean_d).pow(2).mean().sqrt().clamp(min=1e-30)
    z = ((x_nd - mean_d) / scale).numpy()
    directions, offsets, margin = [], [], float("inf")
    for kind in (1, 2):
        positive_n = (kinds_n >= kind).numpy()
        if positive_n.all() or not positive_n.any():
            directions.append(torch.zeros(x_nd.shape[1]).double())
            offsets.append(torch.tensor(1.0 if positive_n.all() else -1.0).double())
            continue
        machine = LinearSVC(C=1.0, tol=1e-6, max_iter=20_000, random_state=0).fit(z, positive_n)
        direction_d = torch.from_numpy(machine.coef_[0]) / scale
        offset = torch.tensor(float(machine.intercept_[0])) - direction_d @ mean_d
        signed_n = (x_nd @ direction_d + offset) * torch.where(torch.from_numpy(positive_n), 1, -1)
        if float(signed_n.min()) <= 0:
            return None
        margin = min(margin, float(signed_n.min() / signed_n.mean()))
        # one unit from the hyperplane to the closest calibration item
        directions.append(direction_d / signed_n.min())
        offsets.append(offset / signed_n.min())
    return Gate(torch.stack(directions).float(), torch.stack(offsets).float(), margin)
