"""The sparse autoencoder: concepts with one threshold each, usable one at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patch_retriever.sae.codes import Codes
from patch_retriever.sae.scale import InputScale, scaled_input, token_scale

CHUNK_CODES = 8_388_608
"""Dense codes that are alive at a time (32 MiB in float32)."""


class SparseAutoencoder(nn.Module):
    """Codes z = u * [u > threshold] with u = x W_enc + b_enc; x is about z W_dec + b_dec.

    Every concept has its own threshold (JumpReLU, arXiv 2407.14435), so that a patch can hold
    only the concepts that it needs. `W_enc_dc` is (d, c), `W_dec_cd` is (c, d) with unit rows.
    Activations go in raw: any normalisation of training is folded into the weights.

    What no weights can hold is a scale per token. With `input_scale` "token" it is

        u = x_hat W_enc + b_enc with x_hat = (x - mean) / (std + 1e-5) over the token's dimensions,
        z = std u [u > threshold], and x is about z W_dec + std b_dec + mean.

    So codes are in the activations' units either way: what a concept adds to x is z times its row
    of W_dec, and pooled codes reconstruct pooled activations, given the pooled std.

    An SAE of somebody else's may have no thresholds but a TopK gate, `k`: the k largest u of a
    token are its codes where they are positive. Its concepts can't be used one at a time before
    `convert.with_thresholds` gave it thresholds.
    """

    W_enc_dc: Tensor
    b_enc_c: Tensor
    W_dec_cd: Tensor
    b_dec_d: Tensor
    threshold_c: Tensor

    def __init__(
        self,
        W_enc_dc: Tensor,
        b_enc_c: Tensor,
        W_dec_cd: Tensor,
        b_dec_d: Tensor,
        threshold_c: Tensor,
        k: int | None = None,
        input_scale: InputScale = "none",
    ) -> None:
        super().__init__()
        self.k, self.input_scale = k, input_scale
        self.register_buffer("W_enc_dc", W_enc_dc)
        self.register_buffer("b_enc_c", b_enc_c)
        self.register_buffer("W_dec_cd", W_dec_cd)
        self.register_buffer("b_dec_d", b_dec_d)
        self.register_buffer("threshold_c", threshold_c)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc_dc.shape[0]

    @property
    def n_concepts(self) -> int:
        """Number of concepts (rows of the dictionary)."""
        return self.W_enc_dc.shape[1]

    def encode(self, x_nd: Tensor) -> Tensor:
        """Codes (n, c) of activations (n, d)."""
        u_nc = torch.addmm(self.b_enc_c, scaled_input(x_nd, self.input_scale), self.W_enc_dc)
        if self.k is None:
            return self._in_units_of(x_nd, u_nc * (u_nc > self.threshold_c))
        values_nk, concepts_nk = u_nc.topk(self.k, dim=1)
        codes_nc = torch.zeros_like(u_nc).scatter_(1, concepts_nk, values_nk.relu())
        return self._in_units_of(x_nd, codes_nc)

    def encode_some(self, x_nd: Tensor, concepts_m: Tensor) -> Tensor:
        """Codes (n, m) of some concepts alone; a TopK gate has to see all of them."""
        if self.k is not None:
            return self.encode(x_nd)[:, concepts_m]
        input_nd = scaled_input(x_nd, self.input_scale)
        u_nm = torch.addmm(self.b_enc_c[concepts_m], input_nd, self.W_enc_dc[:, concepts_m])
        codes_nm = torch.where(u_nm > self.threshold_c[concepts_m], u_nm, 0.0)
        return self._in_units_of(x_nd, codes_nm)

    def codes(self, x_nd: Tensor) -> Codes:
        """Codes (n, c) of activations (n, d), sparse; dense for some tokens at a time only."""
        tokens = max(1, CHUNK_CODES // self.n_concepts)
        return Codes.stacked([Codes.from_dense(self.encode(x)) for x in x_nd.split(tokens)])

    def decode(
        self, codes: Tensor | Codes, x_nd: Tensor | None = None, scale_n: Tensor | None = None
    ) -> Tensor:
        """Activations (n, d) reconstructed from codes (n, c).

        Args:
            codes: of tokens, or pooled by weights that sum to one.
            x_nd: what they are the codes of; only a scale per token needs it.
            scale_n: for a pooled `x_nd`, its tokens' scales, pooled likewise.
        """
        return codes.matmul(self.W_dec_cd) + self.base(x_nd, scale_n)

    def base(self, x_nd: Tensor | None = None, scale_n: Tensor | None = None) -> Tensor:
        """What a reconstruction has beside its concepts: b_dec (d,), or std b_dec + mean (..., d).

        Arguments as of `decode`. The mean of a pooled vector over its dimensions is the pooled
        mean of its tokens, so that their scales are all that has to be known of them.
        """
        if self.input_scale == "none":
            return self.b_dec_d
        if x_nd is None:
            raise ValueError("an SAE with a scale per token decodes codes of known activations")
        scale_n = token_scale(x_nd) if scale_n is None else scale_n
        return scale_n[..., None] * self.b_dec_d + x_nd.mean(-1, keepdim=True)

    def scale(self, x_nd: Tensor) -> Tensor | None:
        """The scale of every token of (..., d), where this SAE has one per token; pooled as the
        tokens are, it is what `decode` wants of them."""
        return token_scale(x_nd) if self.input_scale == "token" else None

    def _in_units_of(self, x_nd: Tensor, codes_nc: Tensor) -> Tensor:
        """Codes of the encoder's input in the units of the activations."""
        return codes_nc * token_scale(x_nd)[:, None] if self.input_scale == "token" else codes_nc
