"""Chat templates for processors that have none, so that every family takes the same messages.

An item is a chat of one message everywhere (`Item.load`), and a readout's prompt is written into
the chat template. Two families' own processors take no chat: PaliGemma's refuses a text without a
picture, Chameleon's loses its template when it is loaded again. Both are given transformers'
`LlavaProcessor` around the same image processor and tokenizer, which writes one image token a patch
where the template says a picture, and a template that writes the family's own layout. So they load
with plain sentence-transformers, too.
"""

from __future__ import annotations

import json
from math import isqrt
from typing import TYPE_CHECKING, Any

from patch_retriever.backbones.families import PLAIN_LAYOUT, family_of

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def take_chats(transformer: Transformer) -> None:
    """Make a transformer with an image processor take chats of texts, pictures and both."""
    from transformers import LlavaProcessor

    family = family_of(transformer.config)
    own: Any = transformer.processor
    layout, picture = PLAIN_LAYOUT, getattr(own, "image_token", "<image>")
    if family is not None:
        layout, picture = family.layout or layout, family.picture or picture
        if family.text_options:
            asked = transformer.processing_kwargs
            text = {**asked.get("text", {}), **dict(family.text_options)}
            transformer.processing_kwargs = {**asked, "text": text}
    if family is not None and family.layout is not None and not isinstance(own, LlavaProcessor):
        transformer.processor = _one_token_a_patch(own)
    processor: Any = transformer.processor
    if getattr(processor, "chat_template", None) is None:
        filled = layout.replace("@picture@", json.dumps(picture))
        start = json.dumps(_start(processor.tokenizer))
        processor.chat_template = filled.replace("@start@", start)
    if "message" not in transformer.modality_config or "text" not in transformer.modality_config:
        _set_modalities(transformer)


def _one_token_a_patch(own: Any) -> Any:
    """A `LlavaProcessor` that makes as many image tokens of a picture as `own` does."""
    from transformers import LlavaProcessor

    image = own.image_processor
    shape: Any = image.crop_size if getattr(image, "do_center_crop", None) else image.size
    side = shape["height"] or shape["shortest_edge"]
    return LlavaProcessor(
        image,
        own.tokenizer,
        patch_size=side // isqrt(own.image_seq_length),
        image_token=own.image_token,
    )


def _start(tokenizer: Any) -> str:
    """What the tokenizer puts before a text. In the template it is written whatever the text says;
    transformers leaves its own out for a whole batch whose first text begins with it."""
    first = tokenizer("a")["input_ids"][0]
    return tokenizer.bos_token if first == tokenizer.bos_token_id is not None else ""


def _set_modalities(transformer: Transformer) -> None:
    """Read texts, pictures, both and chats from the same output."""
    formatter = transformer.input_formatter
    formatter.processor = transformer.processor
    params: Any = {"method": "forward", "method_output_name": "last_hidden_state"}
    message: Any = {**params, "format": formatter.message_format}
    transformer.modality_config = {
        "text": params,
        "image": params,
        ("image", "text"): params,
        "message": message,
    }
    formatter.supported_modalities = list(transformer.modality_config)
