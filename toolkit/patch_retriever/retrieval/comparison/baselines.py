"""Plain corrections that any embedder can have without training: centring and ReAlign.

Two kinds, kept apart by name. *Deployable*: statistics of calibration items, of each side and each
kind of item by itself. *Transductive*: statistics of the test queries and of the test candidates
themselves, as the code of the paper takes them (arXiv 2512.19115); no search system knows its
queries beforehand, so these are no fair rival, only what the paper's numbers have to be compared
with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patch_retriever.items import KINDS
from patch_retriever.patch import fit
from patch_retriever.patch.operators import Affine
from patch_retriever.retrieval.vectors import Vectors, chunks

BETA = 0.1
"""ReAlign's shrinkage, as in the paper."""
MOST = 50_000
"""Items that statistics are taken of; of more, this many drawn at random."""

Fit = Callable[[fit.Statistics], Affine]


@dataclass(frozen=True)
class Baseline:
    """A correction, and whether its statistics are those of the test items themselves."""

    name: str
    fit: Fit
    transductive: bool

    @property
    def needs(self) -> str:
        """What it is fitted on, in words."""
        if self.transductive:
            return "the test items themselves (transductive, as the paper's code does)"
        return "unpaired items (calibration)"


def baselines(with_calibration: bool) -> list[Baseline]:
    """All of them; the deployable ones only where there is something to calibrate on."""
    fits: dict[str, Fit] = {
        "centring": fit.centre,
        f"ReAlign {BETA:g}": lambda statistics: fit.realign(statistics, BETA),
    }
    sources = (False, True) if with_calibration else (True,)
    return [
        Baseline(
            f"{name}, {'transductive' if transductive else 'calibrated'}", fitted, transductive
        )
        for transductive in sources
        for name, fitted in fits.items()
    ]


class MappedVectors:
    """Other vectors, each kind through its group of an affine map, and normalised."""

    def __init__(self, vectors: Vectors, step: Affine, kinds_n: NDArray[np.int8]) -> None:
        self._vectors = vectors
        self._weight_gde, self._bias_ge = step.weight_gde.numpy(), step.bias_ge.numpy()
        self._group_n = np.array([step.group(0, kind) for kind in range(3)])[kinds_n]

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        x_nd, group_n = self._vectors[rows], self._group_n[rows]
        out_ne = np.empty((len(x_nd), self._bias_ge.shape[1]), dtype=np.float32)
        for group in np.unique(group_n):
            mine = group_n == group
            out_ne[mine] = x_nd[mine] @ self._weight_gde[group] + self._bias_ge[group]
        return out_ne / np.maximum(np.linalg.norm(out_ne, axis=1, keepdims=True), 1e-12)


def sample(vectors: Vectors, seed: int = 0) -> NDArray[np.int64]:
    """Row numbers of at most `MOST` vectors, ascending."""
    n = len(vectors)
    if n <= MOST:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, MOST, replace=False))


def calibrated(
    baseline: Baseline,
    known: tuple[Vectors, NDArray[np.int8]],
    test: tuple[Vectors, NDArray[np.int8]],
) -> Vectors:
    """One side of a task (its vectors, their kinds), corrected by the statistics of each kind
    among `known` ones."""
    rows = sample(known[0])
    x_nd = torch.from_numpy(np.concatenate(list(chunks(known[0], rows))))
    kinds = torch.from_numpy(known[1][rows])
    groups = [(kinds == kind).nonzero()[:, 0] for kind in range(len(KINDS))]
    return MappedVectors(test[0], baseline.fit(fit.Statistics(x_nd, groups, "modality")), test[1])


def transductive(baseline: Baseline, test: tuple[Vectors, NDArray[np.int8]]) -> Vectors:
    """One side of a task, corrected by its own statistics, whatever the kinds of its items."""
    x_nd = torch.from_numpy(np.concatenate(list(chunks(test[0], sample(test[0])))))
    return MappedVectors(
        test[0], baseline.fit(fit.Statistics(x_nd, [torch.arange(len(x_nd))], "all")), test[1]
    )
