"""Bounded calibration: never more than asked for, pairs whole where there is room, reproducible."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.patch.sample import renumbered, sampled_items

steady = settings(deadline=None, max_examples=50)


@st.composite
def calibrations(draw):
    """Kinds of items, pairs of different items, and a bound."""
    kinds = draw(st.lists(st.integers(0, 2), min_size=2, max_size=60))
    item = st.integers(0, len(kinds) - 1)
    pairs = draw(st.lists(st.tuples(item, item), max_size=40))
    pairs_n2 = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return torch.tensor(kinds, dtype=torch.int8), pairs_n2, draw(st.integers(1, 30))


@steady
@given(calibrations(), st.integers(0, 99))
def test_no_kind_has_more_than_the_bound_and_none_has_less_than_it_can(case, seed):
    kinds_n, pairs_n2, most = case
    kept_m = sampled_items(kinds_n, [pairs_n2], most, seed)
    assert torch.equal(kept_m, kept_m.unique())  # ascending, once each
    for kind in range(3):
        expected = min(most, int((kinds_n == kind).sum()))
        assert int((kinds_n[kept_m] == kind).sum()) == expected


@steady
@given(calibrations())
def test_the_same_seed_keeps_the_same_items(case):
    kinds_n, pairs_n2, most = case
    first, second = (sampled_items(kinds_n, [pairs_n2], most, 3) for _ in range(2))
    assert torch.equal(first, second)


def test_all_items_stay_where_there_are_few():
    kinds_n = torch.tensor([0, 1, 1, 2])
    assert sampled_items(kinds_n, [torch.tensor([[0, 1]])], 2, 0).tolist() == [0, 1, 2, 3]


def test_pairs_stay_whole():
    n = 1000
    pairs_n2 = torch.stack([torch.arange(n), torch.arange(n) + n], 1)
    kinds_n = torch.arange(2 * n) // n
    kept_m = sampled_items(kinds_n, [pairs_n2, pairs_n2.flip(1)], 100, 0)
    assert len(kept_m) == 200
    assert len(renumbered(pairs_n2, kept_m)) == 100
    others_m = sampled_items(kinds_n, [pairs_n2], 100, 1)
    assert not torch.equal(others_m, kept_m)


def test_numbers_become_places_and_broken_pairs_are_left_out():
    kept_m = torch.tensor([2, 5, 9])
    assert renumbered(torch.tensor([9, 3, 2]), kept_m).tolist() == [2, 0]
    pairs_n2 = torch.tensor([[5, 2], [2, 3], [9, 9]])
    assert renumbered(pairs_n2, kept_m).tolist() == [[1, 0], [2, 2]]
