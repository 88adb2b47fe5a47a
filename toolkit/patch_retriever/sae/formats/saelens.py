"""SAELens' layout, which is ours too: `cfg.json` and `sae_weights.safetensors`.

W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in) and b_dec of one of three architectures: `standard`
(ReLU), `topk` (with `k`) and `jumprelu` (with the tensor `threshold`), which is also what SAELens
saves BatchTopK and Matryoshka SAEs as. SAELens' codes of an SAE with `layer_norm` are of the
standardised token; ours are those times its standard deviation. Semantics from SAELens 6.54
(saes/*.py); configs from before 6.0 name some settings differently
(loading/pretrained_sae_loaders.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_retriever.errors import UserError
from patch_retriever.files import write_json, write_tensors
from patch_retriever.sae.formats.reading import (
    fold_b_dec,
    positive,
    read_config,
    read_safetensors,
    take,
)
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.scale import InputScale

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAVED_BY = "patch-retriever"

_OTHERS = {
    "gated": "its gate and its codes have biases of their own",
    "abstopk": "its codes may be negative",
    "matching_pursuit": "its codes are searched for, not encoded",
    "temporal": "its codes depend on the tokens before",
    "transcoder": "it maps one site's activations to another's",
    "skip_transcoder": "it maps one site's activations to another's",
    "jumprelu_transcoder": "it maps one site's activations to another's",
    "jumprelu_skip_transcoder": "it maps one site's activations to another's",
    "batchtopk": "a training checkpoint; SAELens' save_inference_model() writes a jumprelu SAE",
    "matryoshka_batchtopk": "a training checkpoint; SAELens' save_inference_model() writes a "
    "jumprelu SAE",
}
"""Architectures of SAELens that are not read, and why."""

_NORMALISATIONS = {
    "expected_average_only_in": "fold the scale in (fold_activation_norm_scaling_factor)",
    "covariance_whitening": "fold the whitening in (fold_activation_whitening)",
    "constant_norm_rescale": "each token has its own scale, which no weights can hold",
}
"""What else SAELens may do to activations before they are encoded, and why that is not read."""

_INPUT_SCALES: dict[str, InputScale] = {"none": "none", "layer_norm": "token"}
"""Our names of what is read."""


def save(sae: SparseAutoencoder, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`; `about` becomes the metadata."""
    tensors = {
        "W_enc": sae.W_enc_dc,
        "b_enc": sae.b_enc_c,
        "W_dec": sae.W_dec_cd,
        "b_dec": sae.b_dec_d,
    }
    gate: dict[str, Any]
    if sae.k is None:
        tensors["threshold"] = sae.threshold_c
        gate = {"architecture": "jumprelu"}
    else:
        gate = {"architecture": "topk", "k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_tensors(folder / WEIGHTS, {name: tensor.float() for name, tensor in tensors.items()})
    config = {
        **gate,
        "d_in": sae.d_in,
        "d_sae": sae.n_concepts,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": next(k for k, v in _INPUT_SCALES.items() if v == sae.input_scale),
        "metadata": about or {},
        "saved_by": SAVED_BY,
        # the first version with these settings; without it SAELens drops the metadata
        "sae_lens_version": "6.0.0",
    }
    write_json(folder / CONFIG, config)


def recognises(path: Path) -> bool:
    """Whether this is a folder in SAELens' layout."""
    return (path / WEIGHTS).is_file()


def is_ours(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return recognises(folder) and read_config(folder / CONFIG).get("saved_by") == SAVED_BY


def load(folder: Path) -> SparseAutoencoder:
    """Read such a folder, whoever saved it.

    Raises:
        UserError: it is damaged, or an SAE whose codes ours could not reproduce.
    """
    path = folder / CONFIG
    config = read_config(path)
    architecture = _architecture(path, config)
    input_scale = _input_scale(path, config)
    shapes = {"W_enc": "dc", "b_enc": "c", "W_dec": "cd", "b_dec": "d"}
    if architecture == "jumprelu":
        shapes["threshold"] = "c"
    d, c = positive(path, config, "d_in"), positive(path, config, "d_sae")
    tensors = _without_unused_scale(read_safetensors(folder / WEIGHTS))
    W_enc_dc, b_enc_c, W_dec_cd, b_dec_d, *rest = take(folder / WEIGHTS, tensors, shapes, d=d, c=c)
    k = None
    if architecture == "topk":
        old = config.get("activation_fn_kwargs")  # where k was before 6.0
        k = positive(path, old if isinstance(old, dict) and "k" in old else config, "k", most=c)
        if config.get("rescale_acts_by_decoder_norm", False):
            length_c = W_dec_cd.norm(dim=1)
            W_enc_dc, b_enc_c = W_enc_dc * length_c, b_enc_c * length_c
            W_dec_cd = torch.nn.functional.normalize(W_dec_cd, dim=1)
    if config.get("apply_b_dec_to_input", True):
        b_enc_c = fold_b_dec(b_enc_c, W_enc_dc, b_dec_d)
    # SAELens gates after a ReLU, so negative thresholds act as zero
    threshold_c = rest[0].clamp(min=0) if rest else torch.zeros_like(b_enc_c)
    return SparseAutoencoder(W_enc_dc, b_enc_c, W_dec_cd, b_dec_d, threshold_c, k, input_scale)


def _architecture(path: Path, config: dict[str, Any]) -> str:
    """`standard`, `topk` or `jumprelu`."""
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if function == "topk":
        return "topk"
    if function != "relu":
        raise UserError(f"{path}: an SAE with the activation {function!r}; relu and topk are read")
    if architecture in ("standard", "topk", "jumprelu"):
        return architecture
    reason = _OTHERS.get(str(architecture), "unknown here")
    raise UserError(
        f"{path}: an SAE of architecture {architecture!r} ({reason}); standard, topk and jumprelu "
        "are read"
    )


def _input_scale(path: Path, config: dict[str, Any]) -> InputScale:
    """What SAELens does to activations, in our words."""
    name = config.get("normalize_activations") or "none"
    if name is True:  # before 6.0
        name = "expected_average_only_in"
    if not isinstance(name, str) or name not in _INPUT_SCALES:
        raise UserError(
            f"{path}: an SAE of activations normalised by {name!r}, which its weights do not hold; "
            + _NORMALISATIONS.get(str(name), f"only {' and '.join(_INPUT_SCALES)} are read")
        )
    return _INPUT_SCALES[name]


def _without_unused_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the scale of the codes that old versions saved with every SAE, if all ones."""
    scale = tensors.get("scaling_factor")
    if scale is None or not bool((scale == 1).all()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}
