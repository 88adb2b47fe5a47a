"""The MLLM families: one record each, and where things are in their models.

A family that has no record is probed by the tree of its modules, and `assumed` says what was taken
for what.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from torch import nn

PixelBudget = Literal["area", "edge", "tiles", "grids"]
"""How an image processor is told how large a picture may be: `size` as an area in pixels, `size` as
the longest edge, a number of tiles, or a list of grids of tiles."""


@dataclass(frozen=True)
class Family:
    """What is particular to a family, as transformers 5 has it.

    Everywhere `last_hidden_state`, which is also the last of transformers' `hidden_states`, comes
    after the final norm, and `layers.N` before it.
    """

    name: str
    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    decoder: str = "language_model"
    """Path, inside the model without its head, of the part with `layers` and `norm`; "" for the
    model itself."""
    picture: str | None = None
    """What a chat template says for a picture, if more than the processor's `image_token`."""
    layout: str | None = None
    """The chat template of a family whose own processor takes none (see `chat`)."""
    text_options: tuple[tuple[str, Any], ...] = ()
    """Options of the tokenizer that the model needs."""
    pixels: PixelBudget | None = None
    """None: every picture becomes the same number of tokens."""
    two_way: bool = False
    """Whether some tokens see later ones; transformers' flash attention makes it causal."""
    kept: tuple[str, ...] = ()
    """Parts that a device map cannot offload to the CPU or the disk."""
    pictures_to: str | None = None
    """Part that takes pictures in its own dtype and is given float32; all others cast them."""
    quirks: str = ""


# the texts of all turns, one after the other
_TEXTS = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endfor -%}"""
# the pictures of all turns, one after the other
_PICTURES = """\
{%- for message in messages -%}{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ @picture@ }}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}"""

PLAIN_LAYOUT = "{{ @start@ }}" + _PICTURES + _TEXTS
"""The template of a processor that was saved without one: pictures, then text. Filled in are
`@start@`, what the tokenizer puts before a text, and `@picture@`."""

_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

FAMILIES = (
    Family(
        "Qwen2-VL",
        ("qwen2_vl",),
        picture=_QWEN_PICTURE,
        pixels="area",
        quirks="Needs torchvision.",
    ),
    Family(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        picture=_QWEN_PICTURE,
        pixels="area",
        quirks="Needs torchvision.",
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl", "qwen3_vl_moe"),
        picture=_QWEN_PICTURE,
        pixels="area",
        quirks="Needs torchvision. Image features are added after its first layers, too. The "
        "paper's code reads it before the final norm, at the last of `layers.N`.",
    ),
    Family(
        "PaliGemma",
        ("paligemma",),
        layout=_PICTURES + "{{ bos_token }}" + _TEXTS + "{{ '\\n' }}",
        # without them transformers runs it causally; with zeros every token sees every other
        text_options=(("return_token_type_ids", True),),
        two_way=True,
        quirks="Every token sees every other, as in its training; its own processor takes no text "
        "without a picture, ours does.",
    ),
    Family(
        "Chameleon",
        ("chameleon",),
        decoder="",
        picture="<racm3:break><image><eoss>",
        layout="{{ @start@ }}" + _PICTURES + _TEXTS + "{{ sep_token }}",
        kept=("vqmodel.quantize",),  # reads its weights without running what holds them
        pictures_to="vqmodel.encoder",
        quirks="Its layers are on the model itself, and its book of codes cannot be offloaded. In "
        "half precision an export needs `trust_remote_code=True`, since pictures have to be cast.",
    ),
    Family("LLaVA", ("llava",)),
    Family("LLaVA-NeXT", ("llava_next",), pixels="grids"),
    Family("LLaVA-OneVision", ("llava_onevision",), pixels="grids", quirks="Needs torchvision."),
    Family("Idefics3", ("idefics3",), decoder="text_model", pixels="edge"),
    Family(
        "SmolVLM",
        ("smolvlm",),
        decoder="text_model",
        pixels="edge",
        quirks="Needs torchvision and num2words.",
    ),
    Family(
        "Gemma 3",
        ("gemma3",),
        two_way=True,
        quirks="Tokens of one picture see each other; all else is causal.",
    ),
    Family("InternVL", ("internvl",), pixels="tiles", quirks="Needs torchvision."),
)
_OF_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def family_of(config: Any) -> Family | None:
    """The record of a model's family, or None if it has none."""
    return _OF_TYPE.get(config.model_type)


def casts_pictures(model: Any) -> bool:
    """Whether pictures have to be brought to the model's dtype, which stock code does not do."""
    import torch

    family = family_of(model.config)
    return bool(family and family.pictures_to) and model.dtype != torch.float32


