"""The activation store: shards on disk, what training sees of them and what it never sees."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from patch_retriever.activations import store as store_module
from patch_retriever.activations.sinks import SinkCounter
from patch_retriever.activations.store import Store, StoreSource, sinks_text
from patch_retriever.activations.writer import StoreWriter
from patch_retriever.errors import UserError
from synthetic import write_store

D = 3


def make_parts(sizes, seed=0):
    """Batches of tokens as they come from a backbone; every fifth token is pooled."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, D, generator=generator),
            torch.randint(0, 4, (n,), generator=generator),
            torch.arange(n) % 5 == 0,
            torch.randint(0, 9, (n,), generator=generator),
        )
        for n in sizes
    ]


def write_parts(folder, parts, tokens_per_shard=16_384, pairs=None):
    writer = StoreWriter(folder, tokens_per_shard)
    for part in parts:
        writer.add(*part)
    writer.close(pairs)
    return Store(folder)


def numbered(folder, n, tokens_per_shard=64):
    """A store whose tokens carry their own number (in two digits that bf16 holds exactly)."""
    numbers_t = torch.arange(n)
    tokens_td = torch.stack([numbers_t // 128, numbers_t % 128], 1).float()
    return write_store(folder, tokens_td, tokens_per_shard=tokens_per_shard, at_once=16)


def numbers(tokens_td):
    return (tokens_td.float() @ torch.tensor([128.0, 1.0])).long().tolist()


def training_numbers(source):
    """The numbers of all tokens of an epoch."""
    blocks = source.epoch(torch.Generator().manual_seed(0))
    return [i for block in blocks for i in numbers(source.read(block).activations_td)]


# writing


def test_what_is_read_is_what_was_added(tmp_path):
    parts = make_parts([10, 7, 30, 1])
    store = write_parts(tmp_path, parts, tokens_per_shard=15)
    shards = [store.read(i) for i in range(len(store.shards))]
    assert len(shards) > 1
    for column, key in enumerate(("activations_td", "roles_t", "pooled_t", "items_t")):
        expected = torch.cat([part[column] for part in parts])
        found = torch.cat([shard[key] for shard in shards])
        assert torch.equal(found, expected.to(found.dtype)), key
    assert shards[0]["activations_td"].dtype == torch.bfloat16


def test_shards_hold_about_as_many_tokens_as_asked(tmp_path):
    store = write_parts(tmp_path, make_parts([10] * 10), tokens_per_shard=25)
    assert [shard["tokens"] for shard in store.shards] == [30, 30, 30, 10]
    assert store.n_tokens == 100


def test_the_index_names_every_shard_with_its_hash(tmp_path):
    write_parts(tmp_path, make_parts([20, 20, 5]), tokens_per_shard=20)
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [shard["tokens"] for shard in shards] == [20, 20, 5]
    files = {path.name for path in tmp_path.iterdir()} - {"index.json"}
    assert files == {shard["file"] for shard in shards}
    for shard in shards:
        content = (tmp_path / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert len(load_file(tmp_path / shard["file"])["roles_t"]) == shard["tokens"]


def test_width_items_and_pairs_come_back(tmp_path):
    pairs = [[0, 3], [8, 1], [0, 3]]
    store = write_parts(tmp_path, make_parts([20, 40]), tokens_per_shard=20, pairs=pairs)
    assert (store.d, store.pairs) == (D, pairs)
    assert store.n_items == 9


def test_the_same_tokens_give_the_same_hashes(tmp_path):
    first, second = (
        write_parts(tmp_path / name, make_parts([20, 9]), tokens_per_shard=20) for name in "ab"
    )
    assert first.shards == second.shards


# folders that are no store


def test_a_store_that_was_not_closed_is_not_read(tmp_path):
    writer = StoreWriter(tmp_path, tokens_per_shard=5)
    writer.add(*make_parts([10])[0])
    with pytest.raises(UserError, match="no finished activation store"):
        Store(tmp_path)


def test_writing_again_makes_the_old_store_unreadable_until_it_is_finished(tmp_path):
    write_parts(tmp_path, make_parts([10]))
    writer = StoreWriter(tmp_path)
    with pytest.raises(UserError, match="no finished activation store"):
        Store(tmp_path)
    writer.add(*make_parts([4])[0])
    writer.close()
    assert Store(tmp_path).n_tokens == 4


def test_a_folder_without_a_store_is_named(tmp_path):
    (tmp_path / "file").write_text("words")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(UserError, match=f"^{path}: no finished activation store"):
            Store(path)


@pytest.mark.parametrize("index", ["", "{", "{}", "[]", "null", "3", '{"shards": []}', "\udcff"])
def test_a_foreign_index_is_no_store(index, tmp_path):
    (tmp_path / "index.json").write_bytes(index.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"^{tmp_path}: no finished activation store"):
        Store(tmp_path)


def test_a_store_of_nothing_is_named(tmp_path):
    StoreWriter(tmp_path).close()
    with pytest.raises(UserError, match=f"^{tmp_path}: the activation store is empty"):
        Store(tmp_path)


# damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lambda path: path.unlink()])
def test_a_damaged_shard_is_named_where_it_is_first_read(damage, tmp_path):
    write_parts(tmp_path, make_parts([20, 20]), tokens_per_shard=20)
    store = Store(tmp_path)
    path = tmp_path / store.shards[1]["file"]
    damage(path)
    store.read(0)
    for read in (lambda: store.read(1), store.pooled_vectors, lambda: StoreSource(store).read([1])):
        with pytest.raises(UserError, match=f"^{path}: damaged or missing"):
            read()


def test_a_shard_is_hashed_once(tmp_path, monkeypatch):
    store, hashed = write_parts(tmp_path, make_parts([20, 20]), tokens_per_shard=20), []
    real = store_module.file_hash
    monkeypatch.setattr(store_module, "file_hash", lambda p: hashed.append(p.name) or real(p))
    for number in (0, 1, 1, 0):
        store.read(number)
    assert sorted(hashed) == sorted(shard["file"] for shard in store.shards)


# what is held out


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    ("n", "tokens_per_shard"), [(3200, 96), (3200, 640), (3200, 10_000), (320, 64), (320, 10_000)]
)
def test_training_and_held_out_tokens_are_apart_and_together_all(
    n, tokens_per_shard, processes, tmp_path
):
    store = numbered(tmp_path, n, tokens_per_shard)
    shares = [training_numbers(StoreSource(store, r, processes)) for r in range(processes)]
    held_out = numbers(store.held_out(10_000)[0])
    assert len(held_out) == pytest.approx(n / 20, rel=0.5)
    assert sorted([i for share in shares for i in share] + held_out) == list(range(n))


def test_of_many_items_whole_ones_are_held_out(tmp_path):
    """Ten tokens each; neighbours in an item are too alike to measure on one what saw the other."""
    store = numbered(tmp_path, 3200, 96)
    held_out = {i // 10 for i in numbers(store.held_out(10_000)[0])}
    assert held_out.isdisjoint(i // 10 for i in training_numbers(StoreSource(store)))


def test_the_shares_of_processes_are_about_equal(tmp_path):
    store = numbered(tmp_path, 3200, 640)
    sizes = [len(training_numbers(StoreSource(store, rank, 3))) for rank in range(3)]
    assert max(sizes) - min(sizes) <= len(store.shards)


def test_about_a_twentieth_is_held_out_with_its_roles(tmp_path):
    n = 4000
    roles_t = torch.arange(n) % 4
    tokens_td = torch.stack([roles_t, torch.arange(n) % 7], 1).float()
    store = write_store(tmp_path, tokens_td, roles_t, tokens_per_shard=1000)
    held_out_td, held_out_t = store.held_out(100_000)
    assert len(held_out_td) == pytest.approx(200, rel=0.25)
    assert held_out_td.dtype == torch.float32
    assert torch.equal(held_out_td[:, 0], held_out_t.float())


def test_few_held_out_tokens_come_from_all_over_the_store(tmp_path):
    store = numbered(tmp_path, 12_800, 1280)
    found = numbers(store.held_out(128)[0])
    assert len(found) <= 128
    shards = {i // 1280 for i in found}
    assert len(shards) >= 2
    assert max(shards) - min(shards) >= 5


def test_held_out_tokens_are_the_same_every_time(tmp_path):
    store = numbered(tmp_path, 640)
    assert torch.equal(store.held_out(20)[0], Store(tmp_path).held_out(20)[0])


# pooled vectors


@pytest.mark.parametrize("tokens_per_shard", [7, 1000])
def test_pooled_vectors_are_means_over_the_tokens_that_are_read(tokens_per_shard, tmp_path):
    parts = make_parts([10, 25, 13])
    store = write_parts(tmp_path, parts, tokens_per_shard)
    rows = defaultdict(list)
    for tokens_td, _, pooled_t, items_t in parts:
        for token_d, pooled, item in zip(tokens_td, pooled_t, items_t.tolist(), strict=True):
            if pooled:
                rows[item].append(token_d.bfloat16().float())
    found_id = store.pooled_vectors()
    assert len(found_id) == 9
    assert 0 < len(rows) < 9  # some items have no such token
    for item, vector_d in enumerate(found_id):
        expected_d = torch.stack(rows[item]).mean(0) if rows[item] else torch.zeros(D)
        assert torch.allclose(vector_d, expected_d, atol=1e-6), item


# blocks


def test_an_epoch_has_every_shard_once_in_a_random_order(tmp_path):
    source = StoreSource(numbered(tmp_path, 640), block_bytes=2 * 2 * 64 * 3)
    epochs = [source.epoch(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert [len(block) for block in epochs[0]] == [3, 3, 2, 2]
    assert sorted(i for block in epochs[0] for i in block) == list(range(10))
    assert epochs[0] == epochs[1] != epochs[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_block_is_no_larger_than_asked_where_a_shard_fits(processes, tmp_path):
    store = numbered(tmp_path, 640)
    for block_bytes in (256, 700, 1000, 10_000):
        sources = [StoreSource(store, r, processes, block_bytes) for r in range(processes)]
        for source in sources:
            for block in source.epoch(torch.Generator().manual_seed(0)):
                assert source.read(block).activations_td.nbytes <= block_bytes


def test_a_shard_larger_than_a_block_is_a_block(tmp_path):
    source = StoreSource(numbered(tmp_path, 640), block_bytes=1)
    assert all(len(block) == 1 for block in source.epoch(torch.Generator()))


def test_processes_read_the_same_shards_in_the_same_order(tmp_path):
    store = numbered(tmp_path, 640)
    first, second = (
        StoreSource(store, rank, 2, 400).epoch(torch.Generator().manual_seed(3)) for rank in (0, 1)
    )
    assert first == second


def test_a_block_says_which_tokens_are_pooled(tmp_path):
    source = StoreSource(numbered(tmp_path, 320))
    (block,) = source.epoch(torch.Generator())
    read = source.read(block)
    assert read.pooled_t.dtype == torch.bool
    assert read.pooled_t.tolist() == [i % 10 == 9 for i in numbers(read.activations_td)]


# sinks


def with_sinks(folder, n=3200, every=7):
    """A store of numbered tokens, every seventh of them a sink that is a thousand times larger."""
    numbers_t = torch.arange(n)
    sink_t = numbers_t % every == 0
    tokens_td = torch.stack([numbers_t // 128, numbers_t % 128], 1).float()
    tokens_td[sink_t] = 1e6
    writer = StoreWriter(folder, 200, site="layers.3")
    for i in range(0, n, 100):
        part = slice(i, i + 100)
        items_t = numbers_t[part] // 10
        pooled_t = numbers_t[part] % 10 >= 7
        writer.add(tokens_td[part], numbers_t[part] % 4, pooled_t, items_t, sink_t[part])
    writer.close([[0, 1], [2, 3]], report())
    return Store(folder), sink_t


def report():
    counter = SinkCounter()
    tokens_ntd = torch.ones(1, 9, D)
    tokens_ntd[0, 4] = 100
    counter.add(tokens_ntd, torch.ones(1, 9), torch.zeros(1, 9))
    return counter.report()


@pytest.mark.parametrize("n", [3200, 320])
def test_no_training_and_no_measurement_sees_a_sink(n, tmp_path):
    store, sink_t = with_sinks(tmp_path, n)
    trained = training_numbers(StoreSource(store))
    held_out = numbers(store.held_out(10_000)[0])
    assert held_out
    assert sorted(trained + held_out) == (~sink_t).nonzero()[:, 0].tolist()


def test_sinks_are_in_no_mean(tmp_path):
    store, sink_t = with_sinks(tmp_path)
    for item, vector_d in enumerate(store.pooled_vectors()):
        read = [i for i in range(10 * item + 7, 10 * item + 10) if not sink_t[i]]
        rows_td = torch.tensor([[i // 128, i % 128] for i in read]).float()
        assert torch.allclose(vector_d, rows_td.mean(0)), item
    assert store.training_pairs().max() < 200


def test_a_pair_of_which_an_item_has_nothing_but_sinks_to_pool_is_left_out(tmp_path):
    tokens_td = torch.arange(12.0)[:, None].expand(12, D)
    writer = StoreWriter(tmp_path)
    items_t, sink_t = torch.arange(12) // 3, torch.arange(12) // 3 == 1
    writer.add(tokens_td, torch.zeros(12), torch.ones(12), items_t, sink_t)
    writer.close([[0, 1], [2, 3]])
    pairs_p2d = Store(tmp_path).training_pairs()
    assert pairs_p2d[:, :, 0].tolist() == [[7.0, 10.0]]


def test_the_index_says_the_site_and_what_was_found_of_sinks(tmp_path):
    store, _ = with_sinks(tmp_path)
    assert (store.site, store.sinks) == ("layers.3", report())
    assert json.loads((tmp_path / "index.json").read_text())["format"] == 2
    assert sinks_text(store).endswith(", at layers.3")
    assert "1 of 9 tokens" in sinks_text(store)


def test_a_store_of_the_first_format_is_read_without_sinks_and_site(tmp_path):
    store = numbered(tmp_path, 640)
    expected = training_numbers(StoreSource(store))
    for shard in store.shards:  # as it was written before
        path = tmp_path / shard["file"]
        tensors = load_file(path)
        del tensors["sink_t"]
        save_file(tensors, path)
        shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index = {"d": store.d, "items": store.n_items, "pairs": [[0, 1]], "shards": store.shards}
    (tmp_path / "index.json").write_text(json.dumps(index))
    old = Store(tmp_path)
    assert (old.site, old.sinks) == (None, None)
    assert "earlier version" in sinks_text(old)
    assert training_numbers(StoreSource(old)) == expected
    assert not old.read(0)["sink_t"].any()
    assert torch.equal(old.pooled_vectors(), store.pooled_vectors())


def test_a_store_of_a_newer_format_is_refused_by_name(tmp_path):
    numbered(tmp_path, 64)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": 3}))
    with pytest.raises(UserError, match=f"^{tmp_path}: an activation store of format 3"):
        Store(tmp_path)


# sampled stores


@pytest.mark.parametrize("tokens_per_shard", [20, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_means_are_of_all_tokens_where_only_some_are_stored(share, tokens_per_shard, tmp_path):
    generator = torch.Generator().manual_seed(1)
    whole = StoreWriter(tmp_path / "whole", tokens_per_shard)
    some = StoreWriter(tmp_path / "some", tokens_per_shard)
    n_kept = 0
    for batch in range(9):
        tokens_td = torch.randn(50, D, generator=generator)
        items_t = 5 * batch + torch.arange(50) // 10
        pooled_t = torch.rand(50, generator=generator) < 0.6
        sink_t = torch.rand(50, generator=generator) < 0.1
        kept_t = torch.rand(50, generator=generator) < share
        kept_t[0] = True
        n_kept += int(kept_t.sum())
        columns = (tokens_td, torch.zeros(50), pooled_t, items_t, sink_t)
        whole.add(*columns)
        some.add(*columns, kept_t)
    for writer in (whole, some):
        writer.close()
    sampled = Store(tmp_path / "some")
    assert sampled.n_tokens == n_kept
    assert torch.equal(sampled.pooled_vectors(), Store(tmp_path / "whole").pooled_vectors())


def test_no_sums_are_kept_where_all_pooled_tokens_are(tmp_path):
    writer = StoreWriter(tmp_path)
    pooled_t = torch.arange(10) % 5 == 4
    items_t = torch.arange(10) // 5
    writer.add(torch.ones(10, D), torch.zeros(10), pooled_t, items_t, None, pooled_t)
    writer.close()
    assert [path.name for path in tmp_path.glob("sums*")] == []
    assert torch.equal(Store(tmp_path).pooled_vectors(), torch.ones(2, D))


def test_damaged_sums_are_named(tmp_path):
    writer = StoreWriter(tmp_path)
    pooled_t, items_t = torch.ones(10), torch.arange(10) // 5
    writer.add(torch.ones(10, D), torch.zeros(10), pooled_t, items_t, None, items_t == 0)
    writer.close()
    path = tmp_path / "sums-00000.safetensors"
    flip_a_bit(path)
    with pytest.raises(UserError, match=f"^{path}: damaged or missing"):
        Store(tmp_path).pooled_vectors()
