"""A patch in the middle of the model as sentence-transformers modules, with code of its own.

No stock module can change the residual stream on its way through the layers, nor divide a token by
its own standard deviation. So the export of such a patch holds a copy of `patched_transformer.py`,
and whoever loads it has to say `trust_remote_code=True`. With the code there, all of the patch is
in it, so that `encode(..., patch=False)` switches all of it off.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patch_retriever.backbones.families import casts_pictures, layers_path
from patch_retriever.backbones.readout import PoolingMode, layer_number
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.export import Layout
from patch_retriever.patch.operators import Gate, Subtract, compose
from patch_retriever.sae.scale import EPSILON

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

    from patch_retriever.patch.patched_transformer import PatchedMaps, PatchedTransformer

CODE = Path(__file__).with_name("patched_transformer.py")
"""The file that travels with the folder."""


def needs_code(patch: Patch, transformer: Transformer) -> bool:
    """Whether an export of `patch` on this backbone holds code of its own."""
    scaled = patch.subtract is not None and patch.subtract.input_scale == "token"
    return bool(patch.layers) or scaled or casts_pictures(transformer.model)


def patched_modules(
    transformer: Transformer, patch: Patch, pooling: PoolingMode
) -> list[nn.Module]:
    """The whole model, around the model and processor of `transformer`, which stays as it is."""
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    d = transformer.get_embedding_dimension()
    layout = Layout.of(patch, d, pooling)
    modules: list[nn.Module] = [
        _patched(transformer, patch, layout.raw_beside),
        Pooling(layout.width // len(layout.pooling), layout.pooling),
    ]
    if patch.maps or not layout.plain:
        modules.append(_maps(patch, layout))
    return [*modules, Normalize()]


def _patched(transformer: Transformer, patch: Patch, keep_raw: bool) -> PatchedTransformer:
    from patch_retriever.patch.patched_transformer import READOUT, PatchedTransformer, Subtraction

    def subtraction(subtract: Subtract) -> Subtraction:
        tensors = {name: subtract.tensors[name] for name in Subtraction.FIELDS}
        if subtract.input_scale == "token":
            tensors[Subtraction.EPSILON] = torch.tensor(EPSILON)
        return Subtraction(tensors)

    subtractions = {str(layer_number(s)): subtraction(patch.layers[s]) for s in patch.layers}
    if patch.subtract is not None:
        subtractions[READOUT] = subtraction(patch.subtract)
    made: Any = copy(transformer)
    made.__dict__["_modules"] = dict(transformer._modules)  # a copy of a module shares them
    made.__dict__.pop("forward", None)  # nnsight's, if the model was probed
    made.__class__ = PatchedTransformer
    made.config_keys = sorted({*PatchedTransformer.config_keys, *transformer.config_keys})
    made.set_patch(layers_path(transformer.model), subtractions, keep_raw)
    return made


def _maps(patch: Patch, layout: Layout) -> PatchedMaps:
    from patch_retriever.patch.patched_transformer import PatchedMaps

    roles = (QUERY, DOCUMENT) if any(step.by == "role" for step in patch.maps) else (DOCUMENT,)
    width = len(layout.value_at) * layout.d
    composed = [compose(patch.maps, width, role) for role in roles]
    kinds = 3 if patch.gated else 1
    gate = patch.gate or Gate(torch.zeros(2, layout.d), torch.zeros(2), 0.0)
    tensors = {
        "weight_rkde": torch.stack([weight_kde[:kinds] for weight_kde, _ in composed]),
        "bias_rke": torch.stack([bias_ke[:kinds] for _, bias_ke in composed]),
        "direction_2d": gate.direction_2d,
        "offset_2": gate.offset_2,
    }
    return PatchedMaps(list(layout.value_at), layout.gate_at, tensors)
