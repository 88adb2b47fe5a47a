"""Items through the backbone: token activations for the store, pooled vectors and pooled codes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.activations.store import StoreWriter
from patch_retriever.activations.stream import Block, in_blocks, is_held_out, some_of
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import set_readout
from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.items import Item
from patch_retriever.patch.operators import Subtract
from patch_retriever.probe import Probe
from patch_retriever.progress import Progress, no_progress
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import CHUNK_CODES, SparseAutoencoder

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor


def collect_pooled(
    transformer: Transformer,
    items: Sequence[Item],
    readouts: Sequence[Readout],
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> dict[Readout, Tensor]:
    """Pooled vectors (n, d) under each of several readouts, one forward pass per prompt."""
    found: dict[Readout, Tensor] = {}
    by_inputs: dict[Readout, list[Readout]] = defaultdict(list)
    for readout in readouts:
        by_inputs[replace(readout, site=LAST, pooling="mean")].append(readout)
    for inputs, group in by_inputs.items():
        set_readout(transformer, inputs)
        probe = Probe(transformer)
        sites = sorted({readout.site for readout in group})
        for numbers, features in item_batches(transformer, items, batch_size, progress):
            tokens = probe.read(features, sites)
            for readout in group:
                weights_nt = pooling_weights(features["attention_mask"], readout.pooling)
                pooled_nd = pool(tokens[readout.site], weights_nt)
                if readout not in found:
                    found[readout] = torch.empty(len(items), pooled_nd.shape[1])
                found[readout][numbers] = pooled_nd.cpu()
    return found


def collect_patched(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    layers: Mapping[str, Subtract],
    kinds_n: Tensor,
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> Features:
    """Pooled vectors of `items` by the model that is patched at `layers`, without codes."""
    width = transformer.get_embedding_dimension()
    pooled_nd, mean_nd = torch.empty(2, len(items), width).unbind()
    batches = _read_batches(transformer, items, readout, batch_size, progress, layers)
    for numbers, features, tokens_ntd in batches:
        mask_nt = features["attention_mask"]
        pooled_nd[numbers] = pool(tokens_ntd, pooling_weights(mask_nt, readout.pooling)).cpu()
        mean_nd[numbers] = pool(tokens_ntd, pooling_weights(mask_nt, "mean")).cpu()
    return Features(pooled_nd, mean_nd, Codes.from_dense(torch.zeros(len(items), 0)), kinds_n)


def _read_batches(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    batch_size: int,
    progress: Progress = no_progress,
    layers: Mapping[str, Subtract] | None = None,
) -> Iterator[tuple[list[int], dict[str, Any], Tensor]]:
    """Item numbers, features and the tokens (n, t, d) at the readout's site, by batches; of the
    model that is patched at `layers`. Sets the inputs of the readout now: the probe reads its site,
    so that the model ends there and keeps no list of all layers."""
    set_readout(transformer, replace(readout, site=LAST))
    probe, site = Probe(transformer), readout.site
    edits = {layer: subtract.on_stream for layer, subtract in (layers or {}).items()}
    return (
        (numbers, features, probe.read(features, [site], edits)[site])
        for numbers, features in item_batches(transformer, items, batch_size, progress)
    )


def collect_tokens(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    folder: Path,
    batch_size: int = 64,
    progress: Progress = no_progress,
    pairs: list[list[int]] | None = None,
) -> None:
    """Write the activations of every token at the readout's site into a store at `folder`.

    `pairs` are numbers of items that belong together; they are kept beside the activations.
    """
    writer = StoreWriter(folder)
    for tokens in _token_batches(transformer, items, readout, batch_size, progress):
        writer.add(*tokens)
    writer.close(pairs)


def _token_batches(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    batch_size: int,
    progress: Progress = no_progress,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Activations (t, d), roles, whether pooled, and item numbers of all tokens, by batches."""
    batches = _read_batches(transformer, items, readout, batch_size, progress)
    roles_of = TokenRoles(transformer)
    for numbers, features, tokens_ntd in batches:
        mask_nt = features["attention_mask"].bool()
        pooled_nt = pooling_weights(mask_nt, readout.pooling) > 0
        roles_nt = roles_of(features)
        items_nt = torch.tensor(numbers)[:, None].expand(mask_nt.shape)
        mask_on_cpu_nt = mask_nt.cpu()
        yield (
            tokens_ntd[mask_nt],
            roles_nt[mask_on_cpu_nt],
            pooled_nt[mask_nt],
            items_nt[mask_on_cpu_nt],
        )


