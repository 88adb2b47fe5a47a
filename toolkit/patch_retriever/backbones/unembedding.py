"""Logit lens: the vocabulary tokens that a direction of the residual stream speaks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.backbones.families import final_norm_path
from patch_retriever.backbones.readout import LAST

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor

CHUNK_LOGITS = 16_777_216
"""Logits that are alive at a time (64 MiB in float32)."""


def nearest_tokens(
    transformer: Transformer, directions_cd: Tensor, site: str, k: int = 8
) -> tuple[list[list[str]], str]:
    """The `k` tokens with the largest logits of every direction (c, d), and which unembedding.

    A direction is multiplied with the unembedding as it is where `site` is `last_hidden_state`,
    which comes after the final norm; one of `layers.N` goes through the final norm first
    (nostalgebraist's logit lens). Tokens are decoded, leading space and all.

    Backbones are loaded without their head. So the unembedding is the model's head if there is one,
    else the head in the checkpoint's files, else (tied models save none) the input embeddings.
    """
    model: Any = transformer.model
    tokenizer: Any = transformer.tokenizer
    unembedding_vd, source = unembedding_of(model)
    unembedding_vd = unembedding_vd[: len(tokenizer)]  # models pad it
    norm = model.get_submodule(final_norm_path(model)) if site != LAST else None
    ids: list[list[int]] = []
    with torch.no_grad():
        for part_md in directions_cd.split(max(1, CHUNK_LOGITS // len(unembedding_vd))):
            x_md = part_md.to(unembedding_vd)
            logits_mv = (x_md if norm is None else norm(x_md)) @ unembedding_vd.T
            ids += logits_mv.topk(min(k, len(unembedding_vd)), dim=1).indices.tolist()
    text = {i: tokenizer.decode([i]) for i in {i for row in ids for i in row}}
    return [[text[i] for i in row] for row in ids], source


def unembedding_of(model: Any) -> tuple[Tensor, str]:
    """The unembedding (v, d) on the model's device, and where it is from."""
    head = model.get_output_embeddings()
    if head is not None:
        return head.weight, "output embeddings"
    inputs_vd = model.get_input_embeddings().weight
    saved_vd = _saved_head(model.config.name_or_path)
    if saved_vd is not None:
        return saved_vd.to(inputs_vd), "output embeddings, from the checkpoint"
    return inputs_vd, "input embeddings; the checkpoint has no output embeddings of its own"


def _saved_head(name_or_path: str) -> Tensor | None:
    """`lm_head.weight` of a checkpoint that is on this machine, if it has one."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str) -> Path | None:
        path = cached_file(
            name_or_path,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    index = find("model.safetensors.index.json")
    if index is not None:
        files = json.loads(index.read_text())["weight_map"]
        paths = {find(file) for name, file in files.items() if name.endswith("lm_head.weight")}
    else:
        paths = {find("model.safetensors")}
    for path in filter(None, paths):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name.endswith("lm_head.weight"):
                    return file.get_tensor(name)
    return None
