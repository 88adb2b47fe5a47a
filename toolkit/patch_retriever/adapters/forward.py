"""The patched backbone as a function with gradients: what an adapter is trained through.

It computes what `PatchedRetriever` does, without nnsight, which reads under `no_grad`: concepts are
subtracted in the forward pass, tokens are pooled, and the patch's maps follow. The patch is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.load import as_read
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.pooling import (
    parts_of,
    patched_part,
    pool,
    pool_parts,
    pooling_weights,
)
from patch_retriever.backbones.readout import Readout, layer_number
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import apply_composed, compose

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

EnergyOf = Callable[[Tensor], Tensor]
"""Energies (t, groups) of concepts on tokens (t, d)."""


@dataclass(frozen=True)
class Pooled:
    """Items after the subtraction and the pooling: `x_nd` in float32, the raw tokens' `mean_nd`,
    which the gate asks, and energies of groups of concepts, pooled like the tokens."""

    x_nd: Tensor
    mean_nd: Tensor
    energy_ng: Tensor | None = None


class PatchedForward:
    """A backbone in a readout with a frozen patch; differentiable in the backbone's weights."""

    def __init__(
        self,
        transformer: Transformer,
        readout: Readout,
        patch: Patch,
        energy_of: EnergyOf | None = None,
        energy_at: str | None = None,
    ) -> None:
        """`energy_of` looks at tokens before the subtraction, at the readout's site or at the
        decoder layer `energy_at`. Sets the readout."""
        transformer = as_read(transformer, readout)
        self.transformer, self.patch = transformer, patch
        self._pooling = readout.pooling
        self._energy_of = energy_of
        self._energy_at = None if energy_at == readout.site else energy_at
        device = device_of(transformer)
        width = len(parts_of(readout.pooling)) * transformer.get_embedding_dimension()
        maps = {role: compose(patch.maps, width, role) for role in (QUERY, DOCUMENT)}
        self._maps = {r: (w.to(device), b.to(device)) for r, (w, b) in maps.items()}
        self._gate = patch.gate.to(device) if patch.gate is not None and patch.gated else None

    def pooled(self, features: dict[str, Any], energies: bool = True) -> Pooled:
        """One preprocessed batch up to the pooling; `energies` only where they are asked for."""
        with self._layers_patched() as seen:
            out = self.transformer(dict(features))
        tokens_ntd, mask_nt = out["token_embeddings"], features["attention_mask"]
        part = patched_part(self._pooling)
        weights_nt = pooling_weights(mask_nt, part).to(tokens_ntd.device)
        mean_nd = pool(tokens_ntd.detach(), pooling_weights(mask_nt, "mean"))
        energy_ng = None
        if energies and self._energy_of is not None:
            energy_ng = self._pooled_energy(seen.get("energy", tokens_ntd), weights_nt)
        raw_ntd = tokens_ntd
        if self.patch.subtract is not None:
            tokens_ntd = self.patch.subtract.to(tokens_ntd.device)(tokens_ntd.float())
        x_nd = pool_parts(tokens_ntd, mask_nt, self._pooling, raw_ntd)
        return Pooled(x_nd, mean_nd, energy_ng)

    def embed(self, pooled: Pooled, role: int) -> Tensor:
        """Unit embeddings (n, e) of pooled items as queries or documents."""
        x_nd = pooled.x_nd
        if self.patch.maps:
            x_nd = apply_composed(*self._maps[role], self._gate, x_nd, pooled.mean_nd)
        return torch.nn.functional.normalize(x_nd, dim=1)

    def _pooled_energy(self, tokens_ntd: Tensor, weights_nt: Tensor) -> Tensor:
        """Energies of the tokens that the pooling reads, times their weights."""
        assert self._energy_of is not None
        item_t, position_t = (weights_nt > 0).nonzero(as_tuple=True)
        energy_tg = self._energy_of(tokens_ntd[item_t, position_t].float())
        weighted_tg = energy_tg * weights_nt[item_t, position_t, None]
        empty_ng = weighted_tg.new_zeros(len(weights_nt), energy_tg.shape[1])
        return empty_ng.index_add(0, item_t, weighted_tg)

    @contextmanager
    def _layers_patched(self) -> Generator[dict[str, Tensor]]:
        """Hooks that subtract after decoder layers, and keep the tokens that energies are of."""
        seen: dict[str, Tensor] = {}
        layers: Any = self.transformer.model.get_submodule(layers_path(self.transformer.model))
        sites = {*self.patch.layers, *filter(None, [self._energy_at])}

        def hook(site: str) -> Callable[..., Any]:
            subtract = self.patch.layers.get(site)

            def after(_module: Any, _inputs: Any, output: Any) -> Any:
                h_ntd = output[0] if isinstance(output, tuple) else output
                if site == self._energy_at:
                    seen["energy"] = h_ntd
                if subtract is None:
                    return None
                patched_ntd = subtract.on_stream(h_ntd)
                return (patched_ntd, *output[1:]) if isinstance(output, tuple) else patched_ntd

            return after

        handles = [
            layers[layer_number(site)].register_forward_hook(hook(site)) for site in sorted(sites)
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
