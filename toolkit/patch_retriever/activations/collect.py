"""Items through the backbone: token activations for the store, pooled vectors and pooled codes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from patch_retriever.activations.batches import read_batches
from patch_retriever.activations.kept import KeptTokens, KeptWriter, tokens_of
from patch_retriever.activations.sampling import Sampler, tokens_per_item
from patch_retriever.activations.sinks import SinkCounter
from patch_retriever.activations.writer import StoreWriter
from patch_retriever.backbones.families import final_norm_path
from patch_retriever.backbones.inputs import WINDOW, item_batches
from patch_retriever.backbones.load import set_readout
from patch_retriever.backbones.pooling import (
    parts_of,
    patched_part,
    pool,
    pool_parts,
    pooling_weights,
)
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
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
    keep: KeptWriter | None = None,
) -> dict[Readout, Tensor]:
    """Pooled vectors (n, d), (n, 2 d) of two parts, under each of several readouts; one forward
    pass of the whole decoder per prompt serves all its sites, cuts and poolings. Their tokens go
    to `keep`, which takes those of one prompt."""
    found: dict[Readout, Tensor] = {}
    by_inputs: dict[Readout, list[Readout]] = defaultdict(list)
    for readout in readouts:
        inputs = replace(readout, site=LAST, cut=None, pooling="mean")
        by_inputs[inputs].append(readout)
    norm = transformer.model.get_submodule(final_norm_path(transformer.model))
    for inputs, group in by_inputs.items():
        set_readout(transformer, inputs)
        probe = Probe(transformer)
        roles_of = None if keep is None else TokenRoles(transformer)
        sites = sorted({readout.cut or readout.site for readout in group})
        for numbers, features in item_batches(transformer, items, batch_size, progress):
            stream = probe.read(features, sites)
            mask_nt = features["attention_mask"]
            tokens: dict[Readout, Tensor] = {}
            for readout in group:
                if (of := tokens_of(readout)) not in tokens:
                    tokens[of] = stream[readout.cut or readout.site]
                    if readout.cut is not None:
                        with torch.no_grad():
                            tokens[of] = norm(tokens[of])
                pooled_nd = pool_parts(tokens[of], mask_nt, readout.pooling)
                if readout not in found:
                    found[readout] = torch.empty(len(items), pooled_nd.shape[1])
                found[readout][numbers] = pooled_nd.cpu()
            if keep is not None and roles_of is not None:
                keep.add([items[i] for i in numbers], tokens, mask_nt, roles_of(features))
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
    pooled_nd, mean_nd = _empty(len(items), width, readout)
    batches = read_batches(transformer, items, readout, batch_size, progress, layers)
    for numbers, tokens_ntd, mask_nt, _ in batches:
        pooled_nd[numbers] = pool_parts(tokens_ntd, mask_nt, readout.pooling).cpu()
        mean_nd[numbers] = pool(tokens_ntd, pooling_weights(mask_nt, "mean")).cpu()
    return Features(pooled_nd, mean_nd, Codes.from_dense(torch.zeros(len(items), 0)), kinds_n)


def _empty(n: int, d: int, readout: Readout) -> tuple[Tensor, Tensor]:
    """Room for pooled vectors and for the means of raw tokens."""
    return torch.empty(n, len(parts_of(readout.pooling)) * d), torch.empty(n, d)


class Tokens(NamedTuple):
    """The tokens of a batch of whole items, without padding."""

    activations_td: Tensor
    roles_t: Tensor
    pooled_t: Tensor
    """Whether the readout's pooling reads them."""
    items_t: Tensor
    positions_t: Tensor
    """Each token's place in its item, from 0."""
    sink_t: Tensor
    n_items: int


