"""The gate between kinds of items."""

from __future__ import annotations

import pytest
import torch
from fit_samples import D, normal, three_kinds

from patch_retriever.patch import fit
from patch_retriever.patch.operators import apply_maps


def test_a_gate_separates_kinds_that_lie_apart():
    mean_nd, kinds_n = three_kinds(gap=12.0)
    gate = fit.fit_gate(100 * mean_nd + 300, kinds_n)
    assert torch.equal(gate.kinds(100 * mean_nd + 300), kinds_n)
    assert 0 < gate.margin <= 1


def test_the_closest_item_lies_one_unit_from_its_hyperplane():
    mean_nd, kinds_n = three_kinds(gap=12.0)
    gate = fit.fit_gate(mean_nd, kinds_n)
    distance_n2 = (mean_nd @ gate.direction_2d.T + gate.offset_2).abs()
    assert torch.allclose(distance_n2.min(0).values, torch.ones(2), atol=1e-3)


def test_there_is_no_gate_where_kinds_overlap():
    mean_nd, kinds_n = three_kinds(gap=0.5)
    assert fit.fit_gate(mean_nd, kinds_n) is None


@pytest.mark.parametrize("kinds", [(0, 1), (0, 2), (1, 2), (0,), (1,), (2,)])
def test_a_missing_kind_is_never_chosen(kinds):
    mean_nd, kinds_n = three_kinds(gap=12.0)
    there_n = torch.isin(kinds_n, torch.tensor(kinds))
    gate = fit.fit_gate(mean_nd[there_n], kinds_n[there_n])
    assert torch.equal(gate.kinds(mean_nd[there_n]), kinds_n[there_n])
    elsewhere_nd = 20 * normal(200, D, seed=5)
    assert set(gate.kinds(elsewhere_nd).tolist()) <= set(kinds)


def test_a_gate_switches_maps_by_modality_in_place():
    mean_nd, kinds_n = three_kinds(gap=12.0)
    groups = [(kinds_n == kind).nonzero()[:, 0] for kind in range(3)]
    step = fit.centre(fit.Statistics(mean_nd, groups, "modality"))
    out_nd = apply_maps((step,), fit.fit_gate(mean_nd, kinds_n), mean_nd, mean_nd, 1)
    for rows in groups:
        assert float(out_nd[rows].mean(0).abs().max()) < 1e-4
