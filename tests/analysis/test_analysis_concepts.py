"""Figures 2 and 3 and Table 1 against loops over concepts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.analysis.concepts import (
    concentration,
    concepts_for,
    jaccard,
    log_steps,
    modality_bins,
    top_set,
)

steady = settings(deadline=None, derandomize=True)
ENERGIES = st.lists(
    st.one_of(st.just(0.0), st.floats(0.0009765625, 100, width=32)), min_size=1, max_size=60
).filter(lambda values: sum(values) > 0)


@steady
@given(ENERGIES, st.integers(0, 1000), st.integers(1, 12))
def test_energy_is_summed_in_the_bin_of_its_modality_score(energies, seed, bins):
    generator = torch.Generator().manual_seed(seed)
    modality_c = torch.rand(len(energies), generator=generator)
    modality_c[0] = 1.0
    energy_c = torch.tensor(energies)
    share_b, count_b = modality_bins(modality_c, energy_c, bins)
    for b in range(bins):
        mine = [
            i
            for i, m in enumerate(modality_c.tolist())
            if energies[i] > 0 and min(int(torch.tensor(m) * bins), bins - 1) == b
        ]
        assert int(count_b[b]) == len(mine)
        expected = sum(energies[i] for i in mine) / sum(energies)
        assert float(share_b[b]) == pytest.approx(expected, abs=1e-6)


@steady
@given(ENERGIES, st.floats(0.05, 0.99))
def test_the_fewest_concepts_that_hold_a_share_of_the_energy(energies, share):
    n = concepts_for(torch.tensor(energies), share)
    ordered = sorted(energies, reverse=True)
    assert sum(ordered[:n]) >= share * sum(energies) * (1 - 1e-6)
    assert sum(ordered[: n - 1]) < share * sum(energies) * (1 + 1e-6)
    held_c = concentration(torch.tensor(energies))
    assert float(held_c[n - 1]) == pytest.approx(sum(ordered[:n]) / sum(energies), abs=1e-6)


def test_equal_energies_need_as_many_concepts_as_the_share_says():
    assert concepts_for(torch.ones(200), 0.99) == 198
    assert concepts_for(torch.ones(200), 0.5) == 100
    assert concepts_for(torch.tensor([0.0, 5.0, 0.0]), 0.99) == 1


@steady
@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=2, max_size=3))
def test_jaccard_counts_members_of_all_over_members_of_any(sets):
    everyone = range(10)
    in_all = sum(all(i in s for s in sets) for i in everyone)
    in_any = sum(any(i in s for s in sets) for i in everyone)
    assert jaccard(sets) == in_all / in_any


def test_the_top_set_holds_the_highest_scores():
    assert top_set(torch.tensor([1.0, 9.0, -3.0, 5.0]), 2) == {1, 3}
    assert top_set(torch.tensor([0.0, 0.0, 0.0]), 2) == {0, 1}  # ties: the first


def test_two_random_sets_overlap_as_the_table_says():
    generator = torch.Generator().manual_seed(0)
    c, n = 200, 40
    found = []
    for _ in range(300):
        a, b = (set(torch.randperm(c, generator=generator)[:n].tolist()) for _ in "ab")
        found.append(jaccard([a, b]))
    assert sum(found) / len(found) == pytest.approx(n / (2 * c - n), abs=0.01)


@pytest.mark.parametrize(("n", "steps"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_steps_double_and_end_at_all(n, steps):
    assert log_steps(n) == steps
