"""SAEs that each package saved itself (recipes/sae_formats), to load or to spoil."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patch_retriever.errors import UserError
from patch_retriever.sae.formats import load_sae

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "sae.pt")
K = 3


class Saved:
    """A saved SAE: its folder, its files, and how to load it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.weights,) = [p for p in folder.iterdir() if p.name in WEIGHTS]
        self.config = next((p for p in folder.iterdir() if p.suffix == ".json"), None)
        self.source = self.weights if self.config is None else folder
        self.k = K if self.config is None else None

    def load(self):
        return load_sae(self.source, self.k)

    def codes(self):
        """Activations, and the codes and the reconstruction that the package gave for them."""
        expected = load_file(self.folder / "codes.safetensors")
        return expected["x"], expected["codes"], expected["reconstruction"]

    def tensors(self):
        if self.weights.suffix == ".pt":
            return torch.load(self.weights, weights_only=True)
        return load_file(self.weights)

    def change_tensors(self, **changes) -> None:
        """Write the weights with these tensors changed, or left out where None."""
        tensors = {**self.tensors(), **changes}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        (torch.save if self.weights.suffix == ".pt" else save_file)(kept, self.weights)

    def change_config(self, *without: str, **changes) -> None:
        """Write the config with these settings changed, or left out."""
        config = {**json.loads(self.config.read_text()), **changes}
        self.config.write_text(json.dumps({k: v for k, v in config.items() if k not in without}))

    def assert_refused(self, file: Path, *words: str) -> None:
        """Refused in one line that begins with the file and holds the words."""
        with pytest.raises(UserError) as error:
            self.load()
        line = str(error.value)
        assert line.startswith(f"{file}: ")
        assert "\n" not in line
        for word in words:
            assert word in line


def assert_same_codes(saved: Saved) -> None:
    """Loaded, it gives the codes and the reconstruction that the package gave; codes of SAELens'
    standardised tokens are ours in the tokens' own units."""
    sae = saved.load()
    x_nd, codes_nc, reconstruction_nd = saved.codes()
    assert (codes_nc == 0).any() and (codes_nc != 0).any()
    if sae.input_scale == "token":
        codes_nc = codes_nc * x_nd.std(1, keepdim=True)
    found_nc = sae.encode(x_nd)
    torch.testing.assert_close(found_nc, codes_nc, atol=1e-5, rtol=0)
    torch.testing.assert_close(sae.decode(found_nc, x_nd), reconstruction_nd, atol=1e-5, rtol=0)
