"""Collecting: what is pooled, kept and encoded, against sentence-transformers and by hand."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from patch_retriever.activations.collect import (
    collect_features,
    collect_patched,
    collect_pooled,
    collect_tokens,
)
from patch_retriever.activations.live import LiveSource
from patch_retriever.activations.store import Store, StoreSource
from patch_retriever.activations.stream import batches
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, PAPER, PLAIN, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.errors import UserError
from patch_retriever.items import KINDS, Item
from patch_retriever.sae.model import SparseAutoencoder

N_IMAGE_TOKENS, WIDTH, C = 36, 32, 90


class Coloured:
    """A picture of one colour."""

    def __init__(self, colour):
        self.name, self.colour = colour, colour

    def open(self):
        return Image.new("RGB", (72, 72), self.colour)


ITEMS = (
    Item("a cat"),
    Item(picture=Coloured("red")),
    Item("two small cats on a large grey mat"),
    Item("a cat", Coloured("blue")),
    Item(picture=Coloured("green")),
    Item("seven dogs and one bird behind a fence, far away", Coloured("white")),
    Item("no"),
)
KINDS_N = torch.tensor([KINDS.index(item.kind) for item in ITEMS])
READOUTS = (
    Readout(PAPER),
    Readout(PAPER, "layers.0"),
    Readout(PAPER, "layers.1", "lasttoken"),
    Readout(ONE_WORD, LAST, "lasttoken"),
    Readout(PLAIN, "layers.1"),
)
READOUT = Readout(ONE_WORD, LAST, "lasttoken")
by_readout = pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.name)


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


@pytest.fixture(scope="module")
def untouched(random_model):
    """A second copy that no probe ever wraps."""
    return load_backbone(str(random_model))


@pytest.fixture(scope="module")
def pooled(transformer):
    return collect_pooled(transformer, ITEMS, READOUTS, batch_size=3)


def make_sae(spread=1.0):
    """An SAE for activations of such a spread."""
    generator = torch.Generator().manual_seed(0)
    rows_cd = torch.nn.functional.normalize(torch.randn(C, WIDTH, generator=generator), dim=1)
    return SparseAutoencoder(
        rows_cd.T / spread,
        torch.zeros(C),
        rows_cd,
        torch.zeros(WIDTH),
        0.5 + torch.rand(C, generator=generator),
    )


def tokens_by_item(untouched, readout):
    """The tokens of every item, each item run alone."""
    set_readout(untouched, readout)
    found = []
    for item in ITEMS:
        features = untouched.preprocess([item.load()])
        with torch.no_grad():
            found.append(untouched(features)["token_embeddings"][0])
    return found


def pool_by_hand(rows_tx, pooling):
    return rows_tx.mean(0) if pooling == "mean" else rows_tx[-1]


@by_readout
def test_pooled_vectors_are_those_of_sentence_transformers(readout, pooled, untouched):
    set_readout(untouched, readout)
    model = SentenceTransformer(modules=[untouched, Pooling(WIDTH, readout.pooling)], device="cpu")
    expected_nd = model.encode([item.load() for item in ITEMS], convert_to_tensor=True)
    assert torch.allclose(pooled[readout], expected_nd, atol=1e-5)


def test_every_readout_that_was_asked_for_is_there(pooled):
    assert set(pooled) == set(READOUTS)
    assert all(pooled_nd.shape == (len(ITEMS), WIDTH) for pooled_nd in pooled.values())


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_does_not_change_pooled_vectors(batch_size, transformer, pooled):
    again = collect_pooled(transformer, ITEMS, READOUTS[:3], batch_size)
    for readout, pooled_nd in again.items():
        assert torch.allclose(pooled_nd, pooled[readout], atol=1e-5), readout.name


@by_readout
def test_features_are_those_of_every_token_by_hand(readout, transformer, untouched):
    tokens = tokens_by_item(untouched, readout)
    sae = make_sae(spread=float(torch.cat(tokens).std()))
    found = collect_features(transformer, ITEMS, readout, sae, KINDS_N, batch_size=3)
    codes_nc = found.codes.dense()
    assert 0 < int((codes_nc > 0).sum()) < codes_nc.numel()
    for n, tokens_td in enumerate(tokens):
        codes_tc = torch.stack([sae.encode(token_d[None])[0] for token_d in tokens_td])
        assert torch.allclose(codes_nc[n], pool_by_hand(codes_tc, readout.pooling), atol=1e-5)
        pooled_d = pool_by_hand(tokens_td, readout.pooling)
        assert torch.allclose(found.pooled_nd[n], pooled_d, atol=1e-5)
        assert torch.allclose(found.mean_nd[n], tokens_td.mean(0), atol=1e-5)
    assert torch.equal(found.kinds_n, KINDS_N)


@by_readout
def test_features_with_a_scale_per_token_reconstruct_what_tokens_do(
    readout, transformer, untouched, tmp_path
):
    plain = make_sae(spread=1.0)
    bias_d = torch.linspace(-0.2, 0.3, WIDTH)
    sae = SparseAutoencoder(
        plain.W_enc_dc, plain.b_enc_c, plain.W_dec_cd, bias_d, plain.threshold_c, None, "token"
    )
    found = collect_features(transformer, ITEMS, readout, sae, KINDS_N, batch_size=3)
    found.save(tmp_path / "features.safetensors")
    loaded = type(found).load(tmp_path / "features.safetensors")
    rebuilt_nd = loaded.reconstructed(sae)
    for n, tokens_td in enumerate(tokens_by_item(untouched, readout)):
        out_td = sae.decode(sae.encode(tokens_td), tokens_td)
        tolerance = 1e-4 * float(tokens_td.std())
        expected_d = pool_by_hand(out_td, readout.pooling)
        assert torch.allclose(rebuilt_nd[n], expected_d, atol=tolerance, rtol=1e-4)
    assert float((rebuilt_nd - found.pooled_nd).norm() / found.pooled_nd.norm()) > 0.1


@pytest.mark.parametrize("readout", [Readout(PAPER), READOUT], ids=lambda readout: readout.name)
def test_the_batch_size_does_not_change_features(readout, transformer):
    sae = make_sae()
    one, many = (
        collect_features(transformer, ITEMS, readout, sae, KINDS_N, batch_size)
        for batch_size in (1, 64)
    )
    assert torch.allclose(one.pooled_nd, many.pooled_nd, atol=1e-5)
    assert torch.allclose(one.mean_nd, many.mean_nd, atol=1e-5)
    assert torch.allclose(one.codes.dense(), many.codes.dense(), atol=1e-5)


@by_readout
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_energy_by_role_is_the_mean_over_the_roles_tokens(
    readout, batch_size, transformer, untouched, monkeypatch
):
    tokens = tokens_by_item(untouched, readout)
    sae = make_sae(spread=float(torch.cat(tokens).std()))
    roles_of = TokenRoles(untouched)
    codes_of_role = {role: [] for role in ROLES}
    for item, tokens_td in zip(ITEMS, tokens, strict=True):
        roles_t = roles_of(untouched.preprocess([item.load()]))[0].tolist()
        for role, token_d in zip(roles_t, tokens_td, strict=True):
            codes_of_role[ROLES[role]].append(sae.encode(token_d[None])[0])
    monkeypatch.setattr("patch_retriever.activations.collect.CHUNK_CODES", 11 * C)
    arguments = (transformer, ITEMS, readout, sae, KINDS_N, batch_size)
    found, plain = (collect_features(*arguments, by_role=by_role) for by_role in (True, False))
    assert found.role_energy_cr.shape == (C, len(ROLES))
    for r, role in enumerate(ROLES):
        nothing = torch.zeros(1, C)  # the plain prompt has no instruction
        expected_c = torch.stack(codes_of_role[role] or [*nothing]).mean(0)
        assert torch.allclose(found.role_energy_cr[:, r], expected_c, atol=1e-5), role
    assert torch.allclose(found.codes.dense(), plain.codes.dense(), atol=1e-6)
    assert plain.role_energy_cr is None


@pytest.mark.parametrize("by_role", [True, False])
def test_features_survive_the_disk(transformer, tmp_path, by_role):
    found = collect_features(transformer, ITEMS, READOUT, make_sae(), KINDS_N, by_role=by_role)
    found.save(tmp_path / "features.safetensors")
    loaded = type(found).load(tmp_path / "features.safetensors")
    assert torch.equal(loaded.pooled_nd, found.pooled_nd)
    assert torch.equal(loaded.mean_nd, found.mean_nd)
    assert torch.equal(loaded.kinds_n, found.kinds_n)
    assert torch.equal(loaded.codes.dense(), found.codes.dense())
    if by_role:
        assert torch.equal(loaded.role_energy_cr, found.role_energy_cr)
    else:
        assert loaded.role_energy_cr is None


@pytest.fixture(scope="module", params=["mean", "lasttoken"])
def stored(request, transformer, tmp_path_factory):
    """A store of all tokens, the shard's tensors and the pooling."""
    readout = Readout(ONE_WORD, LAST, request.param)
    folder = tmp_path_factory.mktemp("tokens")
    collect_tokens(transformer, ITEMS, readout, folder, batch_size=3)
    store = Store(folder)
    shards = [store.read(i) for i in range(len(store.shards))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}, readout


