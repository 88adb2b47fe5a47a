"""A patch as stock sentence-transformers modules: exact, and no code travels with the folder.

Of a patch of layers (`deep.py`) this is what comes at the readout and after it.

The switch in both parts is `GLU` (a * sigmoid(b), a stock torch activation without arguments):
with a steep b the sigmoid is exactly 0 or 1 in floating point.

- JumpReLU subtraction on tokens: one `Dense` d -> 2 (d + m) with GLU gives [h; z(h)], since
  u * sigmoid(K (u - threshold)) is u where u is above its threshold and 0 below; a second
  `Dense` d + m -> d gives h - (a z) D. 3 d (d + m) multiplications per token, of which 2 d m
  are the patch itself.
- Statistics per modality: one `Dense` d -> 6 d with GLU gives the text map, the step from text
  to image and the step from image to both, each switched by its hyperplane; a second sums them.
- Statistics per role: a `Router` with one branch for queries and one for documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from patch_retriever.backbones.pooling import parts_of
from patch_retriever.backbones.readout import PoolingMode
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import Gate, Subtract, compose

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Dense

_OPEN = 60.0
"""sigmoid(60) is exactly 1, sigmoid(-60) times an activation is below its last digit."""
_STEEP = 1e8
"""How fast a switch closes, in units of its threshold or margin: half open only for what is nearer
to it than float32 tells apart."""


def token_modules(subtract: Subtract, keep_raw: bool) -> list[Dense]:
    """`Dense` modules on `token_embeddings`: h - sum a z(h) d, exactly.

    With `keep_raw` the raw activation stays beside the patched one, [patched; h] (2 d wide), for
    a gate that has to see it.

    Raises:
        ValueError: the subtraction is of an SAE with a scale per token.
    """
    if subtract.input_scale == "token":
        raise ValueError("no stock module divides a token by its own scale: this needs code")
    d, m = subtract.W_enc_dm.shape
    steep_m = _STEEP / subtract.threshold_m.abs().clamp(min=1e-6)
    value = torch.cat([torch.eye(d), subtract.W_enc_dm.T])
    switch = torch.cat([torch.zeros(d, d), steep_m[:, None] * subtract.W_enc_dm.T])
    value_bias = torch.cat([torch.zeros(d), subtract.b_enc_m])
    switch_bias = torch.cat(
        [torch.full((d,), _OPEN), steep_m * (subtract.b_enc_m - subtract.threshold_m)]
    )
    first = _dense(
        torch.cat([value, switch]), torch.cat([value_bias, switch_bias]), nn.GLU(), _TOKENS
    )
    removed_dm = -(subtract.W_dec_md * subtract.strength_m[:, None]).T
    second = torch.cat([torch.eye(d), removed_dm], dim=1)
    if keep_raw:
        second = torch.cat([second, torch.cat([torch.eye(d), torch.zeros(d, m)], dim=1)])
    return [first, _dense(second, None, nn.Identity(), _TOKENS)]


@dataclass(frozen=True)
class Layout:
    """Where in what `Pooling` gives the readout's parts and what the gate sees lie.

    `width` is all of it, `value_at` the places of the readout's parts of `d` entries each, in
    their order, and `gate_at` that of the raw tokens' mean. `raw_beside` says that tokens are
    [patched; raw], twice as wide.
    """

    d: int
    width: int
    value_at: tuple[int, ...]
    gate_at: int
    pooling: tuple[str, ...]
    raw_beside: bool

    @classmethod
    def of(cls, patch: Patch, d: int, pooling: PoolingMode) -> Layout:
        """A gate has to see raw tokens, and so has the second part of a readout of two. A
        last-token readout with a gate pools the mean beside the last token (`Pooling` puts it
        first)."""
        parts = parts_of(pooling)
        raw_beside = patch.subtract is not None and (patch.gated or len(parts) > 1)
        tokens = 2 * d if raw_beside else d
        raw_at = d if raw_beside else 0
        pooled = ("mean", "lasttoken") if patch.gated and parts == ("lasttoken",) else parts
        at = {mode: place * tokens for place, mode in enumerate(pooled)}
        first, *others = parts
        value_at = (at[first], *(at[part] + raw_at for part in others))
        return cls(
            d, len(pooled) * tokens, value_at, at.get("mean", 0) + raw_at, pooled, raw_beside
        )

    @property
    def plain(self) -> bool:
        """Whether what `Pooling` gives is the readout's vector and nothing else."""
        return self.width == len(self.value_at) * self.d

    def place(self, weight_ew: Tensor, *at: int) -> Tensor:
        """A weight on d entries from each of the places `at`, as a weight on the whole vector."""
        placed_ew = weight_ew.new_zeros(len(weight_ew), self.width)
        for part_ed, start in zip(weight_ew.split(self.d, dim=1), at, strict=True):
            placed_ew[:, start : start + self.d] = part_ed
        return placed_ew


