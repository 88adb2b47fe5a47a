"""The activation store: shards on disk, and the batches that training reads from them."""

from __future__ import annotations

import hashlib
import json
from itertools import chain, islice

import pytest
import torch
from safetensors.torch import load_file

from patch_retriever.activations.store import Store, StoreWriter

D = 3


def make_parts(sizes, seed=0):
    """Batches of tokens as they come from a backbone; every fifth token is pooled."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, D, generator=generator),
            torch.randint(0, 4, (n,), generator=generator),
            torch.arange(n) % 5 == 0,
        )
        for n in sizes
    ]


def write_store(folder, parts, tokens_per_shard=16_384):
    writer = StoreWriter(folder, tokens_per_shard)
    for part in parts:
        writer.add(*part)
    writer.close()
    return Store(folder)


def numbered(folder, n, pooled_t=None, tokens_per_shard=64):
    """A store whose tokens carry their own number (in two digits that bf16 holds exactly)."""
    numbers_t = torch.arange(n)
    pooled_t = torch.zeros(n) if pooled_t is None else pooled_t
    tokens_td = torch.stack([numbers_t // 128, numbers_t % 128], 1).float()
    return write_store(
        folder,
        [
            (tokens_td[i : i + 32], torch.zeros(32)[: n - i], pooled_t[i : i + 32])
            for i in range(0, n, 32)
        ],
        tokens_per_shard,
    )


def numbers(batch_td):
    return (batch_td[:, 0] * 128 + batch_td[:, 1]).long().tolist()


def test_what_is_read_is_what_was_added(tmp_path):
    parts = make_parts([10, 7, 30, 1])
    store = write_store(tmp_path, parts, tokens_per_shard=15)
    shards = [store.read(i) for i in range(len(store.shards))]
    for key, column in (("activations_td", 0), ("roles_t", 1), ("pooled_t", 2)):
        expected = torch.cat([part[column] for part in parts])
        found = torch.cat([shard[key] for shard in shards])
        assert torch.equal(found, expected.to(found.dtype)), key
    assert shards[0]["activations_td"].dtype == torch.bfloat16


def test_shards_hold_about_as_many_tokens_as_asked(tmp_path):
    store = write_store(tmp_path, make_parts([10] * 10), tokens_per_shard=25)
    assert [shard["tokens"] for shard in store.shards] == [30, 30, 30, 10]
    assert store.n_tokens == 100


def test_the_index_names_every_shard_with_its_hash(tmp_path):
    write_store(tmp_path, make_parts([20, 20, 5]), tokens_per_shard=20)
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [shard["tokens"] for shard in shards] == [20, 20, 5]
    files = {path.name for path in tmp_path.iterdir()} - {"index.json"}
    assert files == {shard["file"] for shard in shards}
    for shard in shards:
        content = (tmp_path / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert len(load_file(tmp_path / shard["file"])["roles_t"]) == shard["tokens"]


def test_the_same_tokens_give_the_same_hashes(tmp_path):
    first, second = (
        write_store(tmp_path / name, make_parts([20, 9]), tokens_per_shard=20) for name in "ab"
    )
    assert first.shards == second.shards


def test_a_store_that_was_not_closed_is_not_read(tmp_path):
    writer = StoreWriter(tmp_path, tokens_per_shard=5)
    writer.add(*make_parts([10])[0])
    with pytest.raises(FileNotFoundError):
        Store(tmp_path)


def test_writing_again_makes_the_old_store_unreadable_until_it_is_finished(tmp_path):
    write_store(tmp_path, make_parts([10]))
    writer = StoreWriter(tmp_path)
    with pytest.raises(FileNotFoundError):
        Store(tmp_path)
    writer.add(*make_parts([4])[0])
    writer.close()
    assert Store(tmp_path).n_tokens == 4


def test_an_epoch_of_batches_covers_every_token_once(tmp_path):
    store = numbered(tmp_path, 320)
    seen = [i for batch in islice(store.training_batches(40, seed=0), 8) for i in numbers(batch)]
    assert sorted(seen) == list(range(320))
    assert seen != sorted(seen)


def test_epochs_are_shuffled_anew(tmp_path):
    batches = numbered(tmp_path, 128).training_batches(64, seed=0)
    first, second = ([n for b in islice(batches, 2) for n in numbers(b)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_tokens_are_shuffled_across_the_shards_in_memory(tmp_path):
    store = numbered(tmp_path, 256)
    assert len(store.shards) == 4
    shards = {number // 64 for number in numbers(next(store.training_batches(32, seed=0)))}
    assert len(shards) == 4


def test_few_shards_in_memory_still_cover_every_token(tmp_path):
    store = numbered(tmp_path, 256)
    batches = store.training_batches(64, seed=3, shards_in_memory=1)
    seen = [numbers(batch) for batch in islice(batches, 4)]
    assert sorted(chain(*seen)) == list(range(256))
    assert all(len({number // 64 for number in batch}) == 1 for batch in seen)


def test_batches_depend_on_the_seed_alone(tmp_path):
    store = numbered(tmp_path, 320)
    first, again, other = (
        [numbers(batch) for batch in islice(store.training_batches(50, seed, 0.3), 15)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_batches_are_float32_of_the_asked_size(tmp_path):
    batch_td = next(numbered(tmp_path, 100).training_batches(30, seed=0))
    assert batch_td.shape == (30, 2)
    assert batch_td.dtype == torch.float32


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_pooled_tokens_make_up_the_asked_share(share, tmp_path):
    pooled_t = torch.arange(960) % 16 == 0
    store = numbered(tmp_path, 960, pooled_t, tokens_per_shard=10_000)
    batches = list(islice(store.training_batches(64, 0, share), 40))
    seen = torch.tensor([number for batch in batches for number in numbers(batch)])
    assert float(pooled_t[seen].float().mean()) == pytest.approx(share, abs=0.05)
    assert set(seen[pooled_t[seen]].tolist()) == set(pooled_t.nonzero()[:, 0].tolist())


def test_without_a_share_pooled_tokens_come_as_often_as_the_others(tmp_path):
    pooled_t = torch.arange(320) % 16 == 0
    batches = numbered(tmp_path, 320, pooled_t).training_batches(32, seed=0)
    seen = torch.tensor([number for batch in islice(batches, 10) for number in numbers(batch)])
    assert int(pooled_t[seen].sum()) == 20


@pytest.mark.parametrize("all_pooled", [True, False])
def test_a_share_changes_nothing_where_all_or_no_tokens_are_pooled(all_pooled, tmp_path):
    store = numbered(tmp_path, 128, torch.full((128,), float(all_pooled)))
    seen = [n for batch in islice(store.training_batches(64, 0, 0.5), 2) for n in numbers(batch)]
    assert sorted(seen) == list(range(128))


class Impatient(Store):
    """A store that does not let itself be read for ever."""

    reads = 0

    def read(self, number):
        self.reads += 1
        assert self.reads < 20, "the shards are read again and again and no batch comes"
        return super().read(number)


def test_a_store_smaller_than_a_batch_still_gives_batches(tmp_path):
    numbered(tmp_path, 40)
    batch_td = next(Impatient(tmp_path).training_batches(100, seed=0))
    assert set(numbers(batch_td)) == set(range(40))
