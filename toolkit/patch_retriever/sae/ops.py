"""Sparse operations: everything that an SAE computes beyond one product, through its active codes.

A *code entry* e says that the concept `concepts_e[e]` is active in the row `rows_e[e]`. With k
entries a token, width d and c concepts, a training step then costs 2cd + 8kd operations a token
(one product to select, and four passes over the k active rows of the weights) where dense
autograd costs 10cd to 12cd. Nothing of the size of all pre-activations is ever kept: they live
one chunk of tokens at a time.

On a CPU and on CUDA these are torch's own kernels: `embedding_bag` sums weighted rows (fbgemm on
a CPU), and its backward pass to the weights of a sum gives the sampled products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 512
"""Tokens whose pre-activations are alive at a time."""


def weighted_rows(values_e: Tensor, index_e: Tensor, starts_r: Tensor, table_td: Tensor) -> Tensor:
    """Sums of weighted rows of a table: out[r] = sum of values_e[e] * table[index_e[e]], (r, d).

    Row r owns the entries from `starts_r[r]` up to the next row's start (the last: to the end).
    Differentiable in `values_e` and `table_td`.
    """
    return torch.nn.functional.embedding_bag(
        index_e, table_td, starts_r, per_sample_weights=values_e, mode="sum"
    )


def sampled_products(a_nd: Tensor, b_cd: Tensor, rows_e: Tensor, index_e: Tensor) -> Tensor:
    """Inner products a[rows_e[e]] . b[index_e[e]] of chosen pairs of rows only, (e,).

    This is how `embedding_bag` differentiates towards its weights; no (e, d) tensor is made.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a_nd.contiguous(), b_cd, index_e, index_e.new_empty(0), rows_e, 0
    )


def starts_of(counts_r: Tensor) -> Tensor:
    """Where each row's entries begin, and where the last one's end, (r + 1,)."""
    return torch.cat([counts_r.new_zeros(1), counts_r.cumsum(0)])


class PreActivations:
    """u = W x^T + b for a batch, one chunk of tokens at a time; can be gone through again.

    Yields (number of the first token, u (c, tokens)); the next chunk overwrites it. The arguments
    decide the precision of the product: bfloat16 copies run on the machine's matrix units. The
    layout, concepts first, lets them read W as it lies in memory, without packing it.
    """

    def __init__(self, x_nd: Tensor, W_cd: Tensor, b_c: Tensor) -> None:
        self.x_nd, self.W_cd, self.b_c = x_nd, W_cd, b_c

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.x_nd)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        size = min(CHUNK_TOKENS, self.n)
        buffer_cm = self.W_cd.new_empty(len(self.W_cd), size)
        for first in range(0, self.n, size):
            x_md = self.x_nd[first : first + size]
            out_cm = buffer_cm if len(x_md) == size else None
            yield first, torch.addmm(self.b_c[:, None], self.W_cd, x_md.T, out=out_cm)

    def few(self, tokens: int) -> Tensor:
        """Pre-activations of the first few tokens, (c, tokens)."""
        return torch.addmm(self.b_c[:, None], self.W_cd, self.x_nd[:tokens].T)


@dataclass(frozen=True)
class Entries:
    """Which concepts are active where, in the order of rows: entry e is (rows_e, concepts_e)."""

    rows_e: Tensor
    concepts_e: Tensor
    n_rows: int

    @classmethod
    def of_columns(cls, concepts_nk: Tensor) -> Entries:
        """k concepts in every row."""
        n, k = concepts_nk.shape
        rows_e = torch.arange(n, device=concepts_nk.device).repeat_interleave(k)
        return cls(rows_e, concepts_nk.flatten(), n)

    def stacked(self, below: Entries) -> Entries:
        """These rows, and the others' below them."""
        return Entries(
            torch.cat([self.rows_e, below.rows_e + self.n_rows]),
            torch.cat([self.concepts_e, below.concepts_e]),
            self.n_rows + below.n_rows,
        )

    @property
    def starts_r(self) -> Tensor:
        """Where each row's entries begin, (n_rows,)."""
        return starts_of(torch.bincount(self.rows_e, minlength=self.n_rows))[:-1]


