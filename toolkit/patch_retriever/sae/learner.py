"""One SAE while it trains: its weights, its loss, and the pass that updates them.

The gradients of the weights are never made as a whole. What a step leaves behind is their
factored form (entries, activations, and the gradient of the reconstruction); `Learner.update` then
goes through the dictionary once, some concepts at a time, and while they are in the cache sums
their gradients, takes Adam's step, brings the dictionary's rows back to length one (every few
steps) and rounds the copy that the next selection multiplies with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.sae.adam import Adam
from patch_retriever.sae.architectures.base import Architecture
from patch_retriever.sae.ops import (
    ByConcept,
    Entries,
    PreActivations,
    sampled_products,
    topk_concepts,
    weighted_rows,
)
from patch_retriever.sae.shared import SharedConcepts

PASS_ELEMENTS = 1_048_576
"""Weights of one matrix that an update handles at a time on a CPU (4 MiB in float32)."""

NORMALISE_EVERY = 8
"""Steps after which the dictionary's rows are brought back to length one."""

Reduce = Callable[[Tensor], Tensor]
"""The mean of a tensor over all processes."""


@dataclass
class Weights:
    """The parameters, on normalised activations: u = x W_enc^T + b_enc, x is about z W_dec + b_dec.

    Both matrices hold one row per concept, so that active concepts are read as rows.
    """

    W_enc_cd: Tensor
    b_enc_c: Tensor
    W_dec_cd: Tensor
    b_dec_d: Tensor
    threshold_c: Tensor

    @classmethod
    def random(cls, d: int, c: int, generator: torch.Generator) -> Weights:
        """Random unit rows, the encoder equal to the dictionary, biases zero."""
        rows_cd = torch.nn.functional.normalize(torch.randn(c, d, generator=generator), dim=1)
        return cls(rows_cd.clone(), torch.zeros(c), rows_cd, torch.zeros(d), torch.zeros(c))

    @torch.no_grad()
    def scale_encoder(self, x_nd: Tensor, k: int, reduce: Reduce = lambda t: t) -> None:
        """Scale W_enc so that the k largest activations, decoded, are of the size of x.

        The factor is the one of least squares, the same on all processes. Concepts that fire
        together overlap before training, so unit rows overshoot; training then spends most of its
        first hundreds of steps on lengths (a fifth more FVU after 620,000 tokens).
        """
        concepts_nk = torch.cat(
            [
                topk_concepts(u_cm, k)
                for _, u_cm in PreActivations(x_nd, self.W_enc_cd, self.b_enc_c)
            ]
        )
        entries = Entries.of_columns(concepts_nk)
        u_e = sampled_products(x_nd, self.W_enc_cd, entries.rows_e, entries.concepts_e)
        sums_nd = weighted_rows(u_e.relu(), entries.concepts_e, entries.starts_r, self.W_dec_cd)
        sizes = torch.stack([(sums_nd * x_nd).sum(), sums_nd.square().sum()])
        along, square = reduce(sizes).tolist()
        if along > 0:  # else all of x is zero
            self.W_enc_cd.mul_(along / square)

    def to(self, device: torch.device) -> Weights:
        """On a device."""
        return Weights(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Gradient:
    """The gradient of a batch in factored form, summed up for a range of concepts when asked."""

    active: ByConcept
    x_nd: Tensor
    d_sums_rd: Tensor
    tokens_e: Tensor
    values_e: Tensor
    d_pre_e: Tensor
    b_enc_c: Tensor
    b_dec_d: Tensor
    threshold_c: Tensor | None

    def encoder(self, concepts: slice) -> Tensor:
        """Of these concepts' rows of W_enc."""
        return self.active.row_sums(concepts, self.d_pre_e, self.tokens_e, self.x_nd)

    def decoder(self, concepts: slice) -> Tensor:
        """Of these concepts' rows of W_dec."""
        return self.active.row_sums(concepts, self.values_e, self.active.rows_e, self.d_sums_rd)


@dataclass(frozen=True)
class Loss:
    """A batch's loss: what the SAE leaves unexplained, and what it did to get there."""

    fvu: Tensor
    """Mean squared error of the whole reconstruction, per unit of variance."""
    total: Tensor
    """What is minimised: all prefixes, dead concepts, sparsity and shared concepts included."""
    l0: Tensor
    """Active concepts per token."""
    fired_c: Tensor


class Learner:
    """Trains one SAE batch by batch: `gradient` then `update`, or `step` for both."""

    def __init__(
        self,
        weights: Weights,
        architecture: Architecture,
        *,
        k_aux: int = 256,
        aux_weight: float = 1 / 32,
        dead_after: int = 61_440,
        low_precision: bool = False,
        shared: SharedConcepts | None = None,
        reduce: Reduce = lambda t: t,
    ) -> None:
        self.weights, self.architecture = weights, architecture
        self.k_aux, self.aux_weight, self.dead_after = k_aux, aux_weight, dead_after
        self.shared, self.reduce = shared, reduce
        self.adam = Adam(vars(weights))
        self.silent_c = torch.zeros_like(weights.b_enc_c, dtype=torch.long)
        self.W_low_cd = weights.W_enc_cd.bfloat16() if low_precision else weights.W_enc_cd
        ends = torch.tensor(architecture.prefix_ends(len(weights.b_enc_c)))
        self.prefix_ends = ends.to(weights.b_enc_c.device)

    def step(self, x_nd: Tensor, lr: float, n_pairs: int = 0) -> Loss:
        """One step of training on normalised activations."""
        loss, gradient = self.gradient(x_nd, n_pairs)
        self.update(gradient, lr)
        fired_c = self.reduce(loss.fired_c.float()) > 0
        self.silent_c += len(x_nd) - 2 * n_pairs
        self.silent_c[fired_c] = 0
        return loss

    @property
    def dead_c(self) -> Tensor:
        """Which concepts have not fired for `dead_after` tokens (of this process)."""
        return self.silent_c >= self.dead_after

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        return {**vars(self.weights), **self.adam.state(), "silent_c": self.silent_c}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        if self.W_low_cd is not self.weights.W_enc_cd:
            self.W_low_cd.copy_(self.weights.W_enc_cd)

    def select(self, x_nd: Tensor) -> Entries:
        """The architecture's choice, from pre-activations in the precision of selection."""
        return self.architecture.select(
            self._pre_activations(x_nd, slice(None)), self.weights.threshold_c
        )

    def _pre_activations(self, x_nd: Tensor, concepts: slice | Tensor) -> PreActivations:
        dtype = self.W_low_cd.dtype
        b_enc_c = self.weights.b_enc_c[concepts].to(dtype)
        return PreActivations(x_nd.to(dtype), self.W_low_cd[concepts], b_enc_c)

    def _revived(self, x_nd: Tensor) -> Entries | None:
        """For every token the k_aux dead concepts with the largest pre-activations."""
        dead_m = self.dead_c.nonzero()[:, 0]
        if not len(dead_m):
            return None
        k = min(self.k_aux, len(dead_m))
        found = [topk_concepts(u_mn, k) for _, u_mn in self._pre_activations(x_nd, dead_m)]
        return Entries.of_columns(dead_m[torch.cat(found)])

    def gradient(self, x_nd: Tensor, n_pairs: int = 0) -> tuple[Loss, Gradient]:
        """The loss of a batch and its exact gradient, given which entries were selected.

        The loss is the squared error per token (activations are normalised, so it is per unit of
        variance), mean over the dictionary's prefixes; plus `aux_weight` times what the dead
        concepts leave of that error (AuxK, Gao et al. 2024); plus the architecture's own term.
        The last 2 n_pairs rows may be pairs, all first sides before all second sides, for
        `shared`.
        """
        n, weights, ends = len(x_nd), self.weights, self.prefix_ends
        entries, revived = self._in_prefixes(self.select(x_nd)), self._revived(x_nd)
        n_rows = entries.n_rows
        if revived is not None:
            entries = entries.stacked(revived)
        active = ByConcept.of(entries, len(weights.b_enc_c))
        tokens_e, main_e = active.rows_e % n, active.rows_e < n_rows

        products_e = sampled_products(x_nd, weights.W_enc_cd, tokens_e, active.concepts_e)
        pre_e = products_e.add_(weights.b_enc_c[active.concepts_e]).requires_grad_()
        threshold_c = weights.threshold_c.detach().requires_grad_()
        b_dec_d = weights.b_dec_d.detach().requires_grad_()
        # a dead concept is revived below its threshold, too
        threshold_e = torch.where(main_e, threshold_c[active.concepts_e], 0)
        values_e = self.architecture.activate(pre_e, threshold_e)
        sums_rd = active.decode(values_e, weights.W_dec_cd)
        outputs_gnd = sums_rd[:n_rows].view(len(ends), n, -1)
        if len(ends) > 1:
            outputs_gnd = outputs_gnd.cumsum(0)
        outputs_gnd = outputs_gnd + b_dec_d
        errors_g = [_squared_error(outputs_nd, x_nd) for outputs_nd in outputs_gnd]
        total = torch.stack(errors_g).mean()
        if revived is not None:
            left_nd = (x_nd - outputs_gnd[-1]).detach()
            # a perfect reconstruction leaves nothing to learn from, not infinitely much
            whole = left_nd.square().sum().clamp(min=1e-8 * n)
            missed = _squared_error(sums_rd[n_rows:], left_nd) / whole
            total = total + self.aux_weight * n * missed
        extra = self.architecture.sparsity_loss(pre_e, threshold_e, main_e, n)
        if extra is not None:
            total = total + extra
        if self.shared is not None and n_pairs:
            in_pairs_e = main_e & (tokens_e >= n - 2 * n_pairs)
            where = (tokens_e[in_pairs_e] - (n - 2 * n_pairs), active.concepts_e[in_pairs_e])
            codes_qc = x_nd.new_zeros(2 * n_pairs, len(weights.b_enc_c))
            codes_qc = codes_qc.index_put(where, values_e[in_pairs_e])
            total = total + self.shared.penalty(codes_qc[:n_pairs], codes_qc[n_pairs:])
        d_sums_rd, d_pre_e, d_b_dec_d, d_threshold_c = torch.autograd.grad(
            total, [sums_rd, pre_e, b_dec_d, threshold_c], allow_unused=True
        )
        d_b_enc_c = torch.segment_reduce(d_pre_e, "sum", offsets=active.starts_c1, initial=0)
        values_e = values_e.detach()
        gradient = Gradient(
            active,
            x_nd,
            d_sums_rd,
            tokens_e,
            values_e,
            d_pre_e,
            d_b_enc_c,
            d_b_dec_d,
            d_threshold_c,
        )
        fires_e = (values_e > 0) & main_e
        fired_c = torch.bincount(active.concepts_e, fires_e.float(), len(weights.b_enc_c)) > 0
        loss = Loss(errors_g[-1].detach(), total.detach(), fires_e.sum() / n, fired_c)
        return loss, gradient

    def _in_prefixes(self, entries: Entries) -> Entries:
        """Row g n + i is token i's part between the ends of prefix g - 1 and of prefix g."""
        if len(self.prefix_ends) == 1:
            return entries
        part_e = torch.bucketize(entries.concepts_e, self.prefix_ends, right=True)
        rows_e = part_e * entries.n_rows + entries.rows_e
        order_e = rows_e.int().argsort(stable=True)
        n_rows = len(self.prefix_ends) * entries.n_rows
        return Entries(rows_e[order_e], entries.concepts_e[order_e], n_rows)

    @torch.no_grad()
    def update(self, gradient: Gradient, lr: float) -> None:
        """Adam's step on all weights, and unit rows for the dictionary, in one pass."""
        weights, adam, reduce = self.weights, self.adam, self.reduce
        adam.begin(lr)
        adam.update("b_enc_c", reduce(gradient.b_enc_c))
        adam.update("b_dec_d", reduce(gradient.b_dec_d))
        if gradient.threshold_c is not None:
            adam.update("threshold_c", reduce(gradient.threshold_c))
            weights.threshold_c.clamp_(min=0)
        normalise = int(adam.steps) % NORMALISE_EVERY == 0
        for concepts in self._parts():
            adam.update("W_enc_cd", reduce(gradient.encoder(concepts)), concepts)
            adam.update("W_dec_cd", reduce(gradient.decoder(concepts)), concepts)
            if normalise:
                rows_jd = weights.W_dec_cd[concepts]
                lengths_j1 = torch.linalg.vector_norm(rows_jd, dim=1, keepdim=True)
                rows_jd.div_(lengths_j1.clamp(min=torch.finfo(rows_jd.dtype).tiny))
            if self.W_low_cd is not weights.W_enc_cd:
                self.W_low_cd[concepts] = weights.W_enc_cd[concepts]

    def _parts(self) -> Iterator[slice]:
        """The concepts in parts that stay in a CPU's cache; all at once elsewhere."""
        c, d = self.weights.W_dec_cd.shape
        size = max(1, PASS_ELEMENTS // d) if self.weights.W_dec_cd.device.type == "cpu" else c
        return (slice(start, min(start + size, c)) for start in range(0, c, size))


def _squared_error(outputs_nd: Tensor, x_nd: Tensor) -> Tensor:
    """Sum of squares per token."""
    return torch.nn.functional.mse_loss(outputs_nd, x_nd, reduction="sum") / len(x_nd)