def pooled_value(patch: Patch, d: int, pooling: PoolingMode) -> tuple[int, ...]:
    """Where in the pooled vector of an exported patch the readout's parts of d entries begin."""
    return Layout.of(patch, d, pooling).value_at


def pooled_modules(patch: Patch, role: int, layout: Layout) -> list[Dense]:
    """`Dense` modules on `sentence_embedding`: the patch's maps for one role."""
    weight_kde, bias_ke = compose(patch.maps, len(layout.value_at) * layout.d, role)
    same = all(
        torch.equal(weight_kde[k], weight_kde[0]) and torch.equal(bias_ke[k], bias_ke[0])
        for k in (1, 2)
    )
    if patch.gate is None or same:
        weight_ed = layout.place(weight_kde[0].T, *layout.value_at)
        return [_dense(weight_ed, bias_ke[0], nn.Identity(), _POOLED)]
    return _switched(weight_kde, bias_ke, patch.gate, layout)


def _switched(weight_kde: Tensor, bias_ke: Tensor, gate: Gate, layout: Layout) -> list[Dense]:
    """text map + [image] (image - text) + [both] (both - image), as two `Dense` modules."""
    e = weight_kde.shape[2]
    steps_ed = torch.cat(
        [weight_kde[0].T, *((weight_kde[k + 1] - weight_kde[k]).T for k in (0, 1))]
    )
    steps_bias = torch.cat([bias_ke[0], *(bias_ke[k + 1] - bias_ke[k] for k in (0, 1))])
    switch_ed = torch.cat(
        [
            torch.zeros(e, layout.d),
            *((_STEEP * gate.direction_2d[k]).expand(e, layout.d) for k in (0, 1)),
        ]
    )
    switch_bias = torch.cat(
        [torch.full((e,), _OPEN), *((_STEEP * gate.offset_2[k]).expand(e) for k in (0, 1))]
    )
    weight = torch.cat(
        [layout.place(steps_ed, *layout.value_at), layout.place(switch_ed, layout.gate_at)]
    )
    first = _dense(weight, torch.cat([steps_bias, switch_bias]), nn.GLU(), _POOLED)
    return [first, _dense(torch.eye(e).repeat(1, 3), None, nn.Identity(), _POOLED)]


_TOKENS, _POOLED = "token_embeddings", "sentence_embedding"


def _dense(weight_ed: Tensor, bias_e: Tensor | None, activation: nn.Module, features: str) -> Dense:
    from sentence_transformers.base.modules import Dense

    out_features, in_features = weight_ed.shape
    return Dense(
        in_features,
        out_features,
        bias=bias_e is not None,
        activation_function=activation,
        init_weight=weight_ed.float().contiguous().clone(),
        init_bias=None if bias_e is None else bias_e.float().contiguous().clone(),
        module_input_name=features,
    )


def export_modules(patch: Patch, d: int, pooling: PoolingMode) -> list[nn.Module]:
    """Everything after the `Transformer`: token modules, `Pooling`, maps, `Normalize`."""
    from sentence_transformers.base.modules import Module, Normalize, Router
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules: list[nn.Module] = []
    layout = Layout.of(patch, d, pooling)
    if patch.subtract is not None:
        modules += token_modules(patch.subtract, keep_raw=layout.raw_beside)
    modules.append(Pooling(layout.width // len(layout.pooling), layout.pooling))
    if any(step.by == "role" for step in patch.maps):
        branches: dict[str, list[Module]] = {
            "query": [*pooled_modules(patch, QUERY, layout)],
            "document": [*pooled_modules(patch, DOCUMENT, layout)],
        }
        modules.append(Router(branches, default_route="document"))
    elif patch.maps or not layout.plain:
        modules += pooled_modules(patch, DOCUMENT, layout)
    modules.append(Normalize())
    return modules
