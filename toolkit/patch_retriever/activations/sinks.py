"""Attention sinks: tokens whose activation is many times that of the others in their sequence.

Every real language model has them (the first token, often delimiters and some image tokens; Xiao
et al. 2023, arXiv 2309.17453), with nearly all of their norm in a few massive dimensions (Sun et
al. 2024, arXiv 2402.17762). They say nothing about an item and would dominate whatever is averaged
or fitted, so training, measurements and means leave them out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.backbones.roles import ROLES

if TYPE_CHECKING:
    from torch import Tensor

SINK_RATIO = 10.0
"""A token is a sink if its norm is above this many times the median norm of its sequence. After
layers 11 to 28 of SmolLM2-135M (of 30) sinks are 14.5 to 209 times the median and no other token is
above 3.1 times it (docs/sae.md). The median, unlike the mean, does not move with the sinks."""
FP16_LARGEST = 65_504.0
"""The largest number that float16 holds."""
FP16_NEAR = FP16_LARGEST / 4
"""From here on a warning is due: sums inside of a layer and longer items easily reach four times
what a few items show."""
MASSIVE_SHARE = 0.9
"""Massive dimensions are the fewest that hold this share of the sinks' energy ..."""
MASSIVE_MOST = 8
"""... but no more than this many: real models have one to four."""
_BINS_PER_OCTAVE = 64
"""Of the histograms that medians are read from: a bin is 1.1% wide."""


def token_norms(tokens_ntd: Tensor) -> Tensor:
    """Norms (n, t) in float32 at least: squares of float16 values above 255 are infinite."""
    dtype = torch.promote_types(tokens_ntd.dtype, torch.float32)
    return torch.linalg.vector_norm(tokens_ntd, dim=-1, dtype=dtype)


def sinks_nt(tokens_ntd: Tensor, mask_nt: Tensor) -> Tensor:
    """Which tokens are sinks, bool (n, t): those of a norm above `SINK_RATIO` times the median norm
    of their sequence's real tokens, and those that are not finite. Padding (where the mask is 0) is
    never one, whatever its activation, and counts in no median."""
    mask_nt = mask_nt.bool()
    norms_nt = token_norms(tokens_ntd)
    return _are_sinks(norms_nt, _medians(norms_nt, mask_nt), mask_nt)


def _medians(norms_nt: Tensor, mask_nt: Tensor) -> Tensor:
    """The median norm of every sequence's real tokens, (n, 1); the lower of two middle ones."""
    finite_nt = norms_nt.nan_to_num(torch.inf, torch.inf)
    return finite_nt.masked_fill(~mask_nt, torch.nan).nanmedian(1, keepdim=True).values


def _are_sinks(norms_nt: Tensor, median_n1: Tensor, mask_nt: Tensor) -> Tensor:
    return mask_nt & ((norms_nt > SINK_RATIO * median_n1) | ~norms_nt.isfinite())


