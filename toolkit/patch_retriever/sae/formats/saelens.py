"""SAELens' layout, which is ours: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError
from patch_retriever.files import write_json, write_tensors
from patch_retriever.sae.model import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def save(sae: SparseAutoencoder, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`; `about` becomes the metadata."""
    write_tensors(
        folder / WEIGHTS,
        {
            "W_enc": sae.W_enc_dc,
            "b_enc": sae.b_enc_c,
            "W_dec": sae.W_dec_cd,
            "b_dec": sae.b_dec_d,
            "threshold": sae.threshold_c,
        },
    )
    config = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.n_concepts,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": about or {},
    }
    write_json(folder / CONFIG, config)


def load(folder: Path) -> SparseAutoencoder:
    """Read such a folder.

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
        return SparseAutoencoder(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], t["threshold"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable SAE ({error})") from None
