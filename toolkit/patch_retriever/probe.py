"""The one door to nnsight: read activations at sites, run edits live.

nnsight replaces the `forward` of every module that it wraps, for good, and is not thread-safe:
one probe per model and process, and no wrapped model is ever exported or served. Importing it
also changes Python's `object`, so the import happens here and only when a probe is made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patch_retriever.backbones.families import layers_path, residual_norm
from patch_retriever.backbones.readout import BEFORE_MLP, LAST, layer_number

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor, nn

Edit = Callable[["Tensor"], "Tensor"]


class Probe:
    """nnsight around a `Transformer` and, where one is given, the `Pooling` after it.

    Sites are `layers.N` (the residual stream after decoder layer N, so that the last of them is
    before the final norm), `layers.N.attention` (before that layer's MLP; to be read only),
    `last_hidden_state` (what the transformer gives to the pooling: after the final norm, unless
    `set_readout` says a layer) and `pooled`.
    """

    def __init__(self, transformer: Transformer, pooling: nn.Module | None = None) -> None:
        from nnsight import NNsight
        from torch import nn

        parts: OrderedDict[str, nn.Module] = OrderedDict(transformer=transformer)
        if pooling is not None:
            parts["pooling"] = pooling
        self._net = NNsight(nn.Sequential(parts))
        self._layers = f"transformer.model.{layers_path(transformer.model)}"
        self._norm = residual_norm(transformer.model)

    def read(
        self,
        features: dict[str, Any],
        sites: Sequence[str],
        edits: Mapping[str, Edit] | None = None,
    ) -> dict[str, Tensor]:
        """Run one preprocessed batch and return the activations at `sites`, with `edits[site]`
        applied to those of some.

        The forward pass ends at the deepest of all these sites; a site that is edited is read
        after its edit. Tensors are (n, tokens, d), or (n, d) for `pooled`.
        """
        import nnsight
        import torch

        edits = edits or {}
        ordered = sorted({*sites, *edits}, key=_depth)
        steps = [(site, self._envoy(site), edits.get(site), site in sites) for site in ordered]
        found: dict[str, Tensor] = {}
        with torch.no_grad(), self._net.trace(dict(features)) as tracer:
            for site, envoy, edit, wanted in steps:
                if edit is not None:
                    envoy.output = _replaced(envoy.output, site, edit)
                if wanted:
                    read = envoy.input if site.endswith(BEFORE_MLP) else _value(envoy.output, site)
                    found[site] = nnsight.save(read)
            tracer.stop()
        return found

    def _envoy(self, site: str) -> Any:
        if site == LAST:
            return self._net.transformer
        if site == "pooled":
            return self._net.pooling
        path = site.removeprefix("layers.")
        if site.endswith(BEFORE_MLP):
            path = path.removesuffix(BEFORE_MLP) + f".{self._norm}"
        return self._net.get(f"{self._layers}.{path}")


def _depth(site: str) -> float:
    """Sites in the order in which the forward pass reaches them."""
    if site.startswith("layers."):
        before = 0.5 if site.endswith(BEFORE_MLP) else 0.0
        return layer_number(site.removesuffix(BEFORE_MLP)) - before
    return {LAST: 10**6, "pooled": 10**6 + 1}[site]


def _key(site: str) -> str:
    return "sentence_embedding" if site == "pooled" else "token_embeddings"


def _value(output: Any, site: str) -> Tensor:
    """The activation tensor inside what a module returned."""
    if isinstance(output, dict):
        return output[_key(site)]
    return output[0] if isinstance(output, tuple) else output


def _replaced(output: Any, site: str, edit: Edit) -> Any:
    """What a module returned, with its activation tensor edited."""
    if isinstance(output, dict):
        return {**output, _key(site): edit(output[_key(site)])}
    if isinstance(output, tuple):
        return (edit(output[0]), *output[1:])
    return edit(output)
