"""Attention sinks: which tokens are, in any dtype and under any padding; what is reported."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.activations.sinks import (
    FP16_LARGEST,
    SINK_RATIO,
    SinkCounter,
    SinkReport,
    sinks_nt,
)
from patch_retriever.backbones.roles import ROLES

QUICK = settings(deadline=None, database=None, max_examples=40)
D = 16
IMAGE, TEXT, INSTRUCTION, SPECIAL = range(4)


def ordinary(n, t, seed=0):
    """Tokens (n, t, d) whose norms are within a factor of two of each other."""
    generator = torch.Generator().manual_seed(seed)
    tokens_ntd = torch.randn(n, t, D, generator=generator)
    norms_nt1 = 100 * (1 + torch.rand(n, t, 1, generator=generator))
    return tokens_ntd / tokens_ntd.norm(dim=-1, keepdim=True) * norms_nt1


def with_sinks(tokens_ntd, where, size=5000.0, dimension=3):
    """The same with a massive dimension in some places."""
    tokens_ntd = tokens_ntd.clone()
    for n, t in where:
        tokens_ntd[n, t, dimension] = size
    return tokens_ntd


def everything(tokens_ntd):
    return torch.ones(tokens_ntd.shape[:2])


def places(found_nt):
    return {tuple(place) for place in found_nt.nonzero().tolist()}


def by_hand(tokens_ntd, mask_nt):
    """The definition, token by token in float64."""
    found = set()
    for n, (tokens_td, mask_t) in enumerate(zip(tokens_ntd, mask_nt, strict=True)):
        norms = {
            t: float(token_d.double().norm()) for t, token_d in enumerate(tokens_td) if mask_t[t]
        }
        if norms:
            median = statistics.median_low(norms.values())
            found |= {(n, t) for t, norm in norms.items() if norm > SINK_RATIO * median}
    return found


def count(*batches):
    counter = SinkCounter()
    for batch in batches:
        counter.add(*batch)
    return counter.report()


# which tokens are sinks


@QUICK
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    left=st.booleans(),
    sizes=st.lists(st.sampled_from([0.0, 900.0, 3000.0, 30_000.0]), min_size=1, max_size=9),
)
def test_sinks_are_those_of_the_definition_wherever_they_are(seed, lengths, left, sizes):
    """Ragged sequences, padded on either side with anything."""
    t = max(*lengths, 1)
    tokens_ntd = ordinary(len(lengths), t, seed)
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:  # they move: anywhere, and more than one in a sequence
        n, at, d = (int(torch.randint(0, k, (1,), generator=generator)) for k in tokens_ntd.shape)
        tokens_ntd[n, at, d] += size
    position_t = torch.arange(t)
    lengths_n1 = torch.tensor(lengths)[:, None]
    mask_nt = position_t >= t - lengths_n1 if left else position_t < lengths_n1
    assert places(sinks_nt(tokens_ntd, mask_nt)) == by_hand(tokens_ntd, mask_nt)


@QUICK
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 100))
def test_the_scale_of_activations_does_not_matter(exponent, seed):
    tokens_ntd = with_sinks(ordinary(3, 9, seed), [(0, 0), (1, 4), (1, 8)])
    expected = places(sinks_nt(tokens_ntd, everything(tokens_ntd)))
    assert expected == {(0, 0), (1, 4), (1, 8)}
    found_nt = sinks_nt(tokens_ntd * 2.0**exponent, everything(tokens_ntd))
    assert places(found_nt) == expected


@QUICK
@given(extra=st.integers(1, 30), padding=st.sampled_from([0.0, 1e4, float("nan"), float("inf")]))
def test_padding_is_no_sink_and_changes_none(extra, padding):
    tokens_ntd = with_sinks(ordinary(2, 8), [(0, 0), (1, 5)])
    wide_ntd = torch.cat([torch.full((2, extra, D), padding), tokens_ntd], 1)
    mask_nt = torch.arange(8 + extra) >= extra
    found_nt = sinks_nt(wide_ntd, mask_nt.expand(2, -1))
    assert places(found_nt) == {(0, extra), (1, extra + 5)}


def test_sequences_do_not_see_each_other():
    """A long item of small activations beside one of large ones."""
    tokens_ntd = torch.cat([ordinary(1, 10), 1000 * ordinary(1, 10, 1)])
    assert not sinks_nt(tokens_ntd, everything(tokens_ntd)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_finds_the_same(dtype):
    """Squares of these are beyond float16, norms of 30,000 are not."""
    tokens_ntd = with_sinks(ordinary(2, 9), [(0, 0), (1, 3)], size=30_000.0)
    found_nt = sinks_nt(tokens_ntd.to(dtype), everything(tokens_ntd))
    assert places(found_nt) == {(0, 0), (1, 3)}


def test_many_tokens_of_norm_30000_are_no_sinks_and_overflow_nothing():
    tokens_ntd = 200 * ordinary(2, 9)
    tokens_ntd *= 30_000 / tokens_ntd.norm(dim=-1).max()
    counter = SinkCounter()
    roles_nt = torch.full((2, 9), TEXT)
    assert not counter.add(tokens_ntd.half(), everything(tokens_ntd), roles_nt).any()
    assert counter.report().largest_norm == pytest.approx(30_000, rel=1e-3)
    assert counter.report().not_finite == 0


def test_what_is_not_finite_is_a_sink_and_counted():
    tokens_ntd = ordinary(1, 9)
    tokens_ntd[0, 2, 5], tokens_ntd[0, 4, 1] = torch.inf, torch.nan
    roles_nt = torch.full((1, 9), TEXT)
    counter = SinkCounter()
    found_nt = counter.add(tokens_ntd, everything(tokens_ntd), roles_nt)
    assert places(found_nt) == {(0, 2), (0, 4)}
    report = counter.report()
    assert (report.sinks, report.not_finite) == (2, 2)
    finite_td = tokens_ntd[tokens_ntd.isfinite().all(-1)]
    assert report.largest == pytest.approx(float(finite_td.abs().max()))
    assert "2 tokens have activations that are not finite" in report.warning
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report.to_json()


# the report


def made_up():
    """A batch with sinks at the first token, at delimiters and at image tokens, and its roles."""
    tokens_ntd = ordinary(3, 20)
    roles_nt = torch.full((3, 20), TEXT)
    roles_nt[:, 0] = roles_nt[:, 12] = roles_nt[:, -1] = SPECIAL
    roles_nt[:, 3:10] = IMAGE
    where = [(0, 0), (1, 0), (2, 0), (0, 12), (1, 12), (2, 5), (2, 6)]
    tokens_ntd = with_sinks(tokens_ntd, where, 20_000.0, dimension=7)
    tokens_ntd[2, 0, 11] = -8000.0
    return tokens_ntd, everything(tokens_ntd), roles_nt


def test_the_report_says_how_many_where_and_how_large():
    tokens_ntd, mask_nt, roles_nt = made_up()
    report = count((tokens_ntd, mask_nt, roles_nt))
    assert (report.items, report.tokens, report.sinks, report.first) == (3, 60, 7, 3)
    assert report.by_role == {"image": 2, "text": 0, "instruction": 0, "special": 5}
    assert report.share == 7 / 60
    norms_nt = tokens_ntd.norm(dim=-1)
    sink_nt = norms_nt > 5000
    ratios_s = (norms_nt / norms_nt.sort(1).values[:, 9:10])[sink_nt]
    assert report.median_ratio == pytest.approx(float(ratios_s.median()), rel=0.02)
    assert report.largest_ratio == pytest.approx(float(ratios_s.max()), rel=1e-5)
    assert report.median_norm == pytest.approx(float(norms_nt.flatten().median()), rel=0.02)
    assert report.largest_norm == pytest.approx(float(norms_nt.max()), rel=1e-5)
    assert report.largest == 20_000
    energy_d = tokens_ntd[sink_nt].double().square().sum(0)
    shares = {d: float(energy_d[d] / energy_d.sum()) for d in (7, 11)}
    assert [d for d, _ in report.massive] == [7]  # it alone holds more than nine tenths
    assert report.massive[0][1] == pytest.approx(shares[7], abs=1e-4)


def test_massive_dimensions_are_the_fewest_that_hold_nine_tenths():
    tokens_ntd = ordinary(1, 20) / 1000
    tokens_ntd[0, 0, [2, 9, 4]] = torch.tensor([60.0, -50.0, 40.0])
    report = count((tokens_ntd, everything(tokens_ntd), torch.full((1, 20), TEXT)))
    assert [d for d, _ in report.massive] == [2, 9, 4]
    assert sum(share for _, share in report.massive) == pytest.approx(1, abs=1e-3)


def test_no_sinks_are_none_found():
    tokens_ntd = ordinary(2, 9)
    report = count((tokens_ntd, everything(tokens_ntd), torch.full((2, 9), TEXT)))
    assert (report.sinks, report.massive, report.to_text()) == (0, (), "none found")
    assert report.warning is None


def test_nothing_at_all_is_reported_too():
    assert count().to_text() == "none found"
    padded = (ordinary(1, 4), torch.zeros(1, 4), torch.zeros(1, 4))
    assert count(padded) == count()


def test_the_text_names_all_that_matters():
    text = count(made_up()).to_text()
    assert text.startswith("7 of 60 tokens (11.67%, 2.33 an item): 3 first tokens and 4 elsewhere;")
    assert "by role 2 image, 5 special" in text
    assert "dimension 7" in text


@pytest.mark.parametrize("share", [0.2, 0.26, 0.99])
def test_it_warns_before_float16_overflows(share):
    tokens_ntd = with_sinks(ordinary(1, 9), [(0, 0)], share * FP16_LARGEST)
    report = count((tokens_ntd, everything(tokens_ntd), torch.full((1, 9), SPECIAL)))
    assert report.not_finite == 0
    assert (report.warning is not None) == (share >= 0.25)


@pytest.mark.parametrize("batches", [(made_up(),), ()])
def test_a_report_survives_json(batches):
    report = count(*batches)
    assert SinkReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@QUICK
@given(seed=st.integers(0, 100), cuts=st.lists(st.integers(1, 11), max_size=3))
def test_batches_together_are_the_whole(seed, cuts):
    tokens_ntd = with_sinks(ordinary(12, 9, seed), [(0, 0), (4, 3), (11, 8)])
    roles_nt = torch.randint(0, 4, (12, 9), generator=torch.Generator().manual_seed(seed))
    batch = (tokens_ntd, everything(tokens_ntd), roles_nt)
    whole = count(batch)
    edges = [0, *sorted(set(cuts)), 12]
    parts = [tuple(x[a:b] for x in batch) for a, b in pairwise(edges)]
    assert count(*parts) == whole


def test_counting_goes_on_from_a_state_to_the_bit():
    first, second = made_up(), (ordinary(2, 30, 5), torch.ones(2, 30), torch.full((2, 30), IMAGE))
    counter = SinkCounter()
    for batch in (first, second, first):
        counter.add(*batch)
    early = SinkCounter()
    early.add(*first)
    later = SinkCounter.from_state(json.loads(json.dumps(early.state())))
    for batch in (second, first):
        later.add(*batch)
    assert json.dumps(later.state()) == json.dumps(counter.state())
    assert later.report() == counter.report()


def test_a_state_does_not_grow_with_the_tokens():
    counter, sizes = SinkCounter(), []
    for _ in range(6):
        counter.add(*made_up())
        sizes.append(len(counter.state()["norms"]))
    assert sizes[-1] == sizes[0]


def test_roles_are_numbered_as_everywhere():
    assert ROLES == ("image", "text", "instruction", "special")
