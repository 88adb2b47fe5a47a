"""Where things are in the MLLM families: decoder layers and image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_DECODERS = ("language_model", "text_model", "model.language_model", "model.text_model", "model")


def decoder_path(model: nn.Module) -> str:
    """Dotted path, inside `model`, of the language model whose `layers` are the decoder layers.

    Raises:
        UserError: no such part was found.
    """
    for path in _DECODERS:
        part: Any = model
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is not None and hasattr(part, "layers"):
            return path
    raise UserError(
        f"{type(model).__name__}: no decoder layers found at {', '.join(_DECODERS)}; "
        "this model family is not known yet"
    )


def n_layers(model: nn.Module) -> int:
    """Number of decoder layers."""
    return len(model.get_submodule(decoder_path(model) + ".layers"))  # type: ignore[arg-type]


def image_token_id(config: Any) -> int | None:
    """The id of the placeholder that image features replace, or None if the model has none."""
    for name in ("image_token_id", "image_token_index"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return None


def residual_norm(model: nn.Module) -> str | None:
    """Name, inside a decoder layer, of the norm that reads the residual stream between attention
    and MLP; None where the family has none (attention and MLP side by side, norms after them)."""
    layer: Any = model.get_submodule(decoder_path(model) + ".layers.0")
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma: the other one is after the attention
        return "pre_feedforward_layernorm"
    if hasattr(layer, "post_feedforward_layernorm"):  # OLMo 2: norms after both
        return None
    return "post_attention_layernorm" if hasattr(layer, "post_attention_layernorm") else None
