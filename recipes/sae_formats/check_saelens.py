"""Does SAELens read what we save? Its codes beside ours, for folders with `codes.safetensors`.

Runs where sae-lens is installed (see make_fixtures.py, which writes such folders as `ours`):

    env/bin/python recipes/sae_formats/check_saelens.py tests/sae/formats/fixtures/ours/*
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

LIMIT = 1e-5


@torch.no_grad()
def check(folder: Path) -> bool:
    """Load the folder with SAELens' own loader; whether both codes and reconstruction are ours."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    expected = load_file(folder / "codes.safetensors")
    codes_nc = sae.encode(expected["x"])
    codes = float((codes_nc - expected["codes"]).abs().max())
    reconstruction = float((sae.decode(codes_nc) - expected["reconstruction"]).abs().max())
    print(
        f"{folder}: {sae.cfg.architecture()}, {int((codes_nc != 0).sum())} of {codes_nc.numel()} "
        f"codes active; largest difference {codes:.1e}, of reconstructions {reconstruction:.1e}; "
        f"metadata {sae.cfg.metadata.to_dict()}"
    )
    return max(codes, reconstruction) <= LIMIT


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        sys.exit("usage: check_saelens.py FOLDER...")
    if not all([check(folder) for folder in folders]):
        sys.exit(f"differs by more than {LIMIT}")