class LiveSource:
    """A backbone as a source of training tokens: every block is computed when it is read.

    Nothing is written to disk, and every epoch runs the backbone again. One item in
    twenty is held out; every process takes its share of the others.
    """

    def __init__(
        self,
        transformer: Transformer,
        items: Sequence[Item],
        readout: Readout,
        batch_size: int = 64,
        items_in_block: int = 1024,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.transformer, self.items, self.readout = transformer, items, readout
        self.batch_size, self.items_in_block = batch_size, items_in_block
        self.rank, self.processes = rank, processes
        held_out_n = is_held_out(torch.arange(len(items)))
        held_out_n[-1] |= not held_out_n.any()  # of very few items, the last
        self.held_out_items = [items[i] for i in held_out_n.nonzero()[:, 0].tolist()]
        self.training = (~held_out_n).nonzero()[:, 0].tolist()
        if len(self.training) < processes:
            raise UserError(f"{len(items)} items are too few to train on; give more")

    @cached_property
    def n_tokens(self) -> int:
        """Estimated from one batch of items from all over them."""
        picks = torch.linspace(0, len(self.training) - 1, self.batch_size).round().long().unique()
        sample = [self.items[self.training[i]] for i in picks.tolist()]
        in_sample = sum(len(roles_t) for _, roles_t, _ in self._tokens(sample))
        return round(in_sample * len(self.items) / len(sample))

    def epoch(self, generator: torch.Generator) -> list[list[int]]:
        """Item numbers in a random order, `items_in_block` at a time."""
        order = torch.randperm(len(self.training), generator=generator).tolist()
        mine = [self.training[i] for i in order[self.rank :: self.processes]]
        return in_blocks(mine, self.items_in_block)

    def read(self, block: list[int]) -> Block:
        """The tokens of some items."""
        parts = list(self._tokens([self.items[number] for number in block]))
        return Block(torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts]))

    def held_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Up to `tokens` tokens of the items that `read` never gives, and their roles; about twice
        as many are in memory at the most."""
        parts = self._tokens(self.held_out_items)
        return some_of(((activations_td, roles_t) for activations_td, roles_t, _ in parts), tokens)

    def _tokens(self, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Activations in bf16, roles, and whether pooled, of all tokens of some items."""
        batches = _token_batches(self.transformer, items, self.readout, self.batch_size)
        for activations_td, roles_t, pooled_t, _ in batches:
            yield activations_td.to(torch.bfloat16).cpu(), roles_t, pooled_t.cpu()


def collect_features(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    sae: SparseAutoencoder,
    kinds_n: Tensor,
    batch_size: int = 64,
    progress: Progress = no_progress,
    by_role: bool = False,
) -> Features:
    """Pooled vectors and pooled codes of `items`, streamed: no token is kept.

    With `by_role` also each concept's energy on the tokens of each role, for which every token is
    encoded, not only those that the pooling reads.
    """
    batches = _read_batches(transformer, items, readout, batch_size, progress)
    roles_of = TokenRoles(transformer) if by_role else None
    role_energy = _RoleEnergy(sae.n_concepts)
    pooled_nd, mean_nd = torch.empty(2, len(items), sae.d_in).unbind()
    scale_n = torch.empty(len(items)) if sae.input_scale == "token" else None
    codes: list[tuple[list[int], Codes]] = []
    for numbers, features, tokens_ntd in batches:
        mask_nt = features["attention_mask"]
        weights_nt = pooling_weights(mask_nt, readout.pooling)
        pooled_nd[numbers] = pool(tokens_ntd, weights_nt).cpu()
        mean_nd[numbers] = pool(tokens_ntd, pooling_weights(mask_nt, "mean")).cpu()
        scale_nt = sae.scale(tokens_ntd.float())
        if scale_n is not None and scale_nt is not None:
            scale_n[numbers] = (scale_nt * weights_nt).sum(1).cpu()
        roles_nt = None if roles_of is None else roles_of(features).long()
        encoded_nt = weights_nt > 0 if roles_nt is None else mask_nt.bool()
        codes_nc = torch.zeros(len(numbers), sae.n_concepts, device=tokens_ntd.device)
        for item_t, position_t, codes_tc in _encoded(tokens_ntd.float(), encoded_nt, sae):
            codes_nc.index_add_(0, item_t, codes_tc * weights_nt[item_t, position_t, None])
            if roles_nt is not None:
                role_energy.add(roles_nt[item_t.cpu(), position_t.cpu()], codes_tc)
        codes.append((numbers, Codes.from_dense(codes_nc.cpu())))
    energy_cr = role_energy.mean_cr() if by_role else None
    return Features(pooled_nd, mean_nd, Codes.from_batches(codes), kinds_n, energy_cr, scale_n)


def _encoded(
    tokens_ntd: Tensor, which_nt: Tensor, sae: SparseAutoencoder
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(items, positions, dense codes) of the tokens that `which_nt` names, some at a time."""
    item_t, position_t = which_nt.nonzero(as_tuple=True)
    chunk = max(1, CHUNK_CODES // sae.n_concepts)
    for i, p in zip(item_t.split(chunk), position_t.split(chunk), strict=True):
        yield i, p, sae.encode(tokens_ntd[i, p])


class _RoleEnergy:
    """The mean code of the tokens of each role, from some tokens at a time."""

    def __init__(self, n_concepts: int) -> None:
        self._sums_rc = torch.zeros(len(ROLES), n_concepts, dtype=torch.float64)
        self._tokens_r = torch.zeros(len(ROLES), dtype=torch.long)

    def add(self, roles_t: Tensor, codes_tc: Tensor) -> None:
        """Some tokens with their roles."""
        self._tokens_r += torch.bincount(roles_t, minlength=len(ROLES))
        for role in roles_t.unique().tolist():
            of_role_t = torch.eq(roles_t, role).to(codes_tc.device)
            self._sums_rc[role] += codes_tc[of_role_t].sum(0).cpu()

    def mean_cr(self) -> Tensor:
        """(c, r); 0 for a role that no token has."""
        return (self._sums_rc / self._tokens_r.clamp(min=1)[:, None]).T.float().contiguous()
