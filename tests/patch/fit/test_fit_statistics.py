"""Shared statistics: equal to decomposing everything again for every setting, and made once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from fit_samples import D, N, make_x, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from largest import Largest
from patch_retriever.patch import fit
from patch_retriever.patch.fit import statistics

KINDS_N = torch.arange(N) % 3
GROUPS = [(kind == KINDS_N).nonzero()[:, 0] for kind in range(3)]
PAIRS = {
    0: torch.stack([GROUPS[0], GROUPS[1]], 1),
    2: torch.stack([GROUPS[2][:12], GROUPS[1][:12]], 1),
}
BETAS = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)


def naive_moments(x_nd, rows):
    """Mean and covariance of mean variance one."""
    x = x_nd[rows].double()
    covariance_dd = torch.cov(x.T)
    return x.mean(0), covariance_dd / covariance_dd.diagonal().mean()


def naive_root(unit_dd, beta):
    """The whole of every setting: shrink, decompose, invert."""
    shrunk_dd = (1 - beta) * unit_dd + beta * torch.eye(len(unit_dd)).double()
    values_d, vectors_dd = torch.linalg.eigh(shrunk_dd)
    return vectors_dd @ torch.diag((values_d + 1e-5) ** -0.5) @ vectors_dd.T


def assert_is(step, g, mean_d, weight_de):
    """Within 1e-6 of the largest entry."""
    for found, expected in (
        (step.weight_gde[g], weight_de),
        (step.bias_ge[g], -mean_d @ weight_de),
    ):
        assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("beta", BETAS)
def test_realign_equals_a_decomposition_for_every_beta(beta):
    x_nd = make_x()
    shared = fit.Statistics(x_nd, GROUPS, "modality")
    for before in BETAS:
        fit.realign(shared, before)
    step = fit.realign(shared, beta)
    for g, rows in enumerate(GROUPS):
        mean_d, unit_dd = naive_moments(x_nd, rows)
        assert_is(step, g, mean_d, naive_root(unit_dd, beta))


@pytest.mark.parametrize("r", [1, 3])
def test_all_but_the_top_equals_a_decomposition_for_every_rank(r):
    x_nd = make_x()
    step = fit.all_but_the_top(fit.Statistics(x_nd, GROUPS, "modality"), r)
    for g, rows in enumerate(GROUPS):
        mean_d, unit_dd = naive_moments(x_nd, rows)
        top_dr = torch.linalg.svd(unit_dd).U[:, :r]
        assert_is(step, g, mean_d, torch.eye(D).double() - top_dr @ top_dr.T)


def naive_cca(x_nd, shrinkage, r):
    """From the pairs' vectors, with nothing shared; signs of the canonical pairs are free."""
    x = x_nd.double()
    sides = [x[PAIRS[0][:, i]] - x[PAIRS[0][:, i]].mean(0) for i in (0, 1)]
    roots = [naive_root(naive_moments(x_nd, PAIRS[0][:, i])[1], shrinkage) for i in (0, 1)]
    u, s_d, vt = torch.linalg.svd(roots[0] @ sides[0].T @ sides[1] @ roots[1])
    gain_r = (s_d[:r] / s_d[0]).sqrt()
    text, image = roots[0] @ u[:, :r] * gain_r, roots[1] @ vt[:r].T * gain_r
    c, target = (x[PAIRS[2][:, i]] - x[PAIRS[2][:, i]].mean(0) for i in (0, 1))
    ridge_dd = c.T @ c + shrinkage * c.square().sum() / D * torch.eye(D).double()
    return text, image, torch.linalg.inv(ridge_dd) @ c.T @ target @ image


@pytest.mark.parametrize("shrinkage", BETAS[1:])
def test_cca_equals_one_from_the_vectors(shrinkage):
    x_nd = make_x()
    shared = fit.PairStatistics(x_nd, KINDS_N, PAIRS)
    for before in BETAS[1:]:
        fit.cca(shared, before, 4)
    step = fit.cca(shared, shrinkage, 4)
    expected = naive_cca(x_nd, shrinkage, 4)
    signs_r = (step.weight_gde[0] * expected[0]).sum(0).sign()
    for g, weight_dr in enumerate(expected):
        assert_is(step, g, x_nd[GROUPS[g]].double().mean(0), weight_dr * signs_r)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 7), st.integers(1, 60), st.data())
