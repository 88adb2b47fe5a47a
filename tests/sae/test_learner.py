"""The learner against dense autograd, torch's Adam and plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from dense_reference import (
    OPTIONS,
    converted,
    dense_gradient,
    dense_loss,
    dense_pre_activations,
    gate,
    largest_dead,
    make_learner,
    mask_of,
    random_tokens,
    random_weights,
    revived_mask,
    whole_gradient,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from patch_retriever.sae import learner as learner_module
from patch_retriever.sae import ops
from patch_retriever.sae.adam import Adam
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.shared import SharedConcepts

QUICK = settings(deadline=None, database=None, max_examples=150)
SEEDS = st.integers(0, 100_000)
NAMES = sorted(OPTIONS)
EVERY_ARCHITECTURE = pytest.mark.parametrize("name", NAMES)
SILENCE = {"none": 0.0, "some tokens": 4.0, "all tokens": 100.0}
"""What is taken off the encoder's bias, and the tokens that are zero feel most."""


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """So that small batches are several chunks, the last one smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "CHUNK_TOKENS", 5)
        yield


@dataclass(frozen=True)
class Case:
    """A batch and an SAE in the middle of training."""

    name: str
    n: int = 12
    d: int = 5
    c: int = 16
    k: int = 3
    dead: float = 0.0
    k_aux: int = 3
    shared: str | None = None
    silence: str = "none"
    grid: bool = False
    low_precision: bool = False
    seed: int = 0

    @property
    def n_pairs(self) -> int:
        return 0 if self.shared is None else self.n // 3

    def tokens(self) -> torch.Tensor:
        x_nd = random_tokens(self.n, self.d, self.seed + 1, self.grid)
        if self.silence != "none":
            x_nd[::2] = 0
        return x_nd

    def learner(self, dtype: torch.dtype = torch.float64, **changes) -> Learner:
        weights = random_weights(self.d, self.c, self.seed, self.grid)
        weights.b_enc_c -= SILENCE[self.silence]
        shared = None if self.shared is None else SharedConcepts(self.shared, 0.6)
        own = {"k_aux": self.k_aux, "aux_weight": 0.5, "dead_after": 4, "shared": shared}
        own |= {"low_precision": self.low_precision, **changes}
        learner = make_learner(self.name, converted(weights, dtype), self.k, **own)
        generator = torch.Generator().manual_seed(self.seed + 2)
        learner.silent_c[torch.rand(self.c, generator=generator) < self.dead] = 4
        return learner


@st.composite
def cases(draw):
    c = draw(st.integers(1, 21))
    return Case(
        name=draw(st.sampled_from(NAMES)),
        n=draw(st.integers(1, 13)),
        d=draw(st.integers(1, 7)),
        c=c,
        k=draw(st.sampled_from([1, c, min(c, 2), max(1, c // 4)])),
        dead=draw(st.sampled_from([0.0, 0.4, 1.0])),
        k_aux=draw(st.integers(1, 5)),
        shared=draw(st.sampled_from([None, "iso-energy", "group-sparse"])),
        silence=draw(st.sampled_from(["none", "none", "some tokens", "all tokens"])),
        grid=draw(st.booleans()),
        low_precision=draw(st.booleans()),
        seed=draw(SEEDS),
    )


def selected_mask(learner, x_nd):
    entries = learner.select(x_nd)
    return mask_of(entries.rows_e, entries.concepts_e, len(x_nd), len(learner.weights.b_enc_c))


def reference_mask(learner, x_nd):
    """The learner's choice; JumpReLU's own gate needs none."""
    if learner.architecture.name == "jumprelu" and learner.W_low_cd is learner.weights.W_enc_cd:
        return gate(learner.architecture, dense_pre_activations(learner.weights, x_nd))
    return selected_mask(learner, x_nd)


def assert_equal_gradients(found, expected, rtol=1e-6):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        atol = 1e-3 * rtol * (float(gradient.abs().max()) + 1e-3)
        torch.testing.assert_close(
            found[name].double(), gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(QUICK, max_examples=600)
@given(cases())
@example(Case("topk", n=1, k=16))
@example(Case("matryoshka", c=1, k=1, dead=1.0))
@example(Case("batch-topk", silence="all tokens", dead=0.4, shared="iso-energy"))
@example(Case("jumprelu", c=13, grid=True, dead=0.4, shared="group-sparse"))
def test_loss_and_gradients_equal_dense_autograd(case):
    learner, x_nd = case.learner(), case.tokens()
    loss, gradient = learner.gradient(x_nd, case.n_pairs)
    weights = converted(learner.weights, torch.float64, requires_grad=True)
    gate_nc, revived_nc = reference_mask(learner, x_nd), revived_mask(learner, gradient)
    total, fvu, z_nc = dense_loss(learner, weights, x_nd, gate_nc, revived_nc, case.n_pairs)
    assert (revived_nc is not None) == bool((learner.silent_c >= 4).any())
    torch.testing.assert_close(loss.total, total.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.fvu, fvu.detach(), rtol=1e-9, atol=1e-9)
    fires_nc = z_nc > 0
    assert float(loss.l0) == pytest.approx(float(fires_nc.sum()) / case.n)
    assert torch.equal(loss.fired_c, fires_nc.any(0))
    assert_equal_gradients(whole_gradient(learner, gradient), dense_gradient(total, weights))


@QUICK
@given(cases())
def test_what_is_selected_is_a_largest_choice_also_where_values_are_equal(case):
    learner, x_nd = case.learner(low_precision=False), case.tokens()
    u_nc = dense_pre_activations(learner.weights, x_nd)
    entries = learner.select(x_nd)
    mask_nc = selected_mask(learner, x_nd)
    assert int(mask_nc.sum()) == len(entries.rows_e)
    assert bool((entries.rows_e.diff() >= 0).all())
    if case.name == "jumprelu":
        active_nc = u_nc > learner.weights.threshold_c
        assert bool(mask_nc[active_nc].all())
    elif case.name == "topk":
        assert (mask_nc.sum(1) == case.k).all()
        expected_nk = u_nc.topk(case.k, dim=1).values
        found_nk = u_nc[mask_nc].view(case.n, case.k).sort(dim=1, descending=True).values
        torch.testing.assert_close(found_nk, expected_nk)
    else:
        wanted = min(case.n * case.k, u_nc.numel())
        expected_e = u_nc.flatten().topk(wanted).values
        found_e = u_nc[mask_nc].sort(descending=True).values
        torch.testing.assert_close(found_e, expected_e[expected_e > 0])


@QUICK
@given(cases())
def test_what_is_revived_are_the_largest_dead_concepts_of_every_token(case):
    learner, x_nd = case.learner(low_precision=False), case.tokens()
    dead_c = learner.silent_c >= 4
    revived_nc = revived_mask(learner, learner.gradient(x_nd)[1])
    if not bool(dead_c.any()):
        assert revived_nc is None
        return
    k = min(case.k_aux, int(dead_c.sum()))
    assert (revived_nc.sum(1) == k).all()
    u_nc = dense_pre_activations(learner.weights, x_nd).masked_fill(~dead_c, -torch.inf)
    found_nk = u_nc[revived_nc].view(case.n, k).sort(dim=1, descending=True).values
    torch.testing.assert_close(found_nk, u_nc.topk(k, dim=1).values)


@EVERY_ARCHITECTURE
def test_the_gradient_belongs_to_the_selected_entries(name):
    case = Case(name, dead=0.4)
    learner, x_nd = case.learner(), case.tokens()
    active = learner.gradient(x_nd)[1].active
    main_e = active.rows_e < case.n * len(learner.prefix_ends)
    rows_e = active.rows_e[main_e] % case.n
    found_nc = mask_of(rows_e, active.concepts_e[main_e], case.n, case.c)
    assert torch.equal(found_nc, selected_mask(learner, x_nd))


@EVERY_ARCHITECTURE
def test_revival_moves_dead_concepts_and_nothing_else(name):
    case = Case(name, n=40, c=32, dead=0.4)
    x_nd = case.tokens()
    with_it, without = (case.learner(aux_weight=weight) for weight in (0.5, 0.0))
    _, gradient = with_it.gradient(x_nd)
    found, plain = (whole_gradient(s, s.gradient(x_nd)[1]) for s in (with_it, without))
    u_nc = dense_pre_activations(with_it.weights, x_nd)
    revived_c = ((u_nc > 0) & revived_mask(with_it, gradient)).any(0)
    assert 5 < int(revived_c.sum()) < 20
    for weights in ("W_enc_cd", "W_dec_cd"):
        moved_c = (found[weights] - plain[weights]).abs().amax(1) > 1e-12
        assert torch.equal(moved_c, revived_c), weights
    assert torch.equal((found["b_enc_c"] - plain["b_enc_c"]).abs() > 1e-12, revived_c)
    for weights in {"b_dec_d", "threshold_c"} & set(found):
        torch.testing.assert_close(found[weights], plain[weights], rtol=0, atol=1e-12)


def test_a_dead_concept_that_is_silent_without_revival_learns_by_it():
    case = Case("topk", n=20, c=12, k=2)
    learner, x_nd = case.learner(k_aux=1), case.tokens()
    learner.weights.b_enc_c[3] = -2.5
    learner.silent_c[3] = 4
    loss, gradient = learner.gradient(x_nd)
    u_n = dense_pre_activations(learner.weights, x_nd)[:, 3]
    assert 0 < int((u_n > 0).sum()) < 5
    assert not bool(loss.fired_c[3])
    assert float(gradient.encoder(slice(3, 4)).norm()) > 1e-3


@QUICK
@given(cases(), st.data())
def test_the_gradient_of_a_range_of_concepts_is_that_part_of_the_whole(case, data):
    learner = case.learner()
    _, gradient = learner.gradient(case.tokens(), case.n_pairs)
    whole = whole_gradient(learner, gradient)
    start = data.draw(st.integers(0, case.c - 1))
    concepts = slice(start, data.draw(st.integers(start + 1, case.c)))
    torch.testing.assert_close(gradient.encoder(concepts), whole["W_enc_cd"][concepts])
    torch.testing.assert_close(gradient.decoder(concepts), whole["W_dec_cd"][concepts])


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("dead", [0.0, 0.4])
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("shared", [None, "iso-energy", "group-sparse"])
def test_gradients_in_float32_are_exact_to_rounding(name, dead, low_precision, shared):
    case = Case(name, 36, 24, 64, 6, dead, 8, shared, low_precision=low_precision)
    learner, x_nd = case.learner(torch.float32), case.tokens().float()
    _, gradient = learner.gradient(x_nd, case.n_pairs)
    weights = converted(learner.weights, torch.float64, requires_grad=True)
    gate_nc, revived_nc = selected_mask(learner, x_nd), revived_mask(learner, gradient)
    total, _, _ = dense_loss(learner, weights, x_nd.double(), gate_nc, revived_nc, case.n_pairs)
    found, expected = whole_gradient(learner, gradient), dense_gradient(total, weights)
    assert set(found) == set(expected)
    for part, gradient in expected.items():
        assert found[part].dtype == torch.float32
        error = float((found[part] - gradient).norm() / gradient.norm())
        assert error < 2e-6, (part, error)


@EVERY_ARCHITECTURE
def test_selection_in_low_precision_is_nearly_that_in_full(name):
    case = Case(name, 60, 24, 96, 6)
    masks = [selected_mask(case.learner(low_precision=low), case.tokens()) for low in (True, False)]
    assert 0 <= int((masks[0] ^ masks[1]).sum()) < 0.05 * int(masks[1].sum())


def dense_steps(learner, batches, lr, n_pairs=0):
    """The weights after steps of torch's Adam on dense gradients, selected by dense products."""
    weights = converted(learner.weights, torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam(list(vars(weights).values()), lr)
    dead_c = learner.silent_c >= learner.dead_after
    for x_nd in batches:
        u_nc = dense_pre_activations(weights, x_nd).detach()
        revived_nc = largest_dead(u_nc, dead_c, learner.k_aux) if bool(dead_c.any()) else None
        gate_nc = gate(learner.architecture, u_nc)
        optimiser.zero_grad()
        dense_loss(learner, weights, x_nd, gate_nc, revived_nc, n_pairs)[0].backward()
        optimiser.step()
        with torch.no_grad():
            weights.threshold_c.clamp_(min=0)
    return weights


def assert_equal_weights(found, expected, tolerance=1e-9):
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(
            getattr(found, name), tensor.detach(), rtol=tolerance, atol=tolerance
        )


def updated(learner, batches, lr=0.01, n_pairs=0):
    """The learner after steps in which no concept comes to life or dies."""
    for x_nd in batches:
        learner.update(learner.gradient(x_nd, n_pairs)[1], lr)
    return learner


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("dead", [0.0, 0.4])
@pytest.mark.parametrize("shared", [None, "group-sparse"])
def test_updates_equal_torchs_adam_on_dense_gradients(name, dead, shared):
    case = Case(name, dead=dead, shared=shared)
    batches = [random_tokens(case.n, case.d, seed) for seed in range(7)]
    learner = case.learner()
    expected = dense_steps(learner, batches, 0.01, case.n_pairs)
    before = converted(learner.weights, torch.float64)
    updated(learner, batches, n_pairs=case.n_pairs)
    assert_equal_weights(learner.weights, expected)
    for part in ("W_enc_cd", "W_dec_cd", "b_enc_c", "b_dec_d"):
        moved = (getattr(learner.weights, part) - getattr(before, part)).abs().mean()
        assert float(moved) > 0.003, part
    moved_c = learner.weights.threshold_c != before.threshold_c
    assert bool(moved_c.any()) == (name == "jumprelu")


def test_adam_goes_on_without_gradients_as_torchs_does():
    """A concept that is silent after it was active is moved on by its momentum."""
    parameter = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    own = parameter.detach().clone()
    optimiser, adam = torch.optim.Adam([parameter], 0.1), Adam({"it": own})
    for step in range(6):
        parameter.grad = torch.full_like(parameter, 1.5 - step) * (step % 3 == 0)
        optimiser.step()
        adam.begin(0.1)
        adam.update("it", parameter.grad[:2], slice(0, 2))
        adam.update("it", parameter.grad[2:], slice(2, 3))
        torch.testing.assert_close(own, parameter.detach(), rtol=1e-12, atol=1e-12)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("elements", [1, 15, 35])
@pytest.mark.parametrize("low_precision", [False, True])
def test_updates_in_parts_equal_an_update_of_the_whole(name, elements, low_precision, monkeypatch):
    case = Case(name, c=16, d=5, dead=0.4, low_precision=low_precision)
    batches = [random_tokens(case.n, case.d, seed) for seed in range(9)]
    whole = updated(case.learner(), batches)
    monkeypatch.setattr(learner_module, "PASS_ELEMENTS", elements)
    parts = updated(case.learner(), batches)
    assert_equal_weights(parts.weights, whole.weights, 1e-12)
    assert torch.equal(parts.W_low_cd, parts.weights.W_enc_cd.to(parts.W_low_cd.dtype))


@EVERY_ARCHITECTURE
def test_rows_are_unit_after_some_steps_and_keep_their_directions(name, monkeypatch):
    case, every = Case(name), learner_module.NORMALISE_EVERY
    batches = [random_tokens(case.n, case.d, seed) for seed in range(every)]
    monkeypatch.setattr(learner_module, "NORMALISE_EVERY", 10**9)
    free_cd = updated(case.learner(), batches).weights.W_dec_cd
    monkeypatch.undo()
    before = updated(case.learner(), batches[:-1]).weights.W_dec_cd.norm(dim=1)
    assert float((before - 1).abs().min()) > 1e-3
    unit = updated(case.learner(), batches).weights
    torch.testing.assert_close(unit.W_dec_cd.norm(dim=1), torch.ones(case.c).double())
    torch.testing.assert_close(unit.W_dec_cd, free_cd / free_cd.norm(dim=1, keepdim=True))


def test_a_row_of_zeros_stays_finite_and_hurts_no_other():
    learner = Case("topk").learner()
    learner.weights.b_enc_c[3] = -100.0
    learner.weights.W_dec_cd[3] = 0
    updated(learner, [random_tokens(12, 5, seed) for seed in range(8)])
    lengths_c = learner.weights.W_dec_cd.norm(dim=1)
    assert float(lengths_c[3]) in (0.0, 1.0)
    torch.testing.assert_close(lengths_c[4:], torch.ones(12).double())


def test_rows_are_unit_again_and_again():
    learner, every = Case("topk").learner(), learner_module.NORMALISE_EVERY
    for step in range(1, 3 * every + 1):
        updated(learner, [random_tokens(12, 5, step)])
        unit_c = (learner.weights.W_dec_cd.norm(dim=1) - 1).abs() < 1e-12
        assert bool(unit_c.all()) == (step % every == 0), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_copy_for_selection_holds_the_rounded_weights_after_every_update(dtype):
    case = Case("topk", low_precision=True)
    learner = case.learner(dtype)
    assert learner.W_low_cd.dtype == torch.bfloat16
    for seed in range(3):
        before_cd = learner.W_low_cd.clone()
        updated(learner, [random_tokens(12, 5, seed).to(dtype)])
        assert not torch.equal(before_cd, learner.W_low_cd)
        assert torch.equal(learner.W_low_cd, learner.weights.W_enc_cd.bfloat16())


def test_selection_follows_the_weights_without_low_precision():
    learner, x_nd = Case("topk").learner(), Case("topk").tokens()
    updated(learner, [x_nd] * 5, lr=0.2)
    u_nc = dense_pre_activations(learner.weights, x_nd)
    assert torch.equal(selected_mask(learner, x_nd), gate(learner.architecture, u_nc))


def test_thresholds_never_become_negative():
    learner = Case("jumprelu", k=16).learner()
    lowest = []
    for seed in range(20):
        updated(learner, [random_tokens(12, 5, seed)], lr=0.1)
        lowest.append(float(learner.weights.threshold_c.min()))
    assert min(lowest) == 0.0


@EVERY_ARCHITECTURE
def test_a_step_is_a_gradient_and_an_update(name):
    x_nd = Case(name).tokens()
    stepping, expected = Case(name).learner(), Case(name).learner()
    loss, gradient = expected.gradient(x_nd)
    expected.update(gradient, 0.01)
    assert float(stepping.step(x_nd, 0.01).total) == float(loss.total)
    assert_equal_weights(stepping.weights, expected.weights, 0)


def test_the_learning_rate_is_that_of_the_step():
    learner, x_nd = Case("topk").learner(), Case("topk").tokens()
    before = converted(learner.weights, torch.float64)
    learner.step(x_nd, 0.0)
    assert_equal_weights(learner.weights, before, 0)
    learner.step(x_nd, 0.5)
    assert float((learner.weights.b_dec_d - before.b_dec_d).abs().max()) > 0.1


def test_tokens_count_how_long_each_concept_was_silent():
    case = Case("topk", c=16, k=1, n=6)
    learner = case.learner(aux_weight=0.0, dead_after=4 * case.n)
    expected = [0] * case.c
    for seed in range(12):
        x_nd = random_tokens(case.n, case.d, seed)
        u_nc = dense_pre_activations(learner.weights, x_nd)
        fired_c = (gate(learner.architecture, u_nc) & (u_nc > 0)).any(0).tolist()
        learner.step(x_nd, 0.01)
        expected = [0 if fired else s + case.n for fired, s in zip(fired_c, expected, strict=True)]
        assert learner.silent_c.tolist() == expected
    assert max(expected) > 4 * case.n
    assert learner.dead_c.tolist() == [s >= 4 * case.n for s in expected]


def test_revival_alone_does_not_make_a_concept_alive():
    learner, x_nd = Case("topk", n=20, c=12, k=2).learner(k_aux=1), Case("topk", n=20).tokens()
    learner.weights.b_enc_c[3] = -2.5
    learner.silent_c[3] = 4
    before_d = learner.weights.W_enc_cd[3].clone()
    learner.step(x_nd, 0.01)
    assert int(learner.silent_c[3]) == 4 + 20
    assert not torch.equal(learner.weights.W_enc_cd[3], before_d)


def test_every_gradient_goes_through_the_mean_of_processes():
    """Two processes with half a batch each are one with the whole batch."""
    case = Case("jumprelu", n=16)
    one, other, whole = case.learner(), case.learner(), case.learner()
    for learner in (one, other, whole):
        object.__setattr__(learner.architecture, "l0_weight", 0.0)  # not linear in tokens
    for seed in range(4):
        x_nd, others = random_tokens(16, case.d, seed), []
        other.restore(one.state())
        other.reduce = lambda t, kept=others: kept.append(t.clone()) or t
        updated(other, [x_nd[8:]])
        remaining = iter(others)
        one.reduce = lambda t, theirs=remaining: (t + next(theirs)) / 2
        updated(one, [x_nd[:8]])
        assert next(remaining, None) is None
        updated(whole, [x_nd])
    assert_equal_weights(one.weights, whole.weights)


def test_a_concept_is_alive_that_fired_in_any_process():
    learner = Case("topk").learner(reduce=lambda t: t / 3)
    loss = learner.step(Case("topk").tokens(), 0.01)
    assert torch.equal(learner.silent_c == 0, loss.fired_c)
    learner = Case("topk").learner(reduce=lambda t: t + 1 / 3)
    learner.step(Case("topk").tokens(), 0.01)
    assert not bool(learner.silent_c.any())


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("low_precision", [False, True])
def test_a_restored_learner_goes_on_with_the_same_bits(name, low_precision):
    case = Case(name, dead=0.4, low_precision=low_precision)
    batches = [random_tokens(case.n, case.d, seed).float() for seed in range(14)]
    learner = case.learner(torch.float32)
    for x_nd in batches[:5]:
        learner.step(x_nd, 0.01)
    state = {key: tensor.clone() for key, tensor in learner.state().items()}
    other = Case(name, low_precision=low_precision, seed=9).learner(torch.float32)
    other.step(batches[0], 0.01)
    other.restore(state)
    for x_nd in batches[5:]:
        losses = [trained.step(x_nd, 0.01) for trained in (learner, other)]
        assert float(losses[0].total) == float(losses[1].total)
    for key, tensor in learner.state().items():
        assert torch.equal(other.state()[key], tensor), key


def test_random_weights_are_unit_rows_with_the_encoder_equal_to_the_dictionary():
    weights = Weights.random(7, 30, torch.Generator().manual_seed(0))
    assert torch.equal(weights.W_enc_cd, weights.W_dec_cd)
    assert weights.W_enc_cd.data_ptr() != weights.W_dec_cd.data_ptr()
    torch.testing.assert_close(weights.W_dec_cd.norm(dim=1), torch.ones(30))
    assert not any(bool(t.any()) for t in (weights.b_enc_c, weights.b_dec_d, weights.threshold_c))
    again = Weights.random(7, 30, torch.Generator().manual_seed(0))
    assert torch.equal(again.W_dec_cd, weights.W_dec_cd)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("dead", [0.0, 0.4])
def test_no_tensor_is_as_large_as_all_pre_activations(name, dead):
    n, c = 200, 256
    learner = Case(name, n=n, d=4, c=c, k=2, k_aux=2, dead=dead).learner()
    learner.weights.threshold_c[:] = 2.0
    with Largest() as largest:
        learner.step(random_tokens(n, 4), 0.01)
    assert 5 * c <= largest.elements < n * c / 8


@EVERY_ARCHITECTURE
def test_training_explains_sparse_tokens(name):
    """Tokens of two of eight directions, learned from random weights in a few hundred steps."""
    generator = torch.Generator().manual_seed(0)
    rows_cd = torch.nn.functional.normalize(torch.randn(8, 12, generator=generator), dim=1)
    learner = make_learner(name, Weights.random(12, 24, generator), k=2)
    fvu = []
    for _ in range(300):
        concepts_n2 = torch.rand(64, 8, generator=generator).topk(2).indices
        codes_nc = torch.zeros(64, 8).scatter_(1, concepts_n2, 0.7)
        fvu.append(float(learner.step(codes_nc @ rows_cd, 0.01).fvu))
    assert fvu[0] > 0.3
    assert sum(fvu[-20:]) / 20 < 0.1


@pytest.mark.parametrize("strength", [0.1, 0.5, 50.0])
def test_a_perfect_reconstruction_leaves_dead_concepts_able_to_learn(strength):
    """There is nothing left for them to explain, and what is divided by it must stay finite."""
    rows_cd, bias_c = torch.eye(4), torch.zeros(4)
    bias_c[3] = strength
    x_nd = (strength + 1) * rows_cd[:2]
    weights = Weights(rows_cd, bias_c, rows_cd.clone(), torch.zeros(4), torch.zeros(4))
    learner = make_learner("topk", weights, k=1)
    learner.silent_c[3] = 100
    loss = learner.step(x_nd, 0.01)
    assert float(loss.fvu) == 0
    assert bool(loss.total.isfinite())
    for name, tensor in learner.state().items():
        assert bool(tensor.isfinite().all()), name


def first_error(weights, x_nd, k):
    """Squared error of decoding the k largest pre-activations, densely."""
    u_nc = x_nd @ weights.W_enc_cd.T + weights.b_enc_c
    smallest_n1 = u_nc.topk(k, dim=1).values[:, -1:]
    z_nc = torch.where(u_nc >= smallest_n1, u_nc, 0.0).relu()
    return float((z_nc @ weights.W_dec_cd - x_nd).square().sum())


@given(n=st.integers(1, 30), c=st.integers(1, 40), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_encoder_begins_at_the_scale_of_least_squares(n, c, k, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = Weights.random(5, c, generator)
    x_nd = torch.randn(n, 5, generator=generator)
    k = min(k, c)
    before_cd = weights.W_enc_cd.clone()
    error = first_error(weights, x_nd, k)
    weights.scale_encoder(x_nd, k)
    best = first_error(weights, x_nd, k)
    assert best <= error * (1 + 1e-5) + 1e-6
    found_cd = weights.W_enc_cd.clone()
    for factor in (0.9, 1.1):
        weights.W_enc_cd.copy_(found_cd * factor)
        assert first_error(weights, x_nd, k) >= best * (1 - 1e-5)
    torch.testing.assert_close(
        torch.nn.functional.normalize(found_cd, dim=1),
        torch.nn.functional.normalize(before_cd, dim=1),
    )


def test_encoder_keeps_its_scale_where_there_is_nothing_to_fit():
    weights = Weights.random(5, 8, torch.Generator().manual_seed(0))
    before_cd = weights.W_enc_cd.clone()
    weights.scale_encoder(torch.zeros(4, 5), 2)
    assert torch.equal(weights.W_enc_cd, before_cd)
