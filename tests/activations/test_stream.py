"""The stream of training batches: its order, its positions, and the thread that reads ahead."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from contextlib import closing
from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.activations.stream import Block, Position, batches, some_of

QUICK = settings(deadline=None, database=None, max_examples=20)


class Numbered:
    """Blocks whose tokens carry their own number (in two digits that bf16 holds exactly)."""

    def __init__(self, sizes, pooled_every=16):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.blocks = [range(s, s + size) for s, size in zip(starts, sizes, strict=True)]
        self.pooled_every = pooled_every

    def epoch(self, generator):
        return [[i] for i in torch.randperm(len(self.blocks), generator=generator).tolist()]

    def read(self, block):
        numbers_t = torch.tensor(self.blocks[block[0]])
        tokens_td = torch.stack([numbers_t // 128, numbers_t % 128], 1).bfloat16()
        return Block(tokens_td, numbers_t % self.pooled_every == 0)


def numbers(batch_nd):
    return (batch_nd @ torch.tensor([128.0, 1.0])).long().tolist()


def take(n, *args, **options):
    """The numbers in the first n batches, and the positions after them."""
    with closing(batches(*args, **options)) as stream:
        found = [(numbers(batch_nd), position) for batch_nd, position in islice(stream, n)]
    return [batch for batch, _ in found], [position for _, position in found]


# what the batches hold


def test_an_epoch_covers_every_token_once_and_shuffled():
    seen, _ = take(8, Numbered([320]), 40, 0)
    assert sorted(chain(*seen)) == list(range(320))
    assert list(chain(*seen)) != list(range(320))


def test_tokens_are_shuffled_within_a_block():
    seen, _ = take(8, Numbered([64, 64, 64, 64]), 32, 3)
    assert sorted(chain(*seen)) == list(range(256))
    blocks = [{i // 64 for i in batch} for batch in seen]
    assert all(len(block) == 1 for block in blocks)
    assert [blocks[i] for i in range(0, 8, 2)] == [blocks[i] for i in range(1, 8, 2)]


def test_every_epoch_has_another_order_of_blocks_and_of_tokens():
    source = Numbered([64] * 6)
    seen, _ = take(12, source, 64, 0)
    first, second = seen[:6], seen[6:]
    assert [batch[0] // 64 for batch in first] != [batch[0] // 64 for batch in second]
    of_block = {batch[0] // 64: batch for batch in first}
    assert all(of_block[batch[0] // 64] != batch for batch in second)
    assert all(sorted(of_block[batch[0] // 64]) == sorted(batch) for batch in second)


def test_batches_depend_on_the_seed_alone():
    source = Numbered([100, 64, 200])
    first, again, other = (take(15, source, 50, seed, pooled_share=0.3) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_batches_are_float32_of_the_asked_size():
    with closing(batches(Numbered([100]), 30, 0)) as stream:
        batch_nd, _ = next(stream)
    assert batch_nd.shape == (30, 2)
    assert batch_nd.dtype == torch.float32


def test_a_block_smaller_than_a_batch_is_repeated():
    (batch,), _ = take(1, Numbered([40]), 120, 0)
    assert Counter(batch) == {i: 3 for i in range(40)}
    for batch in take(5, Numbered([7, 3]), 16, 0)[0]:
        assert len(batch) == 16
        assert max(Counter(batch).values()) <= -(-16 // min(7, 3))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_pooled_tokens_make_up_the_asked_share(share):
    seen = list(chain(*take(40, Numbered([960]), 64, 0, pooled_share=share)[0]))
    pooled = [i for i in seen if i % 16 == 0]
    assert len(pooled) / len(seen) == pytest.approx(share, abs=0.05)
    assert set(pooled) == set(range(0, 960, 16))


def test_pooled_tokens_of_which_there_are_many_are_not_made_fewer():
    seen = list(chain(*take(5, Numbered([320], pooled_every=2), 64, 0, pooled_share=0.1)[0]))
    assert sorted(seen) == list(range(320))


def test_without_a_share_pooled_tokens_come_as_often_as_the_others():
    assert sorted(chain(*take(10, Numbered([320]), 32, 0)[0])) == list(range(320))


@pytest.mark.parametrize("pooled_every", [1, 1000])
def test_a_share_changes_nothing_where_all_or_no_tokens_are_pooled(pooled_every):
    source = Numbered([128, 128], pooled_every)
    source.blocks = [range(1, 129)]
    seen, _ = take(2, source, 64, 0, pooled_share=0.5)
    assert sorted(chain(*seen)) == list(range(1, 129))


# positions


@QUICK
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch_size=st.integers(1, 25),
    seed=st.integers(0, 2**40),
    share=st.sampled_from([0.0, 0.5]),
    done=st.integers(0, 12),
)
def test_going_on_from_any_position_gives_what_an_unbroken_stream_gives(
    sizes, batch_size, seed, share, done
):
    source = Numbered(sizes, pooled_every=5)
    whole, positions = take(16, source, batch_size, seed, pooled_share=share)
    start = ([Position(), *positions])[done]
    rest = take(16 - done, source, batch_size, seed, start, pooled_share=share)
    assert rest == (whole[done:], positions[done:])


def test_positions_name_epoch_block_and_the_next_batch():
    _, positions = take(5, Numbered([40, 20]), 20, 0)
    assert {(p.epoch, p.block) for p in positions[:3]} == {(0, 0), (0, 1)}
    assert positions[3].epoch == 1
    assert positions[0] == Position(0, 0, 1)
    assert positions == sorted(positions)


def test_a_stream_without_a_start_begins_at_the_beginning():
    source = Numbered([40, 20])
    assert take(4, source, 8, 5) == take(4, source, 8, 5, Position())


# reading ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_an_error_while_reading_a_block_stops_the_stream():
    source, reads = Numbered([20, 20, 20]), []

    def read(block):
        reads.append(block)
        if len(reads) == 3:
            raise OSError("the disk is gone")
        return Numbered.read(source, block)

    source.read = read
    stream = batches(source, 10, 0)
    assert len(list(islice(stream, 4))) == 4
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert threads() == []


def test_a_consumer_that_fails_leaves_no_thread():
    with pytest.raises(ZeroDivisionError), closing(batches(Numbered([20] * 5), 10, 0)) as stream:
        for _batch in stream:
            raise ZeroDivisionError
    assert threads() == []


def test_a_stream_that_nobody_reads_starts_no_thread():
    with closing(batches(Numbered([20]), 10, 0)):
        assert threads() == []


class Watched(Numbered):
    """Counts its blocks that are alive whenever one more has been read."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.alive, self.most = weakref.WeakSet(), 0

    def read(self, block):
        read = Tracked(**vars(super().read(block)))
        self.alive.add(read)
        time.sleep(0.02)  # so that who waited for a block has let go of the one before
        self.most = max(self.most, len(self.alive))
        return read