def test_moments_are_those_of_all_rows_at_once(n, d, chunk, data):
    """Whatever the chunks, and with rows that occur more than once."""
    x_nd = normal(50, d, seed=n) * 3 + 7
    rows_m = torch.tensor(data.draw(st.lists(st.integers(0, 49), min_size=n, max_size=n)))
    others_m = torch.tensor(data.draw(st.lists(st.integers(0, 49), min_size=n, max_size=n)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "CHUNK_FLOATS", chunk)
        a, b = fit.Moments(x_nd, rows_m), fit.Moments(x_nd, others_m)
        found = a.mean_d, a.covariance_dd, statistics.cross_scatter(a, b)
    x, y = x_nd[rows_m].double(), x_nd[others_m].double()
    expected = (
        x.mean(0),
        torch.cov(x.T).reshape(d, d),
        (x - x.mean(0)).T @ (y - y.mean(0)),
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_no_copy_of_all_vectors_is_made(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_FLOATS", 20 * D)
    x_nd = normal(10_000, D)
    with Largest() as largest:
        fit.realign(fit.Statistics(x_nd, [torch.arange(len(x_nd))], "all"), 0.3)
    assert largest.numel < x_nd.numel() / 2  # the item numbers are the largest


@pytest.fixture
def calls(monkeypatch):
    """How often each decomposition is called."""
    counted = Counter()

    def counting(name):
        original = getattr(torch.linalg, name)

        def counted_call(*args, **kwargs):
            counted[name] += 1
            return original(*args, **kwargs)

        return counted_call

    for name in ("eigh", "svd", "solve"):
        monkeypatch.setattr(torch.linalg, name, counting(name))
    return counted


def test_one_decomposition_of_a_covariance_serves_all_settings(calls):
    shared = fit.Statistics(make_x(), GROUPS, "modality")
    for beta in BETAS:
        fit.realign(shared, beta)
    assert all("covariance_dd" not in vars(moments) for moments in shared.moments)
    for r in (1, 2, 4):
        fit.all_but_the_top(shared, r)
        fit.pca_whiten(shared, r)
    fit.zca_whiten(shared)
    fit.centre(shared)
    fit.standardise(shared)
    assert calls == {"eigh": len(GROUPS)}


def test_all_shrinkages_of_cca_share_the_spectra_of_both_sides(calls):
    shared = fit.PairStatistics(make_x(), KINDS_N, PAIRS)
    for shrinkage in BETAS[1:]:
        fit.cca(shared, shrinkage, 3)
    assert calls == {"eigh": 2, "svd": len(BETAS) - 1, "solve": len(BETAS) - 1}


def test_centring_needs_no_decomposition_and_no_covariance(calls):
    shared = fit.Statistics(make_x(), GROUPS, "modality")
    fit.centre(shared)
    assert not calls
    assert all("covariance_dd" not in vars(moments) for moments in shared.moments)


def test_fits_go_where_a_model_has_float64():
    for device, expected in (("cpu", "cpu"), ("mps", "cpu"), ("cuda:1", "cuda:1")):
        assert fit.fitting_device(torch.device(device)) == expected


def test_products_run_on_the_device_that_is_asked_for(monkeypatch):
    """Every chunk of vectors is sent there; a device of another name stands in for one."""
    sent = []
    to = torch.Tensor.to

    def recorded(tensor, *args, **kwargs):
        sent.extend(map(str, args[:1]))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    x_nd = make_x()
    fit.realign(fit.Statistics(x_nd, GROUPS, "modality", "cpu:0"), 0.3)
    fit.cca(fit.PairStatistics(x_nd, KINDS_N, PAIRS, "cpu:0"), 0.3, 2)
    fit.leace(fit.Moments(x_nd, torch.arange(N), "cpu:0"), KINDS_N)
    assert sent.count("cpu:0") >= 3 * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_what_the_cpu_gives():
    x_nd = make_x()
    steps = [
        fit.realign(fit.Statistics(x_nd, GROUPS, "modality", device), 0.3)
        for device in ("cpu", "cuda")
    ]
    assert torch.allclose(steps[0].weight_gde, steps[1].weight_gde, atol=1e-5)
