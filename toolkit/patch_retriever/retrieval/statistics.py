"""Whether one model is better than another: paired tests over the same queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
FLIPS = 10_000
_AT_ONCE = 1 << 22
"""Numbers drawn in one go, so that memory does not grow with the queries."""

_MANY = 8
"""Queries that differ by the same, above which they are flipped together."""


@dataclass(frozen=True)
class Difference:
    """A mean difference with the bounds of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


class Resamples:
    """Paired bootstrap over queries (percentile; Efron 1979): every comparison sees the same draws.

    Queries are drawn with replacement inside each task; an average over tasks weighs tasks
    equally.
    """

    def __init__(self, queries_by_task: Mapping[str, int], seed: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(seed)
        self._counts_qr = {
            name: np.ascontiguousarray(_multinomial(rng, n, draws).T)
            for name, n in queries_by_task.items()
        }

    def interval(self, deltas: Mapping[str, NDArray[np.float64]]) -> Difference:
        """The mean over tasks of the mean over queries of `deltas[task]` (q,), with an interval."""
        draws_r = self.draws(deltas)
        low, high = np.quantile(draws_r, (0.025, 0.975))
        mean = float(np.mean([delta_q.mean() for delta_q in deltas.values()]))
        return Difference(mean, float(low), float(high))

    def draws(self, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The mean over tasks of the mean over queries of `values[task]` (q,) in every draw."""
        return np.mean([self._means(name, value_q) for name, value_q in values.items()], axis=0)

    def _means(self, name: str, delta_q: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean of every draw, (draws,).

        Of the queries that differ alone, and by einsum: BLAS would use threads, which for products
        of this size wait for each other longer than they work.
        """
        counts_qr = self._counts_qr[name]
        (differ_d,) = delta_q.nonzero()
        total_r = np.zeros(counts_qr.shape[1])
        step = max(1, _AT_ONCE // len(total_r))
        for start in range(0, len(differ_d), step):
            some_d = differ_d[start : start + step]
            total_r += np.einsum("d,dr->r", delta_q[some_d], counts_qr[some_d])
        return total_r / len(delta_q)


def _multinomial(rng: np.random.Generator, n: int, draws: int) -> NDArray[np.uint8]:
    """How often each query is drawn, (draws, n): a byte each, since more than 255 never happens."""
    step = max(1, _AT_ONCE // n)
    share_n = np.full(n, 1 / n)
    return np.concatenate(
        [
            rng.multinomial(n, share_n, size=min(step, draws - start)).clip(max=255).astype("u1")
            for start in range(0, draws, step)
        ]
    )


def sign_flip_p(deltas: Mapping[str, NDArray[np.float64]], seed: int, flips: int = FLIPS) -> float:
    """Two-sided p of a paired permutation test (Fisher's sign flips) of the mean over tasks.

    Where nothing differs between two models, a query's difference is as likely to be -delta as
    delta. All 2^m sign patterns of the m queries that differ are counted if they are no more than
    `flips`; else `flips` random ones, p = (1 + as extreme) / (1 + flips) (Phipson & Smyth 2010).
    """
    parts = [delta_q / len(delta_q) / len(deltas) for delta_q in deltas.values()]
    delta_n = np.concatenate(parts)
    size_m = np.abs(delta_n[delta_n != 0])
    if len(size_m) == 0:
        return 1.0
    # as far from zero as found, but for rounding
    far = abs(delta_n.sum()) - 1e-12 * size_m.sum()
    if 2 ** min(len(size_m), 63) <= flips:
        sums = np.zeros(1)
        for size in size_m:
            sums = np.concatenate([sums - size, sums + size])
        return float((np.abs(sums) >= far).mean())
    # of many queries that differ by the same, only how many are flipped matters
    sizes_u, counts_u = np.unique(size_m, return_counts=True)
    many = counts_u > _MANY
    single_s, sizes_u, counts_u = (
        np.repeat(sizes_u[~many], counts_u[~many]),
        sizes_u[many],
        counts_u[many],
    )
    rng, extreme = np.random.default_rng(seed), 0
    step = max(1, _AT_ONCE // (len(single_s) + len(sizes_u)))
    for start in range(0, flips, step):
        n = min(step, flips - start)
        alike_fu = 2.0 * rng.binomial(counts_u, 0.5, (n, len(sizes_u))) - counts_u
        sums = alike_fu @ sizes_u + _signs(rng, n, len(single_s)) @ single_s
        extreme += int((np.abs(sums) >= far).sum())
    return (1 + extreme) / (1 + flips)


def _signs(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float64]:
    """Random -1 and 1, a bit of randomness each."""
    count = rows * columns
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), np.uint8), count=count)
    return 2 * bits.reshape(rows, columns).astype(np.float64) - 1


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979): the i-th smallest of m times m - i + 1,
    never below a smaller one's."""
    p_m = np.asarray(p_values, dtype=np.float64)
    order_m = np.argsort(p_m, kind="stable")
    stepped_m = np.maximum.accumulate(p_m[order_m] * np.arange(len(p_m), 0, -1))
    out_m = np.empty_like(p_m)
    out_m[order_m] = np.minimum(stepped_m, 1)
    return out_m.tolist()


@dataclass(frozen=True)
class Tally:
    """Queries that the first of two models answers better, worse, and as well as the other."""

    won: int
    lost: int
    tied: int

    @classmethod
    def of(cls, delta_q: NDArray[np.float64]) -> Tally:
        """Count differences; those within rounding are ties."""
        won, lost = int((delta_q > 1e-12).sum()), int((delta_q < -1e-12).sum())
        return cls(won, lost, len(delta_q) - won - lost)
