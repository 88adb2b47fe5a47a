"""Sparse codes: the concepts' activations of many items, one compressed row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.sae.ops import starts_of, weighted_rows

_DENSE = 10
"""One in so many codes active makes a dense product of a batch the faster one."""


@dataclass(frozen=True)
class Codes:
    """A sparse matrix (n items, c concepts) in compressed rows: `starts_n1`, `concepts_e`,
    `values_e` with one entry e for every active concept of an item."""

    starts_n1: Tensor
    concepts_e: Tensor
    values_e: Tensor
    n_concepts: int

    @classmethod
    def from_dense(cls, codes_nc: Tensor) -> Codes:
        """The non-zero entries of a dense matrix."""
        rows_e, concepts_e = codes_nc.nonzero(as_tuple=True)
        return cls.from_entries(rows_e, concepts_e, codes_nc[rows_e, concepts_e], *codes_nc.shape)

    @classmethod
    def from_entries(
        cls, rows_e: Tensor, concepts_e: Tensor, values_e: Tensor, n: int, c: int
    ) -> Codes:
        """Entries in the order of their rows, as a matrix (n, c)."""
        return cls(starts_of(torch.bincount(rows_e, minlength=n)), concepts_e, values_e, c)

    @classmethod
    def stacked(cls, parts: Sequence[Codes]) -> Codes:
        """Several below each other."""
        offsets = torch.tensor([int(p.starts_n1[-1]) for p in parts]).cumsum(0)
        starts = [parts[0].starts_n1]
        starts += [p.starts_n1[1:] + o for p, o in zip(parts[1:], offsets, strict=False)]
        return cls(
            torch.cat(starts),
            torch.cat([p.concepts_e for p in parts]),
            torch.cat([p.values_e for p in parts]),
            parts[0].n_concepts,
        )

    @classmethod
    def from_batches(cls, batches: Sequence[tuple[Sequence[int], Codes]]) -> Codes:
        """From batches of (row numbers, their codes), in any order of rows."""
        numbers = [number for batch, _ in batches for number in batch]
        stacked = cls.stacked([codes for _, codes in batches])
        return stacked[torch.argsort(torch.tensor(numbers))]

    def __len__(self) -> int:
        return len(self.starts_n1) - 1

    def __getitem__(self, rows: Tensor) -> Codes:
        """The given rows, in the given order."""
        counts_n = self.active_n[rows]
        starts_n1 = starts_of(counts_n)
        shift_n = self.starts_n1[:-1][rows] - starts_n1[:-1]
        entries = torch.arange(int(starts_n1[-1]), device=rows.device) + shift_n.repeat_interleave(
            counts_n
        )
        return Codes(starts_n1, self.concepts_e[entries], self.values_e[entries], self.n_concepts)

    @property
    def active_n(self) -> Tensor:
        """How many concepts are active in every item, (n,)."""
        return self.starts_n1[1:] - self.starts_n1[:-1]

    @property
    def rows_e(self) -> Tensor:
        """The item of every entry."""
        active_n = self.active_n
        return torch.arange(len(self), device=active_n.device).repeat_interleave(active_n)

    def kept(self, keep_e: Tensor) -> Codes:
        """Only the entries where `keep_e` holds."""
        values_e, concepts_e = self.values_e[keep_e], self.concepts_e[keep_e]
        return Codes.from_entries(
            self.rows_e[keep_e], concepts_e, values_e, len(self), self.n_concepts
        )

    @property
    def l0(self) -> float:
        """Active concepts per item."""
        return len(self.values_e) / len(self)

    def of(self, concepts_m: Tensor) -> Codes:
        """The columns of some concepts alone, in their order: a matrix (n, m)."""
        place_c = torch.full((self.n_concepts,), -1, device=concepts_m.device)
        place_c[concepts_m] = torch.arange(len(concepts_m), device=concepts_m.device)
        place_e = place_c[self.concepts_e]
        kept_e = place_e >= 0
        starts_n1 = starts_of(kept_e)[self.starts_n1]  # of entries kept before each row
        entries = kept_e.nonzero()[:, 0]
        return Codes(starts_n1, place_e[entries], self.values_e[entries], len(concepts_m))

    def to(self, device: torch.device | str) -> Codes:
        """The same on a device."""
        entries = (self.starts_n1, self.concepts_e, self.values_e)
        starts_n1, concepts_e, values_e = (tensor.to(device) for tensor in entries)
        return Codes(starts_n1, concepts_e, values_e, self.n_concepts)

    def counts(self) -> Tensor:
        """How many items each concept is active in, (c,)."""
        return torch.bincount(self.concepts_e, minlength=self.n_concepts)

    def scaled(self, scale_c: Tensor) -> Codes:
        """Every concept's activations times its entry in `scale_c`."""
        # index_select: the backward pass of plain indexing adds in no fixed order on many threads
        values_e = self.values_e * scale_c.index_select(0, self.concepts_e)
        return Codes(self.starts_n1, self.concepts_e, values_e, self.n_concepts)

    def rows_scaled(self, scale_n: Tensor) -> Codes:
        """Every item's activations times its entry in `scale_n`."""
        values_e = self.values_e * scale_n[self.rows_e]
        return Codes(self.starts_n1, self.concepts_e, values_e, self.n_concepts)

    def sum(self) -> Tensor:
        """Sum over items, (c,)."""
        total_c = torch.zeros(self.n_concepts, dtype=torch.float64)
        return total_c.index_add_(0, self.concepts_e, self.values_e.double()).float()

    def mean(self) -> Tensor:
        """Mean over items, (c,)."""
        return self.sum() / max(len(self), 1)

    def matmul(self, dictionary_cd: Tensor) -> Tensor:
        """codes @ dictionary, (n, d), touching active entries only."""
        values_e = self.values_e.to(dictionary_cd.dtype)
        return weighted_rows(values_e, self.concepts_e, self.starts_n1[:-1], dictionary_cd)

    def weighted_matmul(self, weight_c: Tensor, dictionary_cd: Tensor) -> Tensor:
        """(codes * weights) @ dictionary, (n, d), differentiable in `weight_c`; of a batch.

        Where more than one in ten codes is active (means over many tokens) a dense product is
        faster than one through entries, and makes a matrix (n, c).
        """
        if len(self.values_e) > len(self) * self.n_concepts / _DENSE:
            return self.dense() @ (weight_c[:, None] * dictionary_cd)
        return self.scaled(weight_c).matmul(dictionary_cd)

    def transposed(self) -> Codes:
        """The matrix (c, n): a row for every concept, with the items that it is active in."""
        order_e = self.concepts_e.argsort(stable=True)
        rows_e, values_e = self.rows_e[order_e], self.values_e[order_e]
        return Codes(starts_of(self.counts()), rows_e, values_e, len(self))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Concepts and activations of every item, each (n, k), k those of the fullest item.

        Places that an item leaves over hold concept 0 with activation 0.
        """
        k = int(self.active_n.max())
        held_nk = torch.arange(k) < self.active_n[:, None]
        concepts_nk = torch.zeros(len(self), k, dtype=torch.long)
        values_nk = torch.zeros(len(self), k)
        concepts_nk[held_nk], values_nk[held_nk] = self.concepts_e, self.values_e
        return concepts_nk, values_nk

    def dense(self) -> Tensor:
        """As a dense matrix (n, c)."""
        out_nc = self.values_e.new_zeros(len(self), self.n_concepts)
        out_nc[self.rows_e, self.concepts_e] = self.values_e
        return out_nc
