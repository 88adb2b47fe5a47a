"""The sparse autoencoder: concepts with one threshold each, usable one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch_retriever.errors import UserError
from patch_retriever.files import write_json, write_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


class SparseAutoencoder(nn.Module):
    """Codes z = u * [u > threshold] with u = x W_enc + b_enc; x is about z W_dec + b_dec.

    Every concept has its own threshold (JumpReLU, arXiv 2407.14435), so that a patch can hold
    only the concepts that it needs. `W_enc_dc` is (d, c), `W_dec_cd` is (c, d) with unit rows.
    Activations go in raw: any normalisation of training is folded into the weights.
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
    ) -> None:
        super().__init__()
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
        return u_nc * (u_nc > self.threshold_c)

    def decode(self, codes_nc: Tensor) -> Tensor:
        """Activations (n, d) reconstructed from codes (n, c)."""
        return codes_nc @ self.W_dec_cd + self.b_dec_d

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Write SAELens' layout: `cfg.json` and `sae_weights.safetensors`."""
        write_tensors(
            folder / WEIGHTS,
            {
                "W_enc": self.W_enc_dc,
                "b_enc": self.b_enc_c,
                "W_dec": self.W_dec_cd,
                "b_dec": self.b_dec_d,
                "threshold": self.threshold_c,
            },
        )
        config = {
            "architecture": "jumprelu",
            "d_in": self.d_in,
            "d_sae": self.n_concepts,
            "dtype": "float32",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "metadata": about or {},
        }
        write_json(folder / CONFIG, config)

    @classmethod
    def load(cls, folder: Path) -> SparseAutoencoder:
        """Read what `save` wrote.

        Raises:
            UserError: the folder holds no such SAE or is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = json.loads((folder / CONFIG).read_text())
            if config["architecture"] != "jumprelu":
                raise UserError(
                    f"{folder}: an SAE of architecture {config['architecture']}; jumprelu is read"
                )
            t = load_file(folder / WEIGHTS)
            d, c = config["d_in"], config["d_sae"]
            shapes = {"W_enc": (d, c), "b_enc": (c,), "W_dec": (c, d), "b_dec": (d,)}
            for name, shape in {**shapes, "threshold": (c,)}.items():
                if tuple(t[name].shape) != shape:
                    raise ValueError(f"{name} is {tuple(t[name].shape)}, not {shape}")
            return cls(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], t["threshold"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder}: no readable SAE ({error})") from None
