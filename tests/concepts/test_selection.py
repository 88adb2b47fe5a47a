"""Selections of concepts, and the random ones beside them, against what defines them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.concepts.selection import random_outside, shuffled, unimodal


def test_unimodal_concepts_fire_for_one_modality_only():
    modality_c = torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0])
    expected = [True, True, False, False, False, True, True]
    assert unimodal(modality_c).tolist() == expected
    assert unimodal(modality_c, 0.02).tolist() == [True, False, False, False, False, False, True]


steady = settings(deadline=None, derandomize=True)


@st.composite
def selections(draw):
    """Energies of concepts, some of which never fire, and strengths of some that do."""
    c = draw(st.integers(2, 120))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    energy_c = torch.rand(c, generator=generator) ** draw(st.sampled_from([1, 4]))
    energy_c[torch.rand(c, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0
    fires_m = energy_c.nonzero()[:, 0]
    n = draw(st.integers(0, len(fires_m)))
    strength_c = torch.zeros(c)
    chosen_m = fires_m[torch.randperm(len(fires_m), generator=generator)[:n]]
    levels = torch.tensor(draw(st.sampled_from([[1.0], [0.5, 1.0], [0.1, 0.4, 0.9]])))
    strength_c[chosen_m] = levels[torch.randint(len(levels), (n,), generator=generator)]
    return strength_c, energy_c


@steady
@given(selections(), st.integers(0, 1000))
def test_random_concepts_lie_outside_the_selection_while_enough_others_fire(made, seed):
    strength_c, energy_c = made
    found = random_outside(strength_c, energy_c, seed)
    assert sorted(found.strength_c.tolist()) == sorted(strength_c.tolist())
    assert bool((energy_c[found.strength_c > 0] > 0).all())
    selected, others = strength_c > 0, (energy_c > 0) & (strength_c == 0)
    shared = int((selected & (found.strength_c > 0)).sum())
    assert found.overlap == shared == max(0, int(selected.sum()) - int(others.sum()))
    assert torch.equal(random_outside(strength_c, energy_c, seed).strength_c, found.strength_c)


def reachable(strength_c, energy_c):
    """The least and the most energy by strength that concepts outside of the selection can have,
    by pairing sorted strengths with sorted energies."""
    strengths = sorted(strength_c[strength_c > 0].tolist())
    others = sorted(energy_c[(energy_c > 0) & (strength_c == 0)].tolist())
    low, high = others[: len(strengths)], others[len(others) - len(strengths) :]
    least = sum(a * e for a, e in zip(strengths[::-1], low, strict=True))
    return least, sum(a * e for a, e in zip(strengths, high, strict=True))


@steady
@given(selections(), st.integers(0, 1000))
def test_the_energy_is_matched_where_others_can_have_it(made, seed):
    strength_c, energy_c = made
    n = int((strength_c > 0).sum())
    others = int(((energy_c > 0) & (strength_c == 0)).sum())
    equal = len(strength_c[strength_c > 0].unique()) == 1
    if n < 8 or others < 2 * n or not equal:
        return
    found = random_outside(strength_c, energy_c, seed)
    wanted = float(strength_c @ energy_c)
    least, most = reachable(strength_c, energy_c)
    expected = min(max(wanted, least), most)
    assert abs(found.energy_ratio * wanted - expected) <= 0.05 * wanted


def test_draws_differ_and_are_near_in_energy():
    generator = torch.Generator().manual_seed(3)
    energy_c = torch.rand(2000, generator=generator) ** 3
    strength_c = torch.zeros(2000)
    strength_c[torch.randperm(2000, generator=generator)[:200]] = 1.0
    draws = [random_outside(strength_c, energy_c, seed) for seed in range(3)]
    assert all(abs(draw.energy_ratio - 1) <= 0.01 and draw.overlap == 0 for draw in draws)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        shared = ((draws[a].strength_c > 0) & (draws[b].strength_c > 0)).sum()
        assert int(shared) < 60  # of 200; by chance among the like 22 and more


@steady
@given(selections(), st.integers(0, 1000))
def test_shuffled_strengths_are_dealt_among_concepts_that_fire(made, seed):
    strength_c, energy_c = made
    found = shuffled(strength_c, energy_c, seed)
    assert sorted(found.strength_c.tolist()) == sorted(strength_c.tolist())
    assert bool((energy_c[found.strength_c > 0] > 0).all())
    assert found.overlap == int(((found.strength_c > 0) & (strength_c > 0)).sum())