class Tracked(Block):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_at_most_three_blocks_are_in_memory(pause):
    source = Watched([20] * 4)
    with closing(batches(source, 20, 0)) as stream:
        for _ in islice(stream, 10):
            time.sleep(pause)
    assert 2 <= source.most <= 3


# some of many tokens


@QUICK
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 60))
def test_some_tokens_are_in_their_order_with_their_roles(sizes, n):
    source = Numbered(sizes)
    parts = [source.read([i]).activations_td for i in range(len(sizes))]
    tokens_td, roles_t = some_of(((part_td, part_td[:, 1] % 4) for part_td in parts), n)
    found = numbers(tokens_td)
    assert len(found) == min(n, sum(sizes))
    assert found == sorted(set(found))
    assert torch.equal(roles_t.float(), tokens_td[:, 1] % 4)


def test_some_of_many_tokens_are_from_everywhere_and_never_all_in_memory():
    alive = weakref.WeakSet()

    def parts():
        for number in range(100):
            assert sum(map(len, alive)) <= 2 * 50 + 30
            part_td = torch.full((30, 2), float(number)).bfloat16()
            alive.add(part_td)
            yield part_td, torch.zeros(30)

    tokens_td, _ = some_of(parts(), 50)
    per_stretch = torch.histc(tokens_td[:, 0], bins=5, min=0, max=100)
    assert per_stretch.min() >= 3
