"""The terms for concepts that image and text share: against plain loops, and what must hold."""

from __future__ import annotations

import pytest
import torch
from dense_reference import group_sparse_by_hand, iso_energy_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.sae.shared import SharedConcepts, group_sparse, iso_energy

QUICK = settings(deadline=None, database=None, max_examples=60)
TERMS = pytest.mark.parametrize(
    ("term", "by_hand"),
    [(iso_energy, iso_energy_by_hand), (group_sparse, group_sparse_by_hand)],
    ids=["iso-energy", "group-sparse"],
)


def random_codes(p, c, seed=0, density=0.5):
    """Codes as an SAE has them: some zero, the others positive."""
    generator = torch.Generator().manual_seed(seed)
    values_pc = torch.randn(p, c, generator=generator).double().abs() + 0.1
    return values_pc * (torch.rand(p, c, generator=generator) < density)


@TERMS
@QUICK
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 9999))
def test_terms_and_their_gradients_equal_plain_loops(term, by_hand, p, c, density, seed):
    sides = [random_codes(p, c, seed + i, density).requires_grad_() for i in range(2)]
    found, expected = term(*sides), by_hand(*sides)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(value, sides) for value in (found, expected)]
    for found_pc, expected_pc in zip(*gradients, strict=True):
        torch.testing.assert_close(found_pc, expected_pc, rtol=1e-7, atol=1e-10)


@TERMS
def test_both_sides_count_the_same(term, by_hand):  # noqa: ARG001
    a_pc, b_pc = random_codes(6, 9, 0), random_codes(6, 9, 1)
    assert float(term(a_pc, b_pc)) == pytest.approx(float(term(b_pc, a_pc)), rel=1e-12)


@TERMS
def test_a_term_is_a_mean_over_pairs(term, by_hand):  # noqa: ARG001
    a_pc, b_pc = random_codes(6, 9, 0), random_codes(6, 9, 1)
    one_by_one = [term(a_pc[i : i + 1], b_pc[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(term(a_pc, b_pc), torch.stack(one_by_one).mean())


@TERMS
def test_the_names_of_concepts_do_not_matter(term, by_hand):  # noqa: ARG001
    a_pc, b_pc, order_c = random_codes(6, 9, 0), random_codes(6, 9, 1), torch.randperm(9)
    torch.testing.assert_close(term(a_pc[:, order_c], b_pc[:, order_c]), term(a_pc, b_pc))


def test_equal_sides_have_all_the_energy_in_common():
    a_pc = random_codes(6, 9, density=1.0)
    assert float(iso_energy(a_pc, a_pc)) == pytest.approx(-1, abs=1e-9)
    assert float(iso_energy(3 * a_pc, a_pc / 5)) == pytest.approx(-1, abs=1e-9)


def test_sides_without_a_common_concept_have_no_energy_in_common():
    a_pc = random_codes(6, 8, density=1.0)
    a_pc[:, 4:] = 0
    assert float(iso_energy(a_pc, a_pc.flip(1))) == 0


def test_the_strongest_concepts_of_either_side_do_not_count():
    a_pc = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.0]]).double()
    b_pc = torch.tensor([[8.0, 1.0, 2.0, 9.0, 0.0]]).double()
    changed_pc = torch.tensor([[90.0, 1.0, 2.0, 30.0, 0.0]]).double()
    assert float(iso_energy(a_pc, b_pc)) == pytest.approx(-1, abs=1e-9)
    assert float(iso_energy(changed_pc, b_pc)) == pytest.approx(-1, abs=1e-9)
    only_strongest_pc = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]]).double()
    assert float(iso_energy(only_strongest_pc, only_strongest_pc)) == 0


@pytest.mark.parametrize("term", [iso_energy, group_sparse])
def test_codes_that_are_all_zero_have_a_finite_gradient(term):
    sides = [torch.zeros(3, 4, requires_grad=True) for _ in range(2)]
    value = term(*sides)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-9)
    assert all(bool(side.grad.isfinite().all()) for side in sides)


def test_one_concept_on_both_sides_costs_less_than_two():
    one = torch.tensor([[1.0, 0.0]]).double()
    assert float(group_sparse(one, one)) == pytest.approx(2**0.5, rel=1e-5)
    assert float(group_sparse(one, one.flip(1))) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "term"), [("iso-energy", iso_energy), ("group-sparse", group_sparse)]
)
def test_the_penalty_is_the_weighted_term_of_that_name(kind, term):
    a_pc, b_pc = random_codes(6, 9, 0), random_codes(6, 9, 1)
    expected = 0.25 * term(a_pc, b_pc)
    torch.testing.assert_close(SharedConcepts(kind, 0.25).penalty(a_pc, b_pc), expected)
