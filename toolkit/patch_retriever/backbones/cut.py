"""Decoders that end early: the same weights, fewer layers, and the final norm after the last.

A readout in the middle of the model needs no layer behind it. The cut model is one of the same
family whose configuration says how many layers it has, so that it runs, saves and loads everywhere
as any other; what it leaves out is neither run nor exported.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patch_retriever.backbones.families import decoder_path, n_layers, residual_norm
from patch_retriever.backbones.readout import BEFORE_MLP, layer_number
from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists of the configuration with an entry for every decoder layer."""
_NNSIGHT_STATE = "__nnsight__"
"""Where nnsight keeps, on a module, that it wrapped it."""
_LAST_OF_MLP = ("down_proj", "fc2", "w2", "dense_4h_to_h")


def can_skip_mlp(model: nn.Module) -> bool:
    """Whether the decoder can end before its last layer's MLP (`layers.N.attention`)."""
    decoder: Any = model.get_submodule(decoder_path(model))
    layer = decoder.layers[-1]
    return residual_norm(model) is not None and _end_of_mlp(layer) is not None


def stream_is_whole(model: Any, cut: str | None) -> bool:
    """Whether the final norm of the stream at a cut is what the cut decoder gives. Qwen3-VL
    adds image features after its first layers, which the stream there does not have yet."""
    vision = getattr(model.config, "vision_config", None)
    added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return cut is None or layer_number(cut.removesuffix(BEFORE_MLP)) >= added


def cut_at(transformer: Transformer, cut: str | None) -> Transformer:
    """`transformer` with a decoder that ends at `cut` (`Readout.cut`); itself where it does so
    already. Weights and processor are shared, and nothing of the original is changed.

    Its `last_hidden_state` is the final norm of the residual stream at the cut. Without the last
    MLP the layer stays whole, so that no loader has to know: what the MLP adds is zero.

    Raises:
        UserError: there is no such layer, or this family's MLP cannot be left out.
    """
    if cut is None:
        return transformer
    model: Any = transformer.model
    number = layer_number(cut.removesuffix(BEFORE_MLP))
    have = n_layers(model)
    if number >= have:
        raise UserError(f"cut {cut}: the model's layers are layers.0 to layers.{have - 1}")
    path = decoder_path(model)
    layers: list[nn.Module] = list(model.get_submodule(path).layers)[: number + 1]
    if cut.endswith(BEFORE_MLP):
        if not can_skip_mlp(model):
            raise UserError(f"cut {cut}: this family's MLP cannot be left out; cut after a layer")
        layers[-1] = _without_mlp(layers[-1])
    if number + 1 == have and layers[-1] is model.get_submodule(path).layers[-1]:
        return transformer
    made: Any = _twin(transformer)
    made._modules["model"] = _with_layers(model, path, layers)
    return made


def _with_layers(model: Any, path: str, layers: list[nn.Module]) -> Any:
    """A copy of `model`, down to its decoder, that has these layers."""
    config = deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    for name in _PER_LAYER:
        if isinstance(getattr(text, name, None), (list, tuple)):
            setattr(text, name, list(getattr(text, name))[: len(layers)])
    made = part = _twin(model)
    part.config = config
    for name in filter(None, path.split(".")):
        part._modules[name] = part = _twin(part._modules[name])
        part.config = text if name == path.rpartition(".")[2] else config
    part._modules["layers"] = nn.ModuleList(layers)
    return made


def _without_mlp(layer: nn.Module) -> nn.Module:
    """A copy of a decoder layer whose MLP adds nothing."""
    path = _end_of_mlp(layer)
    assert path is not None
    made = part = _twin(layer)
    *parents, last = path.split(".")
    for name in parents:
        part._modules[name] = part = _twin(part._modules[name])
    linear: Any = part._modules[last]
    if not linear.weight.any() and (linear.bias is None or not linear.bias.any()):
        return layer
    silent = _twin(linear)
    for name, parameter in linear.named_parameters(recurse=False):
        silent.register_parameter(name, nn.Parameter(torch.zeros_like(parameter), False))
    part._modules[last] = silent
    return made


def _end_of_mlp(layer: nn.Module) -> str | None:
    """Path, inside a decoder layer, of the linear layer that ends its MLP; None where there is not
    exactly one (experts)."""
    found = [
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _LAST_OF_MLP
    ]
    return found[0] if len(found) == 1 else None


def _twin(module: Any) -> Any:
    """A copy of a module that shares its children and parameters but not the list of them."""
    made = copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        made.__dict__[name] = dict(module.__dict__[name])
    for name in ("forward", _NNSIGHT_STATE):  # of nnsight or accelerate, bound to the original
        made.__dict__.pop(name, None)
    if (hook := made.__dict__.pop("_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module

        made.__dict__.pop("_old_forward", None)
        add_hook_to_module(made, hook)
    return made
