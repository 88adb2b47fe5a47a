"""Items to model inputs, in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.backbones.load import device_of
from patch_retriever.items import Item
from patch_retriever.progress import Progress, no_progress

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def item_batches(
    transformer: Transformer,
    items: Sequence[Item],
    batch_size: int,
    progress: Progress = no_progress,
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(item numbers, preprocessed features on the model's device), similar lengths together."""
    order = sorted(range(len(items)), key=lambda i: (items[i].kind, len(items[i].text or "")))
    starts = range(0, len(order), batch_size)
    for start in progress(starts, len(starts)):
        numbers = order[start : start + batch_size]
        yield numbers, preprocessed(transformer, [items[i].load() for i in numbers])


def preprocessed(transformer: Transformer, loaded: list[Any]) -> dict[str, Any]:
    """One batch of loaded items as features on the model's device."""
    device = device_of(transformer)
    features = transformer.preprocess(loaded)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