def topk_concepts(u_cn: Tensor, k: int, fan: int = 4) -> Tensor:
    """The k concepts with the largest pre-activations of every token, (n, k), unordered; exact.

    The k largest lie in those k groups of concepts whose maxima are largest. So with groups of
    `fan` concepts the search among c becomes one among c / fan maxima (done in the same way) and
    one among k * fan candidates.
    """
    c, n = u_cn.shape
    if c % fan or c <= fan * k:
        return u_cn.T.contiguous().topk(k, dim=1, sorted=False).indices
    groups_nk = topk_concepts(u_cn.view(fan, c // fan, n).amax(0), k, fan)
    candidates_nm = torch.cat([groups_nk + i * (c // fan) for i in range(fan)], dim=1)
    best_nk = u_cn.T.gather(1, candidates_nm).topk(k, dim=1, sorted=False).indices
    return candidates_nm.gather(1, best_nk)


def above(pre_activations: PreActivations, lowest: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, concepts and values of all pre-activations above `lowest` (a number or (c, 1)), in
    the order of tokens."""
    tokens, concepts, values = [], [], []
    for first, u_cn in pre_activations:
        concepts_e, tokens_e = (u_cn > lowest).nonzero(as_tuple=True)
        order_e = tokens_e.int().argsort(stable=True)
        tokens.append(tokens_e[order_e] + first)
        concepts.append(concepts_e[order_e])
        values.append(u_cn[concepts_e, tokens_e][order_e])
    return torch.cat(tokens), torch.cat(concepts), torch.cat(values)


def topk_of_batch(pre_activations: PreActivations, k: int) -> Entries:
    """The n k largest positive pre-activations of a batch of n tokens; exact.

    A guess from a few tokens, too low on purpose, leaves few candidates; where it was too high
    after all, the search is done again without it.
    """
    wanted = pre_activations.n * k
    sample_e = pre_activations.few(16).flatten()
    guess = float(sample_e.topk(min(2 * 16 * k, len(sample_e))).values[-1])
    tokens_e, concepts_e, values_e = above(pre_activations, max(guess, 0.0))
    if guess > 0 and len(values_e) < wanted:
        tokens_e, concepts_e, values_e = above(pre_activations, 0.0)
    if len(values_e) > wanted:
        keep_e = values_e.topk(wanted, sorted=False).indices.sort().values
        tokens_e, concepts_e = tokens_e[keep_e], concepts_e[keep_e]
    return Entries(tokens_e, concepts_e, pre_activations.n)


@dataclass(frozen=True)
class ByConcept:
    """Entries in the order of their concepts, and the way back.

    Products with rows of weights and the weights' gradients go along this order, so that every row
    of weights is read once. Concept j owns the entries from `starts_c1[j]` to `starts_c1[j + 1]`.
    """

    entries: Entries
    order_e: Tensor
    rows_e: Tensor
    concepts_e: Tensor
    starts_c1: Tensor

    @classmethod
    def of(cls, entries: Entries, n_concepts: int) -> ByConcept:
        """Sort by concept, keeping the order of rows within one (so that sums are repeatable)."""
        order_e = entries.concepts_e.int().argsort(stable=True)
        starts_c1 = starts_of(torch.bincount(entries.concepts_e, minlength=n_concepts))
        rows_e, concepts_e = entries.rows_e[order_e], entries.concepts_e[order_e]
        return cls(entries, order_e, rows_e, concepts_e, starts_c1)

    def decode(self, values_e: Tensor, W_cd: Tensor) -> Tensor:
        """Sums of the concepts' rows by activations (in the order of concepts), (n_rows, d).

        Differentiable in the activations only: gradients of W come from `row_sums`.
        """
        return _Decode.apply(values_e, W_cd, self)

    def row_sums(
        self, concepts: slice, values_e: Tensor, index_e: Tensor, table_td: Tensor
    ) -> Tensor:
        """For a range of concepts: out[j] = sum of values[e] * table[index[e]] over j's entries."""
        starts_c1 = self.starts_c1[concepts.start : concepts.stop + 1]
        first, last = int(starts_c1[0]), int(starts_c1[-1])
        return weighted_rows(
            values_e[first:last], index_e[first:last], starts_c1[:-1] - first, table_td
        )


class _Decode(torch.autograd.Function):
    """out[r] = sum of values[e] * W[concepts[e]]; d values[e] = d out[rows[e]] . W[concepts[e]]."""

    @staticmethod
    def forward(ctx: Any, values_e: Tensor, W_cd: Tensor, active: ByConcept) -> Tensor:
        ctx.W_cd, ctx.active = W_cd, active
        entries = active.entries
        in_rows_e = torch.empty_like(values_e).index_copy_(0, active.order_e, values_e)
        return weighted_rows(in_rows_e, entries.concepts_e, entries.starts_r, W_cd)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        active = ctx.active
        d_values_e = sampled_products(gradients[0], ctx.W_cd, active.rows_e, active.concepts_e)
        return d_values_e, None, None
