"""What an SAE in training computes, written densely: all codes, torch's autograd, plain loops."""

from __future__ import annotations

import torch

from patch_retriever.sae.architectures import make_architecture
from patch_retriever.sae.learner import Learner, Weights

BANDWIDTH = 0.5
"""Wide, so that small examples have entries in JumpReLU's window; a power of two, so that its
edges are exact."""

OPTIONS = {
    "topk": {},
    "batch-topk": {},
    "matryoshka": {"prefixes": (0.3, 0.5, 1.0)},
    "jumprelu": {"bandwidth": BANDWIDTH, "l0_weight": 0.7},
}
"""The architectures of the tests, by name."""


def random_weights(d, c, seed=0, grid=False):
    """Weights in the middle of training, in float64; on a grid, many pre-activations are equal."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).double()

    weights = Weights(rand(c, d) / d**0.5, 0.3 * rand(c), rand(c, d), rand(d), 0.5 * rand(c).abs())
    if grid:
        weights.W_enc_cd = rand(c, d).round().clamp(-1, 1)[torch.arange(c) // 2] / 2
        weights.b_enc_c = rand(c).round().clamp(-1, 1) / 4
        weights.threshold_c = (4 * weights.threshold_c).round() / 4
    return weights


def random_tokens(n, d, seed=1, grid=False):
    """Tokens in float64; on a grid, each comes twice."""
    generator = torch.Generator().manual_seed(seed)
    x_nd = torch.randn(n, d, generator=generator).double()
    return x_nd.round().clamp(-1, 1)[torch.arange(n) // 2] if grid else x_nd


def make_learner(name, weights, k, **settings):
    return Learner(weights, make_architecture(name, k, **OPTIONS[name]), **settings)


def converted(weights, dtype, requires_grad=False):
    """A copy of all weights in another precision."""
    copies = (t.detach().to(dtype, copy=True) for t in vars(weights).values())
    return Weights(*(copy.requires_grad_(requires_grad) for copy in copies))


def dense_pre_activations(weights, x_nd):
    return x_nd @ weights.W_enc_cd.T + weights.b_enc_c


def largest_of_rows(u_nc, k):
    """Mask of the k largest of every row."""
    return torch.zeros_like(u_nc, dtype=torch.bool).scatter_(1, u_nc.topk(k, dim=1).indices, True)


def gate(architecture, u_nc):
    """Mask of the codes that may be active, where no two pre-activations are equal."""
    if architecture.name == "topk":
        return largest_of_rows(u_nc, architecture.k)
    if architecture.name == "jumprelu":
        return torch.ones_like(u_nc, dtype=torch.bool)
    wanted = min(len(u_nc) * architecture.k, u_nc.numel())
    return largest_of_rows(u_nc.reshape(1, -1), wanted).view_as(u_nc) & (u_nc > 0)


def largest_dead(u_nc, dead_c, k_aux):
    """Mask of the dead concepts that AuxK revives, where no two pre-activations are equal."""
    masked_nc = u_nc.masked_fill(~dead_c, -torch.inf)
    return largest_of_rows(masked_nc, min(k_aux, int(dead_c.sum())))


def dense_codes(architecture, u_nc, threshold_c):
    """Codes before the mask, and which of them are active; both differentiable.

    JumpReLU's pseudo-derivatives (eqs. 11 and 12 of arXiv 2407.14435) are those of a term that is
    zero: (threshold - its value) times what the derivative should be.
    """
    if architecture.name != "jumprelu":
        return u_nc.relu(), (u_nc > 0).to(u_nc.dtype)
    bandwidth = architecture.bandwidth
    on_nc = (u_nc > threshold_c).to(u_nc.dtype)
    window_nc = ((u_nc - threshold_c).abs() < bandwidth / 2).to(u_nc.dtype)
    zero_c = threshold_c - threshold_c.detach()
    slope_nc = -window_nc / bandwidth
    z_nc = u_nc * on_nc + (slope_nc * threshold_c).detach() * zero_c
    return z_nc, on_nc + slope_nc * zero_c


def dense_loss(learner, weights, x_nd, gate_nc, revived_nc=None, n_pairs=0):
    """A batch's loss, given which codes may be active: (total, squared error per token, codes)."""
    architecture, n = learner.architecture, len(x_nd)
    u_nc = dense_pre_activations(weights, x_nd)
    z_nc, on_nc = dense_codes(architecture, u_nc, weights.threshold_c)
    z_nc, on_nc = z_nc * gate_nc, on_nc * gate_nc
    errors = []
    for end in architecture.prefix_ends(z_nc.shape[1]):
        left_nd = x_nd - (z_nc[:, :end] @ weights.W_dec_cd[:end] + weights.b_dec_d)
        errors.append((left_nd**2).sum() / n)
    total = sum(errors) / len(errors)
    if revived_nc is not None:
        left_nd = left_nd.detach()
        aux_nd = (u_nc.relu() * revived_nc) @ weights.W_dec_cd
        total = total + learner.aux_weight * ((left_nd - aux_nd) ** 2).sum() / (left_nd**2).sum()
    if architecture.name == "jumprelu":
        total = total + architecture.l0_weight * (on_nc.sum() / n / architecture.k - 1) ** 2
    if learner.shared is not None and n_pairs:
        first_pc, second_pc = z_nc[n - 2 * n_pairs :].split(n_pairs)
        by_hand = {"iso-energy": iso_energy_by_hand, "group-sparse": group_sparse_by_hand}
        penalty = by_hand[learner.shared.kind](first_pc, second_pc)
        total = total + learner.shared.weight * penalty
    return total, errors[-1], z_nc