def test_the_store_holds_every_token_and_no_padding(stored, untouched):
    shard, readout = stored
    expected_td = torch.cat(tokens_by_item(untouched, readout))
    assert len(shard["roles_t"]) == len(expected_td)
    found_td = shard["activations_td"].float()
    nearest_t = torch.cdist(expected_td, found_td).min(1).values
    assert bool((nearest_t < 0.01 * expected_td.norm(dim=1)).all())  # bf16


def test_roles_are_recorded(stored):
    shard, _ = stored
    counts = torch.bincount(shard["roles_t"].long(), minlength=len(ROLES)).tolist()
    found = dict(zip(ROLES, counts, strict=True))
    with_picture = sum(item.picture is not None for item in ITEMS)
    assert found["image"] == N_IMAGE_TOKENS * with_picture
    assert found["special"] == 3 * len(ITEMS)  # two ends of the turn, and the assistant's start
    assert found["text"] > 0
    assert found["instruction"] > found["text"] / 2


def test_the_tokens_that_the_pooling_reads_are_marked(stored):
    shard, readout = stored
    marked = int(shard["pooled_t"].sum())
    assert marked == (len(ITEMS) if readout.pooling == "lasttoken" else len(shard["pooled_t"]))


def test_marked_tokens_are_the_pooled_ones(stored, untouched):
    shard, readout = stored
    marked_td = shard["activations_td"][shard["pooled_t"].bool()].float()
    tokens = tokens_by_item(untouched, readout)
    expected_nd = torch.stack([pool_by_hand(tokens_td, readout.pooling) for tokens_td in tokens])
    assert torch.allclose(
        marked_td.mean(0),
        expected_nd.mean(0) if readout.pooling == "lasttoken" else torch.cat(tokens).mean(0),
        atol=0.02,
    )


