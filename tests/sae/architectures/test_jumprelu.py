"""JumpReLU: learned thresholds and their pseudo-derivatives."""

from __future__ import annotations

import pytest
import torch

from patch_retriever.sae.architectures.jumprelu import JumpReLU
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.ops import PreActivations

THRESHOLD = 1.0
GATE = JumpReLU(2, bandwidth=0.5, l0_weight=0.6)
"""Its window goes from 0.75 to 1.25, which floats hold exactly."""

WINDOW = {
    0.5: (False, False),
    0.75: (False, False),
    0.76: (True, False),
    1.0: (True, False),
    1.01: (True, True),
    1.24: (True, True),
    1.25: (False, True),
    3.0: (False, True),
}
"""Pre-activation: whether it is in the window, and whether it is active."""


def leaves(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


@pytest.mark.parametrize(("u", "where"), WINDOW.items())
def test_activations_and_their_derivatives(u, where):
    in_window, active = where
    pre_e, threshold_e = leaves([u], [THRESHOLD])
    z_e = GATE.activate(pre_e, threshold_e)
    d_pre_e, d_threshold_e = torch.autograd.grad(3 * z_e.sum(), [pre_e, threshold_e])
    assert z_e.tolist() == [u if active else 0]
    assert d_pre_e.tolist() == [3 if active else 0]
    assert d_threshold_e.tolist() == pytest.approx([-3 * THRESHOLD / 0.5 if in_window else 0])


@pytest.mark.parametrize(("u", "where"), WINDOW.items())
def test_the_penalty_moves_thresholds_of_entries_in_the_window(u, where):
    in_window, active = where
    pre_e, threshold_e = leaves([u, 9.0, 9.0, 9.0], [THRESHOLD] * 4)
    loss = GATE.sparsity_loss(pre_e, threshold_e, torch.ones(4, dtype=torch.bool), n=1)
    l0 = 3 + active
    assert float(loss.detach()) == pytest.approx(0.6 * (l0 / 2 - 1) ** 2)
    d_pre_e, d_threshold_e = torch.autograd.grad(loss, [pre_e, threshold_e], allow_unused=True)
    assert d_pre_e is None or not bool(d_pre_e.any())
    slope = -1 / 0.5 * 0.6 * 2 * (l0 / 2 - 1) / 2
    assert d_threshold_e.tolist() == pytest.approx([slope if in_window else 0, 0, 0, 0])


@pytest.mark.parametrize(("active", "sign"), [(6, -1), (4, 0), (1, 1)])
def test_the_penalty_raises_thresholds_of_too_many_and_lowers_those_of_too_few(active, sign):
    """Two tokens, so that four active entries are k per token."""
    pre_e, threshold_e = leaves([1.1] * active + [0.9] * (8 - active), [THRESHOLD] * 8)
    loss = GATE.sparsity_loss(pre_e, threshold_e, torch.ones(8, dtype=torch.bool), n=2)
    (d_threshold_e,) = torch.autograd.grad(loss, [threshold_e])
    assert d_threshold_e.sign().tolist() == [sign] * 8


def test_revived_entries_do_not_count_as_active():
    pre_e, threshold_e = leaves([2.0, 2.0, 2.0, 1.1], [1.0, 1.0, 0.0, 1.0])
    main_e = torch.tensor([True, True, False, False])
    loss = GATE.sparsity_loss(pre_e, threshold_e, main_e, n=1)
    assert float(loss.detach()) == 0
    more = GATE.sparsity_loss(pre_e, threshold_e, torch.ones(4, dtype=torch.bool), n=1)
    (d_threshold_e,) = torch.autograd.grad(more, [threshold_e])
    assert d_threshold_e[3] < 0


def test_what_is_in_the_window_or_active_is_selected_and_not_much_more():
    generator = torch.Generator().manual_seed(0)
    x_nd, threshold_c = (
        torch.randn(700, 8, generator=generator),
        torch.rand(30, generator=generator),
    )
    W_cd, b_c = torch.randn(30, 8, generator=generator), torch.randn(30, generator=generator)
    entries = GATE.select(PreActivations(x_nd, W_cd, b_c), threshold_c)
    selected_nc = torch.zeros(700, 30, dtype=torch.bool)
    selected_nc[entries.rows_e, entries.concepts_e] = True
    u_nc = x_nd @ W_cd.T + b_c
    assert bool(selected_nc[u_nc > threshold_c - 0.25].all())
    assert not bool(selected_nc[u_nc < threshold_c - 0.5001].any())
    assert bool((entries.rows_e.diff() >= 0).all())


def test_a_rounded_product_loses_nothing_of_the_window():
    """Of tokens of norm one and unit rows, as training has them, with the default window."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows, d):
        return torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1)

    W_cd, threshold_c = unit(300, 64), 0.3 * torch.rand(300, generator=generator)
    x_nd = unit(500, 64)
    rounded = PreActivations(x_nd.bfloat16(), W_cd.bfloat16(), torch.zeros(300).bfloat16())
    entries = JumpReLU(8).select(rounded, threshold_c)
    selected_nc = torch.zeros(500, 300, dtype=torch.bool)
    selected_nc[entries.rows_e, entries.concepts_e] = True
    wanted_nc = x_nd @ W_cd.T > threshold_c - JumpReLU(8).bandwidth / 2
    assert int(wanted_nc.sum()) > 1000
    assert bool(selected_nc[wanted_nc].all())


@pytest.mark.parametrize(("start", "too_many"), [(0.05, True), (0.6, False)])
def test_the_penalty_brings_the_number_of_active_concepts_to_k(start, too_many):
    generator = torch.Generator().manual_seed(0)
    weights = Weights.random(16, 64, generator)
    weights.threshold_c.fill_(start)
    learner = Learner(weights, JumpReLU(4, bandwidth=0.1, l0_weight=10.0))
    l0 = []
    for _ in range(300):
        x_nd = torch.nn.functional.normalize(torch.randn(128, 16, generator=generator), dim=1)
        l0.append(float(learner.step(x_nd, 0.003).l0))
    assert (l0[0] > 6) if too_many else (l0[0] < 2)
    assert sum(l0[-20:]) / 20 == pytest.approx(4, rel=0.15)


def test_thresholds_are_parameters_and_there_is_one_prefix():
    assert GATE.learns_threshold
    assert GATE.prefix_ends(10) == [10]
