"""Encoders by name: any sentence-transformers model, and the base of one that `build` made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch_retriever.ahead import WORKERS
from patch_retriever.backbones.families import family_of
from patch_retriever.backbones.load import (
    BUILT_IN,
    built_in_model,
    check_device,
    load_backbone,
    make_whole,
    with_readout,
)
from patch_retriever.backbones.readout import Readout
from patch_retriever.backbones.strict import strict_loading
from patch_retriever.errors import UserError
from patch_retriever.hub import commit_of
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.export import pooled_value
from patch_retriever.retrieval.encoder import Encoder
from patch_retriever.retrieval.remote_code import load_model
from patch_retriever.runs import is_ours

BASE = "@base"
"""Ends the name of a model that `build` made: its backbone and readout, without its patch."""


def load_encoder(
    name: str,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    workers: int = WORKERS,
) -> Encoder:
    """An encoder of any sentence-transformers model: a folder, a hub id, the built-in model, or
    `FOLDER@base` for the backbone and readout of a folder that `build` made, without its patch. A
    bare MLLM takes texts, pictures and both as `load_backbone`'s does, and is pooled by the mean.
    `revision` of a hub id is a branch, a tag or a commit; None for the newest.

    Raises:
        UserError: there is none of that name, it does not load whole, or it has code of its own
            that is not ours, without `trust_remote_code`.
    """
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.util import load_file_path

    check_device(device)
    path = str(built_in_model()) if name == BUILT_IN else name
    if revision is not None and (name.endswith(BASE) or Path(path).exists()):
        raise UserError(f"{name}: a folder has no revisions; leave {revision!r} out")
    if name.endswith(BASE):
        return _load_base(name, device, workers, trust_remote_code)
    check_model(path)
    commit = None if revision is None else commit_of(path, revision)
    with strict_loading(name):
        model = load_model(path, device, commit, trust_remote_code)
    first: Any = model[0]
    bare = load_file_path(path, "modules.json", revision=commit) is None
    if bare and isinstance(first, Transformer) and family_of(first.config) is not None:
        make_whole(first)
    return Encoder(model, name, workers=workers)


def check_model(name: str) -> None:
    """Refuse what is plainly no model, before anything is loaded or encoded.

    Raises:
        UserError: no such folder, or no model in it.
    """
    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{name}: no such model folder")
    if "@" in name and not folder.exists():
        raise UserError(
            f"{name}: no such model; {BASE} after a folder that `build` made names its backbone "
            "and readout without the patch"
        )
    if folder.is_dir() and not (
        {p.name for p in folder.iterdir()} & {"modules.json", "config.json"}
    ):
        if is_ours(folder):
            raise UserError(f"{name}: its build has not finished; run the same build again")
        raise UserError(
            f"{name}: no model in this folder (modules.json and config.json are missing)"
        )


def _load_base(name: str, device: str, workers: int, trust_remote_code: bool) -> Encoder:
    """The backbone and readout of an exported patch. A patch that leaves the tokens alone shares
    its trunk with its base, so that one encoding serves both."""
    from sentence_transformers.base.modules import Normalize

    folder = name.removesuffix(BASE)
    check_model(folder)
    patch = Patch.load(Path(folder) / "patch")
    readout = Readout.from_json(patch.about["readout"])
    if patch.subtractions:
        backbone = with_readout(load_backbone(folder, "auto", device), readout)
        return Encoder(backbone, name, workers=workers)
    with strict_loading(folder):
        model = load_model(folder, device, trust_remote_code=trust_remote_code)
    transformer: Any = model[0]
    d = int(transformer.get_embedding_dimension())
    at = pooled_value(patch, d, readout.pooling)
    return Encoder(model, name, head=[_Take(at, d), Normalize()], workers=workers)


class _Take(nn.Module):
    """Keeps the parts of a pooled vector that a readout without a patch gives: `width` entries from
    each of the places `at`."""

    def __init__(self, at: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.at, self.width = at, width

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = features["sentence_embedding"]
        taken = torch.cat([pooled[:, at : at + self.width] for at in self.at], dim=1)
        return {**features, "sentence_embedding": taken}

    def get_config_dict(self) -> dict[str, Any]:
        return {"at": list(self.at), "width": self.width}
