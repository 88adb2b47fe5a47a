"""A token limit that cuts neither a picture, nor the template, nor the prompt."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from patch_retriever.backbones.families import family_of
from patch_retriever.backbones.readout import PROMPT_VARIABLE, Room
from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from sentence_transformers.base.modules import Transformer

_NO_LIMIT = 10**30
_SPARE = 8
"""Tokens for what the ends of template, text and prompt become when they meet."""
_SIDES = range(32, 4097, 96)
"""Sides, in pixels, of the pictures that the largest is looked for among."""


def limit_tokens(transformer: Transformer, max_tokens: int) -> Room:
    """Let `transformer` read no more than `max_tokens` tokens of an item, under the readout that is
    set; what that leaves for a text beside a picture, to which the template must see.

    A text alone is cut by the tokenizer, at its end, and sentence-transformers writes the prompt
    and the end of the template over its last tokens. It does not for items with pictures.

    Raises:
        UserError: the largest picture, the template and the prompt do not fit, or the model takes
            no such length.
    """
    most = getattr(transformer.config.get_text_config(), "max_position_embeddings", max_tokens)
    if max_tokens > most:
        raise UserError(f"max_tokens: {max_tokens}, but the model takes {most} tokens at most")
    tokenizer: Any = transformer.tokenizer
    tokenizer.init_kwargs.pop("max_length", None)  # an export's tokenizer.json brings its own
    tokenizer.model_max_length = _NO_LIMIT  # of an earlier readout
    largest = largest_picture(transformer)
    bare, whole = _length(transformer, largest, "a", prompt=""), _length(transformer, largest, "a")
    # one of several takes no more than one alone; some families cut only that one into tiles
    picture = bare - _length(transformer, None, "a", prompt="")
    others = _length(transformer, largest, None), _length(transformer, None, "a")
    least = max(whole, *others) + _SPARE
    if max_tokens < least:
        family = family_of(transformer.config)
        smaller = ", or a smaller max_pixels" if family is not None and family.pixels else ""
        raise UserError(
            f"max_tokens: {max_tokens} is too small; the template, the prompt and the largest "
            f"picture ({picture} tokens) need {least}; give that at least{smaller}"
        )
    tokenizer.model_max_length = max_tokens
    tokenizer.truncation_side = "right"  # the template's start and pictures are left
    return Room(max_tokens - bare - _SPARE, picture, whole - bare)


def largest_picture(transformer: Transformer) -> Image.Image:
    """A picture that becomes as many tokens as any, of a size that the processor's arithmetic
    finds, or of any size where it has none: all are as large there."""
    from PIL import Image

    sizes = list(product(_SIDES, _SIDES))
    processor: Any = transformer.processor
    try:
        tokens = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    except (AttributeError, KeyError, TypeError):
        tokens = [0] * len(sizes)
    _, _, (height, width) = max(
        (n, -size[0] * size[1], size) for n, size in zip(tokens, sizes, strict=True)
    )
    return Image.new("RGB", (width, height))


def _length(
    transformer: Transformer,
    picture: Image.Image | None,
    text: str | None,
    prompt: str | None = None,
) -> int:
    """Tokens of an item, under the readout's prompt or another."""
    parts = {"image": picture, "text": text}
    content = [{"type": kind, kind: part} for kind, part in parts.items() if part is not None]
    options = {} if prompt is None else {PROMPT_VARIABLE: prompt}
    features = transformer.preprocess(
        [[{"role": "user", "content": content}]], processing_kwargs={"chat_template": options}
    )
    return int(features["attention_mask"].sum())
