"""Selections of concepts, and the random ones beside them, against what defines them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.concepts.selection import like_in_energy, unimodal


def test_unimodal_concepts_fire_for_one_modality_only():
    modality_c = torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0])
    expected = [True, True, False, False, False, True, True]
    assert unimodal(modality_c).tolist() == expected
    assert unimodal(modality_c, 0.02).tolist() == [True, False, False, False, False, False, True]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(0, 1000), st.integers(0, 2**31))
def test_random_concepts_are_a_one_to_one_exchange_of_neighbours_in_energy(c, seed, data_seed):
    energy_c = torch.rand(c, generator=torch.Generator().manual_seed(data_seed))
    partner_c = like_in_energy(energy_c, seed, reach=5)
    assert sorted(partner_c.tolist()) == list(range(c))
    place = {concept: p for p, concept in enumerate(energy_c.argsort(descending=True).tolist())}
    for concept, partner in enumerate(partner_c.tolist()):
        assert abs(place[concept] - place[partner]) <= 5
    if c > 50:
        assert not torch.equal(partner_c, like_in_energy(energy_c, seed + 1, reach=5))