def decoder_path(model: Any) -> str:
    """Dotted path, inside `model`, of the language model whose `layers` are the decoder layers; ""
    where they are on the model itself.

    Raises:
        UserError: no such part was found.
    """
    if (family := family_of(model.config)) is not None:
        # a model with its head holds the one without it as `model`
        paths = (family.decoder, f"model.{family.decoder}".rstrip("."))
        return next(path for path in paths if hasattr(_part(model, path), "layers"))
    return _probed(model)


def layers_path(model: nn.Module) -> str:
    """Dotted path of the list of decoder layers.

    Raises:
        UserError: no such part was found.
    """
    return f"{decoder_path(model)}.layers".lstrip(".")


def n_layers(model: nn.Module) -> int:
    """Number of decoder layers."""
    return len(model.get_submodule(layers_path(model)))  # type: ignore[arg-type]


def final_norm_path(model: nn.Module) -> str:
    """Dotted path of the norm after the last decoder layer.

    Raises:
        UserError: there is none beside the layers.
    """
    path = decoder_path(model)
    decoder = model.get_submodule(path)
    for name in _NORMS:
        if hasattr(decoder, name):
            return f"{path}.{name}".lstrip(".")
    raise UserError(f"{type(model).__name__}: no final norm found beside its decoder layers")


def image_token_id(config: Any) -> int | None:
    """The id of the placeholder that image features replace, or None if the model has none."""
    for name in ("image_token_id", "image_token_index"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return None


_STANDS_FOR = re.compile(r"(image|video|audio|vision|boi|eoi)\w*_token_(id|index)")
_NAMED = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "fake_image_token")


def placeholders(config: Any, tokenizer: Any, processor: Any) -> tuple[str, ...]:
    """The tokens, as text, that a processor or a model takes for media, the longest first."""
    ids = [value for name, value in vars(config).items() if _STANDS_FOR.fullmatch(name)]
    found = [tokenizer.convert_ids_to_tokens(one) for one in ids if isinstance(one, int)]
    found += [str(getattr(processor, name, "")) for name in _NAMED]
    # a token of a letter or two is a word, too
    tokens = {token for token in found if isinstance(token, str) and len(token) > 2}
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


def residual_norm(model: Any) -> str | None:
    """Name, inside a decoder layer, of the norm that reads the residual stream between attention
    and MLP; None where the family has none (attention and MLP side by side, norms after them)."""
    layer: Any = model.get_submodule(f"{layers_path(model)}.0")
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma: the other one is after the attention
        return "pre_feedforward_layernorm"
    if hasattr(layer, "post_feedforward_layernorm"):  # OLMo 2: norms after both
        return None
    if getattr(model.config, "swin_norm", False):  # Chameleon 30B: likewise
        return None
    return "post_attention_layernorm" if hasattr(layer, "post_attention_layernorm") else None


def assumed(model: Any) -> str | None:
    """What was taken for what in a model whose family has no record; None where it has one.

    Raises:
        UserError: a part was not found.
    """
    if family_of(model.config) is not None:
        return None
    return (
        f"no record of the family {model.config.model_type!r}; taken: {n_layers(model)} decoder "
        f"layers at {layers_path(model)!r}, the final norm at {final_norm_path(model)!r}, image "
        f"token {image_token_id(model.config)}"
    )


def _part(model: nn.Module, path: str) -> Any:
    part: Any = model
    for name in filter(None, path.split(".")):
        part = getattr(part, name, None)
    return part


def _probed(model: Any) -> str:
    """The part that holds layers with attention, of the text's width: the one that holds the input
    embeddings, too, if several do (a vision tower may be as wide)."""
    width = model.config.get_text_config().hidden_size
    embeddings = model.get_input_embeddings()
    found = [path for path, part in model.named_modules() if _has_layers(part, width)]
    beside = [
        path
        for path in found
        if any(child is embeddings for child in model.get_submodule(path).children())
    ]
    if len(chosen := beside or found) != 1:
        raise UserError(
            f"{type(model).__name__}: {len(chosen) or 'no'} parts of its module tree look like the "
            "decoder; this model family is not known yet"
        )
    return chosen[0]


def _has_layers(part: nn.Module, width: int) -> bool:
    from torch import nn

    layers = getattr(part, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    first = layers[0]
    norms = {tuple(p.shape) for p in first.parameters(recurse=True) if p.dim() == 1}
    return any(hasattr(first, name) for name in _ATTENTION) and (width,) in norms