@dataclass(frozen=True)
class SinkReport:
    """What was found of sinks at a site: how many, where, how large.

    Norms and ratios are of finite tokens, their medians to about 1%; `largest` is the largest
    absolute value in any of these tokens' activations.
    """

    items: int
    tokens: int
    sinks: int
    first: int
    """Sinks that are the first token of their sequence; the others are elsewhere."""
    by_role: dict[str, int]
    """Sinks of each token role."""
    not_finite: int
    """Tokens with an infinite activation or none: an overflow."""
    median_norm: float
    largest_norm: float
    median_ratio: float
    """Of the sinks: their norm against the median of their sequence; 0 where there are none."""
    largest_ratio: float
    massive: tuple[tuple[int, float], ...]
    """Dimensions that hold most of the sinks' energy, each with its share, the largest first."""
    largest: float

    @property
    def share(self) -> float:
        """Sinks as a share of all tokens."""
        return self.sinks / max(1, self.tokens)

    @property
    def warning(self) -> str | None:
        """One line where float16 overflows or is about to; None where all is well."""
        if self.not_finite:
            return (
                f"{self.not_finite:,} tokens have activations that are not finite: they overflow "
                "this dtype; load the model in bfloat16 or float32"
            )
        if self.largest >= FP16_NEAR:
            return (
                f"activations reach {self.largest:,.0f}, and float16 ends at {FP16_LARGEST:,.0f}: "
                "run this model in bfloat16 or float32"
            )
        return None

    def to_text(self) -> str:
        """One sentence, without the warning."""
        if not self.sinks:
            return "none found"
        elsewhere = self.sinks - self.first
        roles = ", ".join(f"{n:,} {role}" for role, n in self.by_role.items() if n)
        dimensions = ", ".join(str(number) for number, _ in self.massive)
        energy = sum(share for _, share in self.massive)
        text = (
            f"{self.sinks:,} of {self.tokens:,} tokens ({self.share:.2%}, "
            f"{self.sinks / max(1, self.items):.2f} an item): {self.first:,} first tokens and "
            f"{elsewhere:,} elsewhere; by role {roles}"
        )
        if self.largest_ratio:
            text += (
                f"; {self.median_ratio:.3g} times the median norm of their sequence, "
                f"{self.largest_ratio:.3g} at most; {energy:.0%} of their energy in "
                f"dimension{'s' if len(self.massive) > 1 else ''} {dimensions}"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "massive": [list(pair) for pair in self.massive]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SinkReport:
        """The inverse of `to_json`."""
        massive = tuple((int(number), float(share)) for number, share in values["massive"])
        return cls(**{**values, "massive": massive})


class SinkCounter:
    """Counts sinks batch by batch; its memory does not grow with the number of tokens.

    `state` and `from_state` carry it over a break, to the bit.
    """

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._largest = {"norm": 0.0, "ratio": 0.0, "value": 0.0}
        self._norms, self._ratios = _Histogram(), _Histogram()
        self._energy_d: Tensor | None = None

    def add(self, tokens_ntd: Tensor, mask_nt: Tensor, roles_nt: Tensor) -> Tensor:
        """Count a batch, whose token roles are numbers in `ROLES`; returns what `sinks_nt` does."""
        mask_nt = mask_nt.bool()
        norms_nt = token_norms(tokens_ntd)
        median_n1 = _medians(norms_nt, mask_nt)
        found_nt = _are_sinks(norms_nt, median_n1, mask_nt)
        finite_nt = mask_nt & norms_nt.isfinite()
        of_sinks_nt = found_nt & finite_nt
        self._count(mask_nt.cpu(), found_nt.cpu(), finite_nt.cpu(), roles_nt.cpu())
        least = torch.finfo(torch.float32).tiny  # a median of 0 makes no infinite ratio
        ratios_s = (norms_nt.double() / median_n1.clamp(min=least))[of_sinks_nt].cpu()
        values_t = torch.linalg.vector_norm(tokens_ntd, torch.inf, dim=-1)[finite_nt].cpu()
        for name, values in (
            ("norm", norms_nt[finite_nt]),
            ("ratio", ratios_s),
            ("value", values_t),
        ):
            if len(values):
                self._largest[name] = max(self._largest[name], float(values.max()))
        self._norms.add(norms_nt[finite_nt].cpu())
        self._ratios.add(ratios_s)
        if len(ratios_s):
            energy_d = tokens_ntd[of_sinks_nt].cpu().double().square().sum(0)
            self._energy_d = energy_d if self._energy_d is None else self._energy_d + energy_d
        return found_nt

    def _count(
        self, mask_nt: Tensor, found_nt: Tensor, finite_nt: Tensor, roles_nt: Tensor
    ) -> None:
        first_nt = mask_nt & (mask_nt.cumsum(1) == 1)
        counted = {
            "items": mask_nt.any(1),
            "tokens": mask_nt,
            "sinks": found_nt,
            "first": found_nt & first_nt,
            "not_finite": mask_nt & ~finite_nt,
            **{role: found_nt & (roles_nt == number) for number, role in enumerate(ROLES)},
        }
        self._numbers.update({name: int(which.sum()) for name, which in counted.items()})

    def report(self) -> SinkReport:
        """What was found so far."""
        return SinkReport(
            **{name: self._numbers[name] for name in _NUMBERS},
            by_role={role: self._numbers[role] for role in ROLES},
            median_norm=self._norms.median(),
            largest_norm=self._largest["norm"],
            median_ratio=self._ratios.median(),
            largest_ratio=self._largest["ratio"],
            massive=tuple(self._massive()),
            largest=self._largest["value"],
        )

    def _massive(self) -> Iterable[tuple[int, float]]:
        if self._energy_d is None:
            return
        shares_d = self._energy_d / self._energy_d.sum()
        held = 0.0
        for number in shares_d.argsort(descending=True, stable=True)[:MASSIVE_MOST].tolist():
            if held >= MASSIVE_SHARE:
                return
            held += float(shares_d[number])
            yield number, round(float(shares_d[number]), 4)

    def state(self) -> dict[str, Any]:
        """All that was counted, as JSON values."""
        return {
            "numbers": dict(self._numbers),
            "largest": dict(self._largest),
            "norms": self._norms.counts(),
            "ratios": self._ratios.counts(),
            "energy": None if self._energy_d is None else self._energy_d.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SinkCounter:
        """The counter that `state` was taken of."""
        counter = cls()
        counter._numbers.update(state["numbers"])
        counter._largest.update(state["largest"])
        counter._norms, counter._ratios = _Histogram(state["norms"]), _Histogram(state["ratios"])
        if state["energy"] is not None:
            counter._energy_d = torch.tensor(state["energy"], dtype=torch.float64)
        return counter


_NUMBERS = ("items", "tokens", "sinks", "first", "not_finite")


class _Histogram:
    """Positive numbers in bins of equal ratio, for a median that needs no list of them."""

    def __init__(self, counts: Iterable[tuple[int, int]] = ()) -> None:
        self._counts: Counter[int] = Counter(dict(counts))

    def add(self, values_n: Tensor) -> None:
        """Count some numbers; 0 counts as the least there is."""
        least = torch.finfo(torch.float32).tiny
        bins_n = (_BINS_PER_OCTAVE * values_n.double().clamp(min=least).log2()).floor().long()
        numbers, counts = bins_n.unique(return_counts=True)
        self._counts.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))

    def median(self) -> float:
        """The middle of the bin that holds the (lower) median; 0 of nothing."""
        left = (sum(self._counts.values()) + 1) // 2
        for number, count in self.counts():
            left -= count
            if left <= 0:
                return math.exp2((number + 0.5) / _BINS_PER_OCTAVE)
        return 0.0

    def counts(self) -> list[tuple[int, int]]:
        """Bins in order with how many numbers they hold."""
        return sorted(self._counts.items())
