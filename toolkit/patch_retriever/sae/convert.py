"""From what was trained to what is used: raw activations, one threshold per concept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.sae.codes import Codes
from patch_retriever.sae.learner import Learner
from patch_retriever.sae.metrics import fvu
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.ops import sampled_products
from patch_retriever.sae.scale import EPSILON, InputScale, scaled_input, token_scale


@dataclass(frozen=True)
class Conversion:
    """What replacing the training gate by thresholds changed, measured on the same tokens; FVU of
    what the encoder sees, so that with a scale per token no token counts more than another."""

    l0_gate: float
    l0: float
    fvu_gate: float
    fvu: float

    def __str__(self) -> str:
        return (
            f"thresholds for the gate: L0 {self.l0_gate:.1f} -> {self.l0:.1f}, "
            f"FVU {self.fvu_gate:.4f} -> {self.fvu:.4f}"
        )


@torch.no_grad()
def convert(
    learner: Learner,
    mean_d: Tensor,
    scale: float,
    x_nd: Tensor,
    input_scale: InputScale = "none",
) -> tuple[SparseAutoencoder, Conversion]:
    """The JumpReLU SAE of a trained one, and what that changed.

    Training saw (x - mean) / scale, of standardised tokens x with `input_scale` "token"; mean and
    scale are folded into the weights, so the SAE takes raw activations, and its codes are in their
    units. Thresholds come from the raw activations `x_nd`.
    """
    weights = learner.weights
    mean_d, raw_nd = mean_d.to(weights.b_dec_d.device), x_nd.to(weights.b_dec_d.device)
    x_nd = scaled_input(raw_nd, input_scale)
    lengths_c = torch.linalg.vector_norm(weights.W_dec_cd, dim=1)
    W_enc_cd = weights.W_enc_cd * lengths_c[:, None]
    b_enc_c = scale * lengths_c * weights.b_enc_c - W_enc_cd @ mean_d
    W_dec_cd = weights.W_dec_cd / lengths_c[:, None]
    b_dec_d = mean_d + scale * weights.b_dec_d
    entries = learner.select((x_nd - mean_d) / scale)
    u_e = sampled_products(x_nd, W_enc_cd, entries.rows_e, entries.concepts_e)
    u_e += b_enc_c[entries.concepts_e]
    selected = Codes.from_entries(entries.rows_e, entries.concepts_e, u_e, len(x_nd), len(b_enc_c))
    gated = selected.kept(u_e > 0)
    match learner.architecture.threshold:
        case "learned":
            threshold_c = scale * lengths_c * weights.threshold_c
            gated = selected.kept(u_e > threshold_c[entries.concepts_e])
        case "one" if len(gated.values_e):
            threshold_c = gated.values_e.amin().expand_as(b_enc_c).clone()
        case _:
            threshold_c = matched_thresholds(x_nd, W_enc_cd, b_enc_c, gated.counts())
    W_enc_dc = W_enc_cd.T.contiguous()
    sae = SparseAutoencoder(
        W_enc_dc, b_enc_c, W_dec_cd, b_dec_d, threshold_c, input_scale=input_scale
    )
    scale_n = sae.scale(raw_nd)
    conversion = _compared(sae, gated if scale_n is None else gated.rows_scaled(scale_n), raw_nd)
    return sae.cpu(), conversion


@torch.no_grad()
def with_thresholds(sae: SparseAutoencoder, x_nd: Tensor) -> tuple[SparseAutoencoder, Conversion]:
    """A TopK SAE as a JumpReLU SAE: every concept fires as often on `x_nd` as TopK chose it."""
    gated = sae.codes(x_nd)
    W_enc_cd, input_nd = sae.W_enc_dc.T.contiguous(), scaled_input(x_nd, sae.input_scale)
    threshold_c = matched_thresholds(input_nd, W_enc_cd, sae.b_enc_c, gated.counts())
    converted = SparseAutoencoder(
        sae.W_enc_dc,
        sae.b_enc_c,
        sae.W_dec_cd,
        sae.b_dec_d,
        threshold_c,
        input_scale=sae.input_scale,
    )
    return converted, _compared(converted, gated, x_nd)


def with_unit_rows(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same reconstructions with dictionary rows of length one, so that activations of
    different concepts can be compared; needs thresholds (a TopK gate would choose otherwise)."""
    lengths_c = torch.linalg.vector_norm(sae.W_dec_cd, dim=1).clamp(min=1e-12)
    return SparseAutoencoder(
        sae.W_enc_dc * lengths_c,
        sae.b_enc_c * lengths_c,
        sae.W_dec_cd / lengths_c[:, None],
        sae.b_dec_d,
        sae.threshold_c * lengths_c,
        input_scale=sae.input_scale,
    )


def _compared(sae: SparseAutoencoder, gated: Codes, x_nd: Tensor) -> Conversion:
    """The gate's codes beside those of the thresholds."""
    codes = sae.codes(x_nd)
    figures = []
    for each in (gated, codes):
        left_nd = x_nd - sae.decode(each, x_nd)
        if sae.input_scale == "token":
            left_nd = left_nd / (token_scale(x_nd)[:, None] + EPSILON)
        input_nd = scaled_input(x_nd, sae.input_scale)
        figures.append(fvu(input_nd, input_nd - left_nd))
    return Conversion(gated.l0, codes.l0, *figures)


def matched_thresholds(x_nd: Tensor, W_enc_cd: Tensor, b_enc_c: Tensor, counts_c: Tensor) -> Tensor:
    """Thresholds (c,) above which each concept has exactly its count of tokens of `x_nd`.

    A threshold lies halfway between the last pre-activation that counts and the first that does
    not; a concept without any count stays silent on all of `x_nd`. Concepts are taken in the order
    of their counts, some at a time, so that few pre-activations are ranked and few are kept.
    """
    threshold_c = torch.empty_like(b_enc_c)
    n = len(x_nd)
    size = max(1, 16_777_216 // n)
    for concepts in counts_c.argsort(stable=True).split(size):
        u_jn = torch.addmm(b_enc_c[concepts, None], W_enc_cd[concepts], x_nd.T)
        counts_j = counts_c[concepts]
        ranked_jm = u_jn.topk(min(int(counts_j.max()) + 1, n), dim=1).values
        last_j = ranked_jm.gather(1, (counts_j - 1).clamp(min=0)[:, None])[:, 0]
        next_j = ranked_jm.gather(1, counts_j.clamp(max=ranked_jm.shape[1] - 1)[:, None])[:, 0]
        halfway_j = torch.where(counts_j < n, (last_j + next_j) / 2, last_j * 0.99)
        threshold_c[concepts] = torch.where(counts_j > 0, halfway_j, ranked_jm[:, 0] * 1.01)
    return threshold_c.clamp(min=1e-6)