def test_progress_counts_batches(transformer):
    seen = []

    def progress(steps, total):
        seen.append(total)
        return steps

    collect_pooled(transformer, ITEMS, [Readout(PLAIN), Readout(PAPER)], 3, progress)
    assert seen == [3, 3]


def test_pairs_and_the_number_of_items_are_kept(transformer, tmp_path):
    collect_tokens(transformer, ITEMS, READOUT, tmp_path, pairs=[[0, 1], [6, 4]])
    store = Store(tmp_path)
    assert (store.pairs, store.n_items, store.d) == ([[0, 1], [6, 4]], len(ITEMS), WIDTH)


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_stores_pooled_vectors_are_the_readouts(pooling, transformer, tmp_path):
    readout = Readout(ONE_WORD, LAST, pooling)
    collect_tokens(transformer, ITEMS, readout, tmp_path, batch_size=3)
    expected_nd = collect_pooled(transformer, ITEMS, [readout])[readout]
    found_nd = Store(tmp_path).pooled_vectors()
    assert torch.allclose(found_nd, expected_nd, rtol=0.02, atol=0.02)  # bf16
    nearest_n = torch.cdist(found_nd, expected_nd).argmin(1)
    assert torch.equal(nearest_n, torch.arange(len(ITEMS)))


def test_all_that_is_collected_keeps_the_token_limit(random_model, tmp_path):
    free, limited = load_backbone(str(random_model)), load_backbone(str(random_model))
    readout = Readout(ONE_WORD, "layers.0", max_tokens=100)
    long = [Item("cats and dogs " * 100), *ITEMS[:2]]
    kinds_n = KINDS_N[[0, 0, 1]]
    set_readout(free, readout)
    cut = free.preprocess([item.load() for item in long])["attention_mask"].sum(1).tolist()
    assert max(cut) == 100
    collect_tokens(limited, long, readout, tmp_path)
    shard = Store(tmp_path).read(0)
    assert torch.bincount(shard["items_t"]).tolist() == cut
    expected_nd = collect_pooled(limited, long, [readout])[readout]
    fresh = load_backbone(str(random_model))  # no limit is left in it
    sae = make_sae()
    for found in (
        collect_features(fresh, long, readout, sae, kinds_n),
        collect_patched(fresh, long, readout, {}, kinds_n),
    ):
        assert (found.pooled_nd - expected_nd).abs().max() < 1e-5


