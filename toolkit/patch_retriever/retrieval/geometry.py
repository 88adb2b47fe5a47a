"""Geometry of a space of embeddings, and what it does to what searches show.

All are over unit vectors. `Vectors` are read a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patch_retriever.items import KINDS, Item
from patch_retriever.retrieval.ranking import NOTHING
from patch_retriever.retrieval.vectors import Vectors

_CHUNK = 32768
PAIRS_OF = 4096
"""Vectors of which all pairs are looked at for uniformity; of more, this many drawn at random."""


@dataclass(frozen=True)
class Moments:
    """How many vectors of each kind (in the order of `KINDS`) and their sums (3, d), float64."""

    count_k: NDArray[np.int64]
    sum_kd: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: Vectors, kinds_n: NDArray[np.int8]) -> Moments:
        """Read the vectors once; `kinds_n` are numbers in `KINDS`."""
        sum_kd: NDArray[np.float64] | None = None
        for start, chunk_nd in _chunks(vectors):
            member_nk = kinds_n[start : start + len(chunk_nd), None] == np.arange(len(KINDS))
            part_kd = member_nk.T.astype(np.float64) @ chunk_nd.astype(np.float64)
            sum_kd = part_kd if sum_kd is None else sum_kd + part_kd
        if sum_kd is None:
            raise ValueError("no vectors")
        return cls(np.bincount(kinds_n, minlength=len(KINDS)), sum_kd)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count_k + other.count_k, self.sum_kd + other.sum_kd)

    @property
    def anisotropy(self) -> float:
        """Mean cosine of two different vectors (Ethayarajh 2019), over all pairs exactly:
        (|sum u|^2 - n) / (n (n - 1)); nan of fewer than two."""
        n = int(self.count_k.sum())
        if n < 2:
            return float("nan")
        sum_d = self.sum_kd.sum(0)
        return float((sum_d @ sum_d - n) / (n * (n - 1)))

    def gap(self, one: str, other: str) -> float:
        """Modality gap of two kinds, |mean_one - mean_other| (Liang et al. 2022, arXiv
        2203.02053, section 4.2); nan where one is missing."""
        a, b = (KINDS.index(kind) for kind in (one, other))
        if not (self.count_k[a] and self.count_k[b]):
            return float("nan")
        means = [self.sum_kd[i] / self.count_k[i] for i in (a, b)]
        return float(np.linalg.norm(means[0] - means[1]))

    def gaps(self) -> dict[str, float]:
        """The gaps of all kinds that are there, by "text, image" and so on."""
        there = [kind for kind, count in zip(KINDS, self.count_k, strict=True) if count]
        return {f"{a}, {b}": self.gap(a, b) for i, a in enumerate(there) for b in there[i + 1 :]}


def uniformity(vectors: Vectors, seed: int = 0) -> float:
    """log mean over pairs of exp(-2 |u - v|^2) (Wang & Isola 2020, arXiv 2005.10242, Eq. 3):
    lower is more uniform. Over all pairs of up to `PAIRS_OF` vectors, else of a random part."""
    n = len(vectors)
    if n < 2:
        return float("nan")
    rows_m = np.arange(n)
    if n > PAIRS_OF:
        rows_m = np.sort(np.random.default_rng(seed).choice(n, PAIRS_OF, replace=False))
    some_md = vectors[rows_m].astype(np.float64)
    m, total = len(some_md), 0.0
    for start in range(0, m, 512):
        cosines = some_md[start : start + 512] @ some_md.T
        total += float(np.exp(-2 * (2 - 2 * cosines)).sum())
    return float(np.log(max(total - m, 1e-300) / (m * (m - 1))))  # without each with itself


def alignment(
    queries_qd: NDArray[np.float32], candidates: Vectors, pairs_n2: NDArray[np.int64]
) -> float:
    """Mean |u - v|^2 of positive pairs (Wang & Isola 2020, Eq. 2, alpha 2): lower is closer.

    `pairs_n2` are (query number, candidate number).
    """
    if not len(pairs_n2):
        return float("nan")
    total = 0.0
    for start in range(0, len(pairs_n2), _CHUNK):
        q, c = pairs_n2[start : start + _CHUNK].T
        difference = queries_qd[q].astype(np.float64) - candidates[c]
        total += float((difference**2).sum())
    return total / len(pairs_n2)


@dataclass(frozen=True)
class Hubness:
    """How unevenly candidates are shown among the first k.

    `skew` is the skewness of N_k, how often each candidate is shown (Radovanovic et al. 2010, JMLR
    11:2487); `never` the share of candidates that are never shown.
    """

    skew: float
    never: float

    @classmethod
    def of(cls, found_qk: NDArray[np.int64], n_candidates: int) -> Hubness:
        """From the candidates shown to every query."""
        shown_n = np.bincount(found_qk[found_qk != NOTHING], minlength=n_candidates)
        centred_n = shown_n - shown_n.mean()
        spread = float(np.sqrt((centred_n**2).mean()))
        skew = float((centred_n**3).mean()) / spread**3 if spread else 0.0
        return cls(skew, float((shown_n == 0).mean()))


def modality_share(
    found_qk: NDArray[np.int64],
    query_kinds_q: NDArray[np.int8],
    candidate_kinds_n: NDArray[np.int8],
) -> dict[str, dict[str, float]]:
    """The share of each kind among the candidates shown, by kind of query, and in the "pool"."""
    out = {"pool": _shares(candidate_kinds_n)}
    for number, kind in enumerate(KINDS):
        found = found_qk[query_kinds_q == number]
        if found.size:
            out[kind] = _shares(candidate_kinds_n[found[found != NOTHING]])
    return out


def _shares(kinds_n: NDArray[np.int8]) -> dict[str, float]:
    counts = np.bincount(kinds_n, minlength=len(KINDS)) / max(len(kinds_n), 1)
    return dict(zip(KINDS, counts.tolist(), strict=True))


def kinds_of(items: Sequence[Item], direction: str = "") -> NDArray[np.int8]:
    """The kind of every item as its number in `KINDS`, int8 (n,); items are not made where one
    side of a `direction` ("t", "i" or "it") says it."""
    known = {"t": 0, "i": 1, "it": 2}
    if direction in known:
        return np.full(len(items), known[direction], dtype=np.int8)
    return np.array([KINDS.index(item.kind) for item in items], dtype=np.int8)


def _chunks(vectors: Vectors) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, len(vectors), _CHUNK):
        yield start, vectors[start : start + _CHUNK]
