"""sparsify's layout (eai-sparsify): `cfg.json` and `sae.safetensors`.

encoder.weight (c, d), encoder.bias (c,), W_dec (c, d) and b_dec (d,); the codes are the k largest
of relu((x - b_dec) W_enc + b_enc). A repository holds one such folder per layer (`layers.12`).
Semantics from eai-sparsify 1.3 (sparse_coder.py, fused_encoder.py).
"""

from __future__ import annotations

from pathlib import Path

import torch

from patch_retriever.errors import UserError
from patch_retriever.sae.formats.reading import (
    fold_b_dec,
    positive,
    read_config,
    read_safetensors,
    take,
)
from patch_retriever.sae.model import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_OTHERS = {
    "transcode": "a transcoder, which maps one site's activations to another's",
    "skip_connection": "an SAE with a linear skip connection beside its codes",
    "signed": "an SAE whose codes may be negative",
}
"""Settings, off by default, of SAEs that are not read. (`multi_topk` changes the loss alone.)"""


def recognises(path: Path) -> bool:
    """Whether this is a folder in sparsify's layout."""
    return (path / WEIGHTS).is_file()


def load(folder: Path) -> SparseAutoencoder:
    """Read such a folder.

    Raises:
        UserError: it is damaged, or not a TopK SAE.
    """
    path = folder / CONFIG
    config = read_config(path)
    for setting, what in _OTHERS.items():
        if config.get(setting, False):
            raise UserError(f"{path}: {what} ({setting}); plain TopK SAEs are read")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{path}: an SAE with the activation {activation!r}; topk is read")
    shapes = {"encoder.weight": "cd", "encoder.bias": "c", "W_dec": "cd", "b_dec": "d"}
    tensors = read_safetensors(folder / WEIGHTS)
    W_enc_cd, b_enc_c, W_dec_cd, b_dec_d = take(
        folder / WEIGHTS, tensors, shapes, d=positive(path, config, "d_in")
    )
    k = positive(path, config, "k", most=len(b_enc_c))
    b_enc_c = fold_b_dec(b_enc_c, W_enc_cd.T, b_dec_d)
    return SparseAutoencoder(W_enc_cd.T, b_enc_c, W_dec_cd, b_dec_d, torch.zeros_like(b_enc_c), k)