def iso_energy_by_hand(a_pc, b_pc):
    """Pair by pair: the cosine over concepts that are neither side's strongest."""
    cosines = []
    strongest = zip(a_pc.argmax(1).tolist(), b_pc.argmax(1).tolist(), strict=True)
    for a_c, b_c, out in zip(a_pc, b_pc, strongest, strict=True):
        rest = [j for j in range(len(a_c)) if j not in out]
        dot = sum((a_c[j] * b_c[j] for j in rest), start=0 * a_c.sum())
        energy_a = sum((a_c[j] ** 2 for j in rest), start=0 * a_c.sum())
        energy_b = sum((b_c[j] ** 2 for j in rest), start=0 * b_c.sum())
        cosines.append(dot / (energy_a * energy_b + 1e-12) ** 0.5)
    return -sum(cosines) / len(cosines)


def group_sparse_by_hand(a_pc, b_pc):
    """Pair by pair and concept by concept: sqrt(a^2 + b^2), smooth at zero."""
    total = 0 * a_pc.sum()
    for a_c, b_c in zip(a_pc, b_pc, strict=True):
        for j in range(len(a_c)):
            total = total + (a_c[j] ** 2 + b_c[j] ** 2 + 1e-12) ** 0.5 - 1e-6
    return total / len(a_pc)


def mask_of(rows_e, concepts_e, n, c):
    """A mask (n, c) of entries."""
    mask_nc = torch.zeros(n, c, dtype=torch.bool)
    mask_nc[rows_e, concepts_e] = True
    return mask_nc


def revived_mask(learner, gradient):
    """Which concepts AuxK revived where, as the learner chose; None if it chose nothing."""
    n, c = len(gradient.x_nd), len(learner.weights.b_enc_c)
    rows_e = gradient.active.rows_e - n * len(learner.prefix_ends)
    below_e = rows_e >= 0
    if not bool(below_e.any()):
        return None
    return mask_of(rows_e[below_e], gradient.active.concepts_e[below_e], n, c)


def whole_gradient(learner, gradient):
    """All parts of the learner's gradient, by the names of the weights."""
    everything = slice(0, len(learner.weights.b_enc_c))
    parts = {
        "W_enc_cd": gradient.encoder(everything),
        "b_enc_c": gradient.b_enc_c,
        "W_dec_cd": gradient.decoder(everything),
        "b_dec_d": gradient.b_dec_d,
    }
    if gradient.threshold_c is not None:
        parts["threshold_c"] = gradient.threshold_c
    return parts


def dense_gradient(total, weights):
    """Autograd's gradient of a loss, by the names of the weights; without those it ignores."""
    found = torch.autograd.grad(total, list(vars(weights).values()), allow_unused=True)
    named = zip(vars(weights), found, strict=True)
    return {name: gradient for name, gradient in named if gradient is not None}
