"""Whitening as the paper's code does it: of one side at a time, by that side's own statistics.

Vectors come in with length one, which is why `EPSILON` matters: it is added to variances that sum
to less than one. The package's own ReAlign (`patch.fit.realign`) first scales them to mean one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patch_retriever.patch.fit.statistics import affine
from patch_retriever.patch.operators import Affine
from patch_retriever.retrieval.vectors import Vectors, chunks

ALPHA = 0.1
"""Shrinkage, hard-coded in the official code."""
EPSILON = 1e-5


@dataclass(frozen=True)
class Spectrum:
    """Mean, and eigenvalues (ascending) and eigenvectors (columns) of the covariance of some
    vectors, in float64."""

    mean_d: Tensor
    values_d: Tensor
    vectors_dd: Tensor

    @classmethod
    def of(cls, *sides: Vectors, device: str = "cpu") -> Spectrum:
        """Read every side twice, a chunk at a time; several are centred each by itself."""
        parts = [_moments(vectors, device) for vectors in sides]
        n = sum(len(vectors) for vectors in sides)
        covariance_dd = sum(scatter_dd for _, scatter_dd in parts) / max(n - 1, 1)
        values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
        return cls(parts[0][0].cpu(), values_d.clamp(min=0).cpu(), vectors_dd.cpu())

    def centre(self) -> Affine:
        """x - mean."""
        eye_dd = torch.eye(len(self.mean_d), dtype=torch.float64)
        return affine("centring", "all", [self.mean_d], [eye_dd])

    def whiten(self, alpha: float = ALPHA) -> Affine:
        """(x - mean) U (Lambda + eps)^-1/2 U^T of the shrunk covariance: ReAlign, and ZCA for an
        `alpha` of 0."""
        weight_dd = self.vectors_dd * self._scales(alpha) @ self.vectors_dd.T
        return affine(f"whitening {alpha:g}", "all", [self.mean_d], [weight_dd])

    def whiten_pca(self, mean_d: Tensor | None = None) -> Affine:
        """(x - mean) U (Lambda + eps)^-1/2, all components; the largest entry of each is positive,
        so that two sides' components at least agree in sign. Another `mean_d` for vectors that
        share the axes alone."""
        largest_1d = self.vectors_dd.abs().argmax(0, keepdim=True)
        signed_dd = self.vectors_dd * self.vectors_dd.gather(0, largest_1d).sign()
        mean_d = self.mean_d if mean_d is None else mean_d
        return affine("PCA whitening", "all", [mean_d], [signed_dd * self._scales(0)])

    def _scales(self, alpha: float) -> Tensor:
        shrunk_d = (1 - alpha) * self.values_d + alpha * self.values_d.mean()
        return (shrunk_d + EPSILON).rsqrt()


def _moments(vectors: Vectors, device: str) -> tuple[Tensor, Tensor]:
    """Mean (d,) and sum of (x - mean)^T (x - mean), (d, d); products in float32."""
    everything = range(len(vectors))
    sums = [torch.from_numpy(x_nd.sum(0, dtype=np.float64)) for x_nd in chunks(vectors, everything)]
    mean_d = torch.stack(sums).sum(0) / len(vectors)
    scatter_dd = torch.zeros(len(mean_d), len(mean_d), dtype=torch.float64, device=device)
    for x_nd in chunks(vectors, everything):
        centred_nd = (torch.tensor(x_nd).double() - mean_d).float().to(device)
        scatter_dd += (centred_nd.T @ centred_nd).double()
    return mean_d, scatter_dd
