"""The gate between kinds of items."""

from __future__ import annotations

import pytest
import torch
from fit_samples import D, normal, three_kinds
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.patch import fit
from patch_retriever.patch.fit import gate as gate_module
from patch_retriever.patch.fit.gate import TOLERATED, choose_gate, errors
from patch_retriever.patch.operators import Affine, apply_maps


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


def kinds_at(*points, per_kind=200, noise=0.3, seed=0):
    """Items of each kind around a point."""
    kinds_n = torch.arange(len(points) * per_kind) % len(points)
    means_kd = torch.zeros(len(points), D)
    means_kd[:, 0] = torch.tensor(points)
    return means_kd[kinds_n] + noise * normal(len(kinds_n), D, seed=seed), kinds_n


ALL_KINDS = {0, 1, 2}


def test_kinds_that_lie_apart_are_all_told_apart():
    choice = choose_gate(kinds_at(0.0, 6.0, 12.0), ALL_KINDS, kinds_at(0.0, 6.0, 12.0, seed=1))
    assert choice.gate.tells_both and choice.note == ""
    assert choice.gate.error == 0


def test_items_with_both_go_the_way_of_images_where_these_cannot_be_told_apart():
    """As with hundreds of image tokens beside a short text."""
    x_nd, kinds_n = kinds_at(0.0, 6.0, 6.1)
    choice = choose_gate((x_nd, kinds_n), ALL_KINDS, kinds_at(0.0, 6.0, 6.1, seed=1))
    assert not choice.gate.tells_both
    assert torch.equal(choice.gate.kinds(x_nd), kinds_n.clamp(max=1))
    assert choice.gate.error == 0
    assert "use the statistics of images" in choice.note and "% of" in choice.note


def test_kinds_that_no_task_holds_cannot_make_a_gate_fail():
    """Items with both lie among texts: with tasks over them there is no gate, without there is."""
    fitted, held_out = kinds_at(0.0, 6.0, 0.0), kinds_at(0.0, 6.0, 0.0, seed=1)
    assert choose_gate(fitted, ALL_KINDS, held_out).gate is None
    choice = choose_gate(fitted, {0, 1}, held_out)
    x_nd, kinds_n = held_out
    rows = kinds_n != 2
    assert torch.equal(choice.gate.kinds(x_nd)[rows], kinds_n[rows])
    assert choice.gate.error == 0


def test_there_is_no_gate_where_texts_and_images_overlap_and_the_share_is_said():
    choice = choose_gate(kinds_at(0.0, 0.2, 0.4), ALL_KINDS)
    assert choice.gate is None
    assert "cannot be told from images" in choice.note and "1% is tolerated" in choice.note


def mislabelled(wrong, seed):
    """Texts and images that lie apart, but for some images that lie among the texts."""
    x_nd, kinds_n = kinds_at(0.0, 6.0, per_kind=500, seed=seed)
    images = (kinds_n == 1).nonzero()[:wrong, 0]
    x_nd[images, 0] -= 6.0
    return x_nd, kinds_n


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 12), st.integers(0, 12))
def test_an_error_is_tolerated_up_to_a_share_on_either_split_and_reported(fitted, held_out):
    judged = [mislabelled(fitted, 0), mislabelled(held_out, 1)]
    choice = choose_gate(judged[0], {0, 1}, judged[1])
    worst = max(fitted, held_out) / 500
    if worst > TOLERATED:
        assert choice.gate is None
    else:
        assert choice.gate.error == pytest.approx(worst)
        for items in judged:
            wrong = (choice.gate.kinds(items[0]) != items[1]).sum()
            assert int(wrong) in (fitted, held_out)


def test_one_item_of_a_kind_may_always_be_wrong():
    x_nd, kinds_n = kinds_at(0.0, 6.0, per_kind=20, seed=1)
    x_nd[1, 0] -= 6.0
    choice = choose_gate(kinds_at(0.0, 6.0, per_kind=20), {0, 1}, (x_nd, kinds_n))
    assert choice.gate is not None
    assert choice.gate.error == pytest.approx(1 / 20)
    assert errors(choice.gate, x_nd, kinds_n) == {0: (0.0, True), 1: (1 / 20, True)}


@pytest.mark.parametrize("size", [1.0, 300.0, 30_000.0])
def test_massive_activations_do_not_hide_what_tells_kinds_apart(size):
    """A constant one in one dimension, spikes of some items in another."""
    x_nd, kinds_n = kinds_at(0.0, 3.0, 6.0)
    x_nd[:, 4] += size
    x_nd[::37, 5] += size
    held_nd, held_n = kinds_at(0.0, 3.0, 6.0, seed=1)
    held_nd[:, 4] += size
    held_nd[5::41, 5] -= size
    choice = choose_gate((x_nd, kinds_n), ALL_KINDS, (held_nd, held_n))
    assert choice.gate.tells_both
    assert choice.gate.error <= TOLERATED


def test_without_a_second_plane_maps_are_those_of_images():
    x_nd, kinds_n = kinds_at(0.0, 6.0, 6.1)
    gate = choose_gate((x_nd, kinds_n), ALL_KINDS).gate
    shift_ge = torch.arange(3.0)[:, None].expand(3, D)
    step = Affine("shift", "modality", torch.eye(D).expand(3, D, D), shift_ge)
    moved_nd = apply_maps((step,), gate, x_nd, x_nd, 0) - x_nd
    assert torch.allclose(moved_nd[:, 0], kinds_n.clamp(max=1).float(), atol=1e-5)


def test_of_many_items_some_are_fitted_on_and_all_are_judged(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    kinds_n = torch.arange(600) % 3
    x_nd = torch.randn(600, 6, generator=generator) + 20 * torch.eye(6)[kinds_n]
    seen = []
    fit_one = gate_module.fit_gate
    monkeypatch.setattr(gate_module, "_FITTED_ON", 40)
    monkeypatch.setattr(
        gate_module,
        "fit_gate",
        lambda x_md, kinds_m, apart: seen.append(kinds_m) or fit_one(x_md, kinds_m, apart),
    )
    choice = choose_gate((x_nd, kinds_n), (0, 1, 2))
    assert seen[0].bincount().tolist() == [40, 40, 40]
    assert choice.gate is not None
    assert choice.gate.error == 0
    # an item that was not fitted on still counts: five texts far among the images
    wrong = (kinds_n == 0).nonzero()[1:6, 0]
    x_nd[wrong] = 20 * torch.eye(6)[1]
    assert choose_gate((x_nd, kinds_n), (0, 1, 2)).gate is None
