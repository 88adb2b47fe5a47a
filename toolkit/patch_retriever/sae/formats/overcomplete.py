"""overcomplete's TopK SAE in a `.pt` file, as in the official checkpoint of arXiv 2512.19115.

A state dict, or a dict that holds it under "model_state": encoder.final_block.0.weight (c, d),
encoder.final_block.0.bias (c,), dictionary._weights (c, d) and dictionary.multiplier (). The codes
are the k largest of relu(x W_enc + b_enc); the decoder's rows are units times exp(multiplier), and
it has no bias. Semantics from overcomplete 0.3 (sae/topk_sae.py, sae/dictionary.py). The file does
not say k, nor which class it is of: a BatchTopK SAE has the same tensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from patch_retriever.errors import UserError
from patch_retriever.sae.formats.reading import positive, read_pickle, take
from patch_retriever.sae.model import SparseAutoencoder

_SHAPES = {
    "encoder.final_block.0.weight": "cd",
    "encoder.final_block.0.bias": "c",
    "dictionary._weights": "cd",
    "dictionary.multiplier": "",
}


def recognises(path: Path) -> bool:
    """Whether this is a `.pt` file."""
    return path.suffix == ".pt" and path.is_file()


def load(path: Path, k: int | None) -> SparseAutoencoder:
    """Read such a file; `k` is the number of concepts that are active per token.

    Raises:
        UserError: `k` is missing, or the file is damaged or holds another kind of SAE.
    """
    if k is None:
        raise UserError(
            f"{path}: does not say how many concepts are active per token; give the k that the SAE "
            "was trained with (the official checkpoints': k=50)"
        )
    saved = read_pickle(path)
    state = saved.get("model_state", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or "dictionary._weights" not in state:
        raise UserError(
            f"{path}: holds no SAE of overcomplete's (no dictionary._weights); for one of "
            "dictionary_learning's name the folder of ae.pt and config.json"
        )
    W_enc_cd, b_enc_c, weights_cd, multiplier = take(path, state, _SHAPES)
    W_dec_cd = torch.nn.functional.normalize(weights_cd, dim=1) * multiplier.exp()
    k = positive(path, {"k": k}, "k", most=len(b_enc_c))
    b_dec_d = torch.zeros_like(W_dec_cd[0])
    return SparseAutoencoder(W_enc_cd.T, b_enc_c, W_dec_cd, b_dec_d, torch.zeros_like(b_enc_c), k)
