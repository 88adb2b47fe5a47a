"""The sparse autoencoder: concepts with one threshold each, usable one at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patch_retriever.sae.codes import Codes

CHUNK_CODES = 8_388_608
"""Dense codes that are alive at a time (32 MiB in float32)."""


class SparseAutoencoder(nn.Module):
    """Codes z = u * [u > threshold] with u = x W_enc + b_enc; x is about z W_dec + b_dec.

    Every concept has its own threshold (JumpReLU, arXiv 2407.14435), so that a patch can hold
    only the concepts that it needs. `W_enc_dc` is (d, c), `W_dec_cd` is (c, d) with unit rows.
    Activations go in raw: any normalisation of training is folded into the weights.

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
    ) -> None:
        super().__init__()
        self.k = k
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
        u_nc = torch.addmm(self.b_enc_c, x_nd, self.W_enc_dc)
        if self.k is None:
            return u_nc * (u_nc > self.threshold_c)
        values_nk, concepts_nk = u_nc.topk(self.k, dim=1)
        return torch.zeros_like(u_nc).scatter_(1, concepts_nk, values_nk.relu())

    def encode_some(self, x_nd: Tensor, concepts_m: Tensor) -> Tensor:
        """Codes (n, m) of some concepts alone; a TopK gate has to see all of them."""
        if self.k is not None:
            return self.encode(x_nd)[:, concepts_m]
        u_nm = torch.addmm(self.b_enc_c[concepts_m], x_nd, self.W_enc_dc[:, concepts_m])
        return torch.where(u_nm > self.threshold_c[concepts_m], u_nm, 0.0)

    def codes(self, x_nd: Tensor) -> Codes:
        """Codes (n, c) of activations (n, d), sparse; dense for some tokens at a time only."""
        tokens = max(1, CHUNK_CODES // self.n_concepts)
        return Codes.stacked([Codes.from_dense(self.encode(x)) for x in x_nd.split(tokens)])

    def decode(self, codes_nc: Tensor) -> Tensor:
        """Activations (n, d) reconstructed from codes (n, c)."""
        return codes_nc @ self.W_dec_cd + self.b_dec_d