# the backbone as a source

COLOURS = ("red", "blue", "green", "white", "black", "orange")
MANY = tuple(
    Item(f"{number} birds") if number % 2 else Item(picture=Coloured(COLOURS[number // 2 % 6]))
    for number in range(90)
)


@pytest.fixture(scope="module")
def live(transformer):
    return LiveSource(transformer, MANY, READOUT, items_in_block=16)


def of_store(transformer, items, folder):
    """The tensors of a store of some items."""
    collect_tokens(transformer, items, READOUT, folder)
    store = Store(folder)
    shards = [store.read(i) for i in range(len(store.shards))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def epoch(source, seed=0):
    return source.epoch(torch.Generator().manual_seed(seed))


def test_a_live_block_has_the_tokens_of_a_store_of_the_same_items(live, transformer, tmp_path):
    numbers = epoch(live)[1]
    block = live.read(numbers)
    stored = of_store(transformer, [MANY[i] for i in numbers], tmp_path)
    assert block.activations_td.dtype == torch.bfloat16
    assert torch.equal(block.activations_td, stored["activations_td"])
    assert torch.equal(block.pooled_t, stored["pooled_t"].bool())
    assert int(block.pooled_t.sum()) == len(numbers)


def test_an_epoch_has_every_item_once_but_those_held_out(live):
    blocks = epoch(live)
    sizes = [len(block) for block in blocks]
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1
    trained = [i for block in blocks for i in block]
    assert len(set(trained)) == len(trained)
    held_out = [MANY[i] for i in range(len(MANY)) if i not in trained]
    assert held_out == live.held_out_items
    assert len(held_out) == pytest.approx(len(MANY) / 20, abs=2)
    assert epoch(live) == blocks
    assert epoch(live, seed=1) != blocks


def test_held_out_tokens_are_those_of_the_held_out_items(live, transformer, tmp_path):
    stored = of_store(transformer, live.held_out_items, tmp_path)
    tokens_td, roles_t = live.held_out(100_000)
    assert tokens_td.dtype == torch.float32
    assert torch.equal(tokens_td, stored["activations_td"].float())
    assert torch.equal(roles_t, stored["roles_t"])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_items_of_an_epoch(processes, transformer):
    sources = [
        LiveSource(transformer, MANY, READOUT, rank=rank, processes=processes)
        for rank in range(processes)
    ]
    shares = [[i for block in epoch(source) for i in block] for source in sources]
    together = [i for share in shares for i in share]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(together) == sources[0].training


def test_a_stream_reads_the_backbone_from_its_thread(live):
    with closing(batches(live, 64, seed=0)) as stream:
        found = [(batch_td.clone(), position) for batch_td, position in islice(stream, 12)]
    assert found[-1][1].block >= 1
    start = found[3][1]
    with closing(batches(live, 64, 0, start)) as stream:
        for (expected_td, position), (batch_td, again) in zip(found[4:], stream, strict=False):
            assert position == again
            assert torch.equal(batch_td, expected_td)


def roles_of(tokens):
    return {ROLES[i] for i in tokens[1].unique().tolist()}


def test_few_held_out_tokens_of_a_backbone_are_of_all_roles(live):
    assert roles_of(live.held_out(100_000)) == set(ROLES)
    assert {"image", "text"} <= roles_of(live.held_out(60))


@pytest.mark.parametrize("tokens", [60, 100_000])
def test_held_out_tokens_of_a_small_store_are_of_all_roles(tokens, transformer, tmp_path):
    collect_tokens(transformer, MANY, READOUT, tmp_path)
    assert {"image", "text"} <= roles_of(Store(tmp_path).held_out(tokens))


def test_a_store_and_a_backbone_hold_out_about_as_much(live, transformer, tmp_path):
    collect_tokens(transformer, MANY, READOUT, tmp_path)
    stored = StoreSource(Store(tmp_path)).held_out(100_000)[0]
    assert len(stored) == pytest.approx(len(live.held_out(100_000)[0]), rel=0.4)


def test_too_few_items_are_no_endless_epoch_of_nothing(transformer):
    try:
        source = LiveSource(transformer, ITEMS[:1], READOUT)
    except UserError:
        return
    assert epoch(source)
