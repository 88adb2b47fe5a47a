"""dictionary_learning's layout: `config.json`, which names the class, and its weights in `ae.pt`.

Five classes are read. AutoEncoder is ReLU. AutoEncoderTopK takes the k largest codes: its
threshold is saved, but `encode` ignores it unless asked. BatchTopKSAE and MatryoshkaBatchTopKSAE
gate by their one threshold, which is -1, below all codes, until training sets it.
JumpReluAutoEncoder has one per concept and, unlike the others, does not subtract the decoder's bias
from x. Semantics from dictionary_learning 0.1 (dictionary.py, utils.py `load_dictionary`,
trainers/*.py), which folds the norm of its training activations into the biases that it saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_retriever.errors import UserError
from patch_retriever.sae.formats.reading import (
    fold_b_dec,
    positive,
    read_config,
    read_pickle,
    take,
)
from patch_retriever.sae.model import SparseAutoencoder

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = {"encoder.weight": "cd", "encoder.bias": "c", "decoder.weight": "dc"}
_MATRICES = {"W_enc": "dc", "b_enc": "c", "W_dec": "cd", "b_dec": "d"}
_SHAPES = {
    "AutoEncoder": {**_LINEAR, "bias": "d"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "d", "threshold": ""},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "d", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**_MATRICES, "threshold": ""},
    "JumpReluAutoEncoder": {**_MATRICES, "threshold": "c"},
}
"""The weights of every class that is read, in one order."""


def recognises(path: Path) -> bool:
    """Whether this is a folder in dictionary_learning's layout."""
    return (path / WEIGHTS).is_file()


def load(folder: Path) -> SparseAutoencoder:
    """Read such a folder.

    Raises:
        UserError: it is damaged, or of a class whose codes ours could not reproduce.
    """
    path = folder / CONFIG
    trainer = read_config(path).get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(name, str) or name not in _SHAPES:
        raise UserError(f"{path}: an SAE of class {name!r}; {', '.join(_SHAPES)} are read")
    tensors, counts = _tensors(folder / WEIGHTS)
    W_enc, b_enc_c, W_dec, b_dec_d, *rest = take(folder / WEIGHTS, tensors, _SHAPES[name])
    linear = "encoder.weight" in _SHAPES[name]
    W_enc_dc, W_dec_cd = (W_enc.T, W_dec.T) if linear else (W_enc, W_dec)
    if name != "JumpReluAutoEncoder":
        b_enc_c = fold_b_dec(b_enc_c, W_enc_dc, b_dec_d)
    if name == "AutoEncoder":  # its loader makes the rows of W_dec units, and scales codes alike
        length_c = W_dec_cd.norm(dim=1)
        W_enc_dc, b_enc_c = W_enc_dc * length_c, b_enc_c * length_c
        W_dec_cd = torch.nn.functional.normalize(W_dec_cd, dim=1)
    k, threshold_c = None, torch.zeros_like(b_enc_c)
    if name == "AutoEncoderTopK":
        k = positive(folder / WEIGHTS, counts, "k", most=len(b_enc_c))
    elif rest:  # codes are gated after a ReLU, so a negative threshold acts as zero
        threshold_c = rest[0].clamp(min=0).expand_as(b_enc_c).contiguous()
    return SparseAutoencoder(W_enc_dc, b_enc_c, W_dec_cd, b_dec_d, threshold_c, k)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and the whole numbers that are saved among them (k, sizes of groups)."""
    saved = read_pickle(path)
    if not isinstance(saved, dict) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise UserError(f"{path}: holds no state dict")
    counts = {name: saved[name].tolist() for name in ("k", "group_sizes") if name in saved}
    return {name: tensor for name, tensor in saved.items() if name not in counts}, counts