def collect_tokens(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    folder: Path,
    batch_size: int = 64,
    progress: Progress = no_progress,
    pairs: list[list[int]] | None = None,
    tokens_wanted: int | None = None,
    seed: int = 0,
    key: str | None = None,
    kept: KeptTokens | None = None,
) -> None:
    """Write the activations of tokens at the readout's site into a store at `folder`.

    Args:
        pairs: numbers of items that belong together; they are kept beside the activations.
        tokens_wanted: about how many tokens to keep (see `sampling`); None: all of them.
        seed: of which tokens are kept.
        key: changes whenever the model, the items or the readout do. With it, a collection that
            was stopped goes on at its last finished shard when the same call is made again (from
            the window of batches in which that ended), and ends with the same bytes.
        kept: tokens of some of the items, which do not go through the model again.
    """
    per_item = tokens_per_item(len(items), tokens_wanted)
    sampler = Sampler(per_item, seed)
    known = len(kept.known(items)[0]) if kept is not None and kept.is_of(readout) else 0
    settings = {"batch_size": batch_size, "per_item": per_item, "seed": seed, "n": len(items)}
    settings |= {"known": known} if known else {}
    identity = None if key is None else {"key": key, **settings}
    writer = StoreWriter(folder, site=readout.site, identity=identity)
    sinks = SinkCounter.from_state(writer.mark.state) if writer.mark.items else SinkCounter()
    seen = writer.mark.items
    found = token_batches(transformer, items, readout, batch_size, progress, sinks, seen, kept)
    with closing(found) as batches:
        for tokens in batches:
            kept_t = sampler.keeps(
                tokens.items_t, tokens.positions_t, tokens.roles_t, tokens.pooled_t, tokens.sink_t
            )
            writer.add(*tokens[:4], tokens.sink_t, kept_t)
            seen += tokens.n_items
            if seen >= known and (seen - known) % (WINDOW * batch_size) == 0:
                writer.set_mark(seen, sinks.state())
    writer.close(pairs, sinks.report())


def token_batches(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    batch_size: int,
    progress: Progress = no_progress,
    sinks: SinkCounter | None = None,
    skip: int = 0,
    kept: KeptTokens | None = None,
) -> Generator[Tokens]:
    """All tokens by batches, without the first `skip` items; their sinks are counted in `sinks`.
    What is `kept` comes first."""
    found = read_batches(
        transformer, items, readout, batch_size, progress, skip=skip, kept=kept, with_roles=True
    )
    sinks = sinks or SinkCounter()
    with closing(found) as batches:
        for numbers, tokens_ntd, padded_nt, roles_nt in batches:
            assert roles_nt is not None
            mask_nt = padded_nt.bool()
            pooled_nt = pooling_weights(mask_nt, patched_part(readout.pooling)) > 0
            sink_nt = sinks.add(tokens_ntd, mask_nt, roles_nt)
            items_nt = torch.tensor(numbers)[:, None].expand(mask_nt.shape)
            mask_on_cpu_nt = mask_nt.cpu()
            yield Tokens(
                tokens_ntd[mask_nt],
                roles_nt[mask_on_cpu_nt],
                pooled_nt[mask_nt],
                items_nt[mask_on_cpu_nt],
                (mask_on_cpu_nt.cumsum(1) - 1)[mask_on_cpu_nt],
                sink_nt[mask_nt],
                len(numbers),
            )


def collect_features(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    sae: SparseAutoencoder,
    kinds_n: Tensor,
    batch_size: int = 64,
    progress: Progress = no_progress,
    by_role: bool = False,
    kept: KeptTokens | None = None,
) -> Features:
    """Pooled vectors and pooled codes of `items`, streamed: no token stays in memory. What is
    `kept` does not go through the model. Codes are pooled like the first part of a pooled vector
    of two.

    With `by_role` also each concept's energy on the tokens of each role, for which every token is
    encoded, not only those that the pooling reads.
    """
    batches = read_batches(
        transformer, items, readout, batch_size, progress, kept=kept, with_roles=by_role
    )
    role_energy = _RoleEnergy(sae.n_concepts)
    pooled_nd, mean_nd = _empty(len(items), sae.d_in, readout)
    scale_n = torch.empty(len(items)) if sae.input_scale == "token" else None
    codes: list[tuple[list[int], Codes]] = []
    for numbers, tokens_ntd, mask_nt, roles_nt in batches:
        weights_nt = pooling_weights(mask_nt, patched_part(readout.pooling))
        pooled_nd[numbers] = pool_parts(tokens_ntd, mask_nt, readout.pooling).cpu()
        mean_nd[numbers] = pool(tokens_ntd, pooling_weights(mask_nt, "mean")).cpu()
        scale_nt = sae.scale(tokens_ntd.float())
        if scale_n is not None and scale_nt is not None:
            scale_n[numbers] = (scale_nt * weights_nt).sum(1).cpu()
        encoded_nt = mask_nt.bool() if by_role else weights_nt > 0
        codes_nc = torch.zeros(len(numbers), sae.n_concepts, device=tokens_ntd.device)
        for item_t, position_t, codes_tc in _encoded(tokens_ntd.float(), encoded_nt, sae):
            codes_nc.index_add_(0, item_t, codes_tc * weights_nt[item_t, position_t, None])
            if by_role and roles_nt is not None:
                role_energy.add(roles_nt[item_t.cpu(), position_t.cpu()].long(), codes_tc)
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
