"""One image backend, so that a model gives the same embeddings wherever it is loaded.

transformers has most image processors twice and takes the one on torchvision where that is
installed, the one on Pillow elsewhere. They round differently when they resize, by one grey level
of 256 here and there, which moved unit embeddings of small random models by up to .007. Neither
the processor's files nor the name of its class decide which one is taken: only `backend=` when it
is loaded does (transformers 5.23, AutoImageProcessor).

Pillow is always there, so that is the one. Processors with a video half cannot be made without
torchvision; they keep its backend, which they then find everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

_PILLOW = {"backend": "pil"}


def use_pillow(transformer: Transformer, path: str, **at: Any) -> None:
    """Give `transformer` the Pillow variant of its image processor, here and where it is saved.

    Args:
        transformer: just loaded; nothing is changed where its processor has no such variant or
            needs torchvision anyway.
        path: the folder or hub id it was loaded from.
        at: what says which version of a hub id (`revision`).
    """
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import PilBackend

    processor: Any = transformer.processor
    if not hasattr(processor, "image_processor") or hasattr(processor, "video_processor"):
        return
    if not isinstance(processor.image_processor, PilBackend):
        processor.image_processor = AutoImageProcessor.from_pretrained(path, **_PILLOW, **at)
    if isinstance(processor.image_processor, PilBackend):
        # what `SentenceTransformer(folder)` then passes to the processor, too
        pinned: Any = transformer
        pinned.processor_kwargs = _PILLOW
        pinned.config_keys = [*transformer.config_keys, "processor_kwargs"]
