"""What the unadapted model says about pictures, which an adapter is to leave as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patch_retriever.adapters.losses import retention
from patch_retriever.backbones.families import family_of, final_norm_path
from patch_retriever.backbones.inputs import on_device
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import own_template
from patch_retriever.backbones.unembedding import CHUNK_LOGITS, unembedding_of
from patch_retriever.items import Item

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

ASKED = "describe the image."


@dataclass(frozen=True)
class _Caption:
    """One caption after its picture: the model's input, how many of its last tokens are the
    caption, and the base's final hidden states where those are said."""

    features: dict[str, Any]
    n_tokens: int
    base_td: Tensor


class Captions:
    """Captions with the base's hidden states at their tokens; made before training begins.

    Pictures are asked about in the model's own chat template, without a readout and without the
    patch, as whoever describes pictures with it does. The hidden states (t, d) say the base's next
    tokens as well as its logits (t, vocabulary) would, in less room.
    """

    def __init__(self, transformer: Transformer, captions: Sequence[tuple[Item, str]]) -> None:
        self._transformer = transformer
        model: Any = transformer.model
        self._unembedding_vd, _ = unembedding_of(model)
        text = model.config.get_text_config()
        self._softcap = getattr(text, "final_logit_softcapping", None)
        self._norm = model.get_submodule(final_norm_path(model))
        processor: Any = transformer.processor
        readout = processor.chat_template
        processor.chat_template = own_template(readout) if own_template(readout) else readout
        try:
            prepared = [self._prepared(item, text) for item, text in captions]
        finally:
            processor.chat_template = readout
        with torch.no_grad():
            self._captions = [
                _Caption(features, n, self._hidden(features, n)) for features, n in prepared
            ]

    def __len__(self) -> int:
        return len(self._captions)

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """The retention loss, the mean over some captions."""
        chunk = max(1, CHUNK_LOGITS // len(self._unembedding_vd))
        losses = []
        for number in numbers:
            one = self._captions[number]
            hidden_td = self._hidden(one.features, one.n_tokens)
            losses.append(
                retention(hidden_td, one.base_td, self._unembedding_vd, self._softcap, chunk)
            )
        return torch.stack(losses).mean()

    def _prepared(self, item: Item, text: str) -> tuple[dict[str, Any], int]:
        """The input of a picture with its caption, and how many tokens the caption has."""
        (asked,) = item.load()
        asked["content"].append({"type": "text", "text": ASKED})
        said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        before, features = (
            self._transformer.preprocess([chat]) for chat in ([asked], [asked, said])
        )
        ids_t, before_t = features["input_ids"][0], before["input_ids"][0]
        same = min(len(ids_t), len(before_t))
        differ = (ids_t[:same] != before_t[:same]).nonzero()
        common = int(differ[0]) if len(differ) else same
        n = max(1, len(ids_t) - common)
        family = family_of(self._transformer.config)
        if family and family.text_options and "token_type_ids" in features:
            features["token_type_ids"][:, -n:] = 1  # said, not given: no token sees a later one
        return on_device(features, device_of(self._transformer)), n

    def _hidden(self, features: dict[str, Any], n: int) -> Tensor:
        """The final hidden states that the caption's `n` tokens are said from, (n, d)."""
        seen: list[Tensor] = []
        handle = self._norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
        try:
            self._transformer(dict(features))
        finally:
            handle.remove()
        return seen[0][0, -n - 1 : -1]
