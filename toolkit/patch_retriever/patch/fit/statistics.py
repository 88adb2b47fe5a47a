"""What the closed forms are made of: means, covariances and their spectra, each computed once.

Sums run over the vectors in chunks and in float64, so that no copy of all vectors is made; the
eigenvectors of a covariance serve every shrinkage and every rank. `device` is where the products
and decompositions are computed; what comes out of the fits lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patch_retriever.patch.operators import Affine, By

EPSILON = 1e-5
"""Added to variances before they are inverted (paper, Eq. 12)."""
RANK = 1e-10
"""Variance, as a share of the largest, below which nothing varies in a direction."""
CHUNK_FLOATS = 4_194_304
"""Numbers of a chunk of vectors (32 MiB in float64)."""


def fitting_device(device: torch.device) -> str:
    """Where closed forms are computed for a model on `device`: there if it is a CUDA device, which
    has float64 decompositions; else on the CPU."""
    return str(device) if device.type == "cuda" else "cpu"


@dataclass(frozen=True)
class Moments:
    """Mean, covariance and spectrum of some rows of `x_nd` (a row may occur more than once); of
    all rows where there are too few."""

    x_nd: Tensor
    rows_m: Tensor
    device: str = "cpu"

    @property
    def n(self) -> int:
        """Vectors that the moments are of."""
        return len(self.rows_m) if len(self.rows_m) > 1 else len(self.x_nd)

    def chunks(self) -> Iterator[Tensor]:
        """The vectors in float64, some at a time."""
        size = max(1, CHUNK_FLOATS // self.x_nd.shape[1])
        if len(self.rows_m) > 1:
            parts: Iterator[Tensor] = (self.x_nd[rows] for rows in self.rows_m.split(size))
        else:
            parts = iter(self.x_nd.split(size))
        return (part.to(self.device).double() for part in parts)

    @cached_property
    def mean_d(self) -> Tensor:
        """Mean, (d,)."""
        total_d = torch.zeros(self.x_nd.shape[1], dtype=torch.float64, device=self.device)
        for x_md in self.chunks():
            total_d += x_md.sum(0)
        return total_d / self.n

    @cached_property
    def covariance_dd(self) -> Tensor:
        """Covariance, (d, d)."""
        return cross_scatter(self, self) / (self.n - 1)

    @cached_property
    def scale(self) -> Tensor:
        """Mean variance of a dimension. Spectra are divided by it, so that `EPSILON` means the same
        at any scale of the activations; embeddings are normalised afterwards."""
        return self.covariance_dd.diagonal().mean().clamp(min=1e-30)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d,), ascending, and eigenvectors (d, d), in columns, of the covariance. That
        is not kept beside them, but its scale is."""
        values_d, vectors_dd = torch.linalg.eigh(self.covariance_dd)
        _ = self.scale  # computed while its covariance is there
        del self.__dict__["covariance_dd"]
        return values_d, vectors_dd

    @property
    def unit_spectrum(self) -> tuple[Tensor, Tensor]:
        """The same of the covariance scaled to mean variance one."""
        values_d, vectors_dd = self.spectrum
        return values_d / self.scale, vectors_dd

    def inverse_root(self, beta: float) -> Tensor:
        """(covariance of mean variance one, shrunk by `beta`, + eps)^-1/2, symmetric (ZCA)."""
        values_d, vectors_dd = self.unit_spectrum
        return vectors_dd * inverse_deviations((1 - beta) * values_d + beta) @ vectors_dd.T


def cross_scatter(a: Moments, b: Moments) -> Tensor:
    """Sum of (a_n - mean)^T (b_n - mean) over rows that belong together, (d, d)."""
    d = a.x_nd.shape[1]
    total_dd = torch.zeros(d, b.x_nd.shape[1], dtype=torch.float64, device=a.device)
    for a_md, b_md in zip(a.chunks(), b.chunks(), strict=True):
        total_dd.addmm_((a_md - a.mean_d).T, b_md - b.mean_d)
    return total_dd


@dataclass(frozen=True)
class Statistics:
    """What maps without pairs are fitted on: vectors, and the items of each group that `by` tells
    apart (`GROUPS[by]`). A group with too few items takes the moments of all."""

    x_nd: Tensor
    groups: Sequence[Tensor]
    by: By
    device: str = "cpu"

    @cached_property
    def moments(self) -> list[Moments]:
        """Of each group."""
        return [Moments(self.x_nd, rows_m, self.device) for rows_m in self.groups]


@dataclass(frozen=True)
class PairStatistics:
    """What alignments are fitted on: vectors of three kinds, and (item of that kind, image item)
    numbers (n, 2), by kind."""

    x_nd: Tensor
    kinds_n: Tensor
    pairs_by_kind: Mapping[int, Tensor]
    device: str = "cpu"

    @cached_property
    def means(self) -> list[Tensor]:
        """Of each kind, (d,)."""
        rows = [torch.eq(self.kinds_n, kind).nonzero()[:, 0] for kind in range(3)]
        return [Moments(self.x_nd, rows_m, self.device).mean_d for rows_m in rows]

    @cached_property
    def sides(self) -> dict[int, tuple[Moments, Moments]]:
        """By kind the moments of its pairs: of the items, and of the images."""
        return {
            kind: (
                Moments(self.x_nd, pairs_n2[:, 0], self.device),
                Moments(self.x_nd, pairs_n2[:, 1], self.device),
            )
            for kind, pairs_n2 in self.pairs_by_kind.items()
        }

    @cached_property
    def cross(self) -> dict[int, Tensor]:
        """By kind the sum over its pairs of centred item^T centred image, (d, d)."""
        return {kind: cross_scatter(*sides) for kind, sides in self.sides.items()}

    def eye(self) -> Tensor:
        """The identity (d, d)."""
        return torch.eye(self.x_nd.shape[1], dtype=torch.float64, device=self.device)


def inverse_deviations(variances_d: Tensor) -> Tensor:
    """(variance + eps)^-1/2, and 0 where nothing varies: fewer items than dimensions say nothing
    of the others, and a gain of eps^-1/2 would show noise there."""
    there_d = variances_d > RANK * variances_d.max()
    return torch.where(there_d, (variances_d.clamp(min=0) + EPSILON).rsqrt(), 0.0)


def affine(name: str, by: By, means: Sequence[Tensor], weights: Sequence[Tensor]) -> Affine:
    """(x - mean_g) W_g, as weights and biases in float32 on the CPU."""
    biases = [-mean_d @ weight_de for mean_d, weight_de in zip(means, weights, strict=True)]
    weight_gde, bias_ge = torch.stack(list(weights)), torch.stack(biases)
    return Affine(name, by, weight_gde.float().cpu(), bias_ge.float().cpu())
