"""Sampling into the store: the same tokens whatever the batches, of every role, evenly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from patch_retriever.activations.sampling import (
    LEAST_OF_ITEM,
    Sampler,
    quotas,
    tokens_per_item,
)

QUICK = settings(deadline=None, database=None, max_examples=40)
IMAGE, TEXT, INSTRUCTION, SPECIAL = range(4)


def item(number, n_image=40, n_text=12, n_instruction=6, pooling="lasttoken", sinks=()):
    """Columns (items, positions, roles, pooled, sinks) of an item's tokens."""
    roles = [SPECIAL] + [IMAGE] * n_image + [TEXT] * n_text + [INSTRUCTION] * n_instruction
    roles_t = torch.tensor([*roles, SPECIAL])
    n = len(roles_t)
    pooled_t = torch.arange(n) == n - 1 if pooling == "lasttoken" else torch.ones(n).bool()
    sink_t = torch.zeros(n).bool()
    sink_t[list(sinks)] = True
    return torch.full((n,), number), torch.arange(n), roles_t, pooled_t, sink_t


def batch(*items):
    return tuple(torch.cat(columns) for columns in zip(*items, strict=True))


def kept(sampler, *batches):
    """(item, position) of every token that is kept."""
    found = set()
    for columns in batches:
        kept_t = sampler.keeps(*columns)
        found |= set(zip(*(c[kept_t].tolist() for c in columns[:2]), strict=True))
    return found


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_the_choice_is_the_same_whatever_the_batches_and_their_order(pooling):
    items = [item(n, 5 * n, pooling=pooling) for n in range(12)]
    sampler = Sampler(12, seed=3)
    whole = kept(sampler, batch(*items))
    assert kept(sampler, *(batch(one) for one in reversed(items))) == whole
    shuffled = [items[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    assert kept(sampler, batch(*shuffled[:5]), batch(*shuffled[5:])) == whole
    assert kept(Sampler(12, seed=4), batch(*items)) != whole


@QUICK
@given(
    sizes=st.lists(st.tuples(*[st.integers(0, 60)] * 3), min_size=1, max_size=6),
    per_item=st.integers(LEAST_OF_ITEM, 50),
    pooling=st.sampled_from(["lasttoken", "mean"]),
)
def test_no_item_keeps_more_than_its_budget_and_none_loses_a_role(sizes, per_item, pooling):
    items = [item(n, *size, pooling=pooling) for n, size in enumerate(sizes)]
    for columns in items:
        kept_t = Sampler(per_item).keeps(*columns)
        assert int(kept_t.sum()) == min(per_item, len(kept_t))
        roles_t = columns[2]
        assert set(roles_t[kept_t].tolist()) == set(roles_t.tolist())
        if pooling == "lasttoken":
            assert bool(kept_t[-1])


def test_roles_are_kept_in_proportion():
    columns = item(7, 300, 80, 18, pooling="mean")
    roles_t = columns[2]
    kept_r = torch.bincount(roles_t[Sampler(100).keeps(*columns)], minlength=4)
    expected_r = 100 * torch.bincount(roles_t, minlength=4) / len(roles_t)
    assert (kept_r - expected_r).abs().max() <= 1
    assert int(kept_r.sum()) == 100


@QUICK
@given(st.lists(st.integers(0, 500), min_size=4, max_size=4), st.integers(4, 300))
def test_quotas_use_the_budget_and_stay_within_one_of_the_share(counts, budget):
    counts_r = np.array(counts)
    quota_r = quotas(counts_r, budget)
    assert quota_r.sum() == min(budget, counts_r.sum())
    assert (quota_r <= counts_r).all()
    assert (quota_r[counts_r > 0] >= 1).all()
    if counts_r.sum() > budget:
        left_r = counts_r - np.minimum(counts_r, 1)
        share_r = left_r * (budget - (counts_r > 0).sum()) / left_r.sum()
        assert (np.abs(quota_r - (counts_r > 0) - share_r) < 1).all()


def test_every_position_and_every_item_are_kept_equally_often():
    """Chi-square over the positions of one role, and over pairs of neighbours."""
    n_items, n_image, per_item = 4000, 30, 10
    counts_p, together = np.zeros(n_image), 0
    for start in range(0, n_items, 200):
        columns = batch(*(item(n, n_image, 0, 0) for n in range(start, start + 200)))
        kept_t = Sampler(per_item, seed=11).keeps(*columns)
        image_np = kept_t.view(200, -1)[:, 1 : n_image + 1].numpy()
        counts_p += image_np.sum(0)
        together += int((image_np[:, 1:] & image_np[:, :-1]).sum())
    each = counts_p.sum() / n_items  # image tokens that an item keeps
    assert each == pytest.approx(per_item - 2)
    assert stats.chisquare(counts_p).pvalue > 0.001
    pairs = n_items * (n_image - 1) * each * (each - 1) / (n_image * (n_image - 1))
    assert together == pytest.approx(pairs, rel=0.05)


def test_seeds_and_neighbouring_items_choose_independently():
    columns = batch(*(item(n, 60, 0, 0) for n in range(600)))
    masks = [Sampler(32, seed).keeps(*columns).view(600, -1)[:, 1:61].numpy() for seed in (0, 1, 2)]
    share = masks[0].mean()
    for a, b in ((masks[0], masks[1]), (masks[1], masks[2]), (masks[0][1:], masks[0][:-1])):
        assert (a & b).mean() == pytest.approx(share**2, rel=0.05)


def test_sinks_take_no_place_of_others_unless_the_pooling_reads_them_alone():
    columns = item(0, 100, 20, 10, sinks=[0, 5, 60])
    kept_t = Sampler(30).keeps(*columns)
    assert not (kept_t & columns[4]).any()
    assert int(kept_t.sum()) == 30
    last = len(kept_t) - 1
    assert bool(Sampler(30).keeps(*item(0, 100, 20, 10, sinks=[last]))[last])


def test_short_items_are_kept_whole_with_their_sinks():
    assert bool(Sampler(30).keeps(*item(0, 5, 5, 5, sinks=[0])).all())


def test_without_a_budget_nothing_is_chosen():
    assert Sampler().keeps(*item(0)) is None


def test_a_budget_too_small_for_every_role_is_refused():
    with pytest.raises(ValueError, match="5 tokens at the least"):
        Sampler(LEAST_OF_ITEM - 1)


@QUICK
@given(st.integers(1, 10**6), st.integers(1, 10**8))
def test_budgets_keep_what_is_wanted_and_not_much_more(n_items, wanted):
    per_item = tokens_per_item(n_items, wanted)
    assert n_items * per_item >= wanted
    assert n_items * per_item <= max(wanted + n_items, LEAST_OF_ITEM * n_items)
    assert tokens_per_item(n_items, None) is None


def test_the_arithmetic_of_the_docs():
    """100,000 pairs of long items at d 4,096, as `sampling` says."""
    per_item = tokens_per_item(200_000, 2_000_000)
    assert per_item == 10
    assert 200_000 * per_item * (2 * 4096 + 8) == pytest.approx(16.4e9, rel=0.01)
