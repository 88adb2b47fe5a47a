"""The contrastive alignment, beside loops over queries and documents."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.patch import fit
from patch_retriever.patch.fit import ConceptCodes, ContrastiveSettings, GradedTask
from patch_retriever.sae.codes import Codes

PER_KIND, D = 30, 12
KINDS_N = torch.arange(3).repeat_interleave(PER_KIND)
QUICK = ContrastiveSettings(steps=60)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_items():
    """Texts, images and both of the same meanings, each kind turned its own way, with noise."""
    meaning_nd = normal(PER_KIND, D, seed=1)
    turned = [meaning_nd @ torch.linalg.qr(normal(D, D, seed=2 + k))[0] for k in range(3)]
    return torch.cat(turned) + 0.5 * normal(3 * PER_KIND, D, seed=9)


def task(queries, documents):
    """Item i of the one kind asks for item i of the other."""
    first, second = (range(k * PER_KIND, (k + 1) * PER_KIND) for k in (queries, documents))
    return GradedTask.of(first, second, [(i,) for i in range(PER_KIND)])


TASKS = (task(0, 1), task(1, 0), task(2, 1))
X_ND = make_items()
PAIRS = {0: torch.stack([torch.arange(PER_KIND), torch.arange(PER_KIND) + PER_KIND], 1)}
START = fit.cca(fit.PairStatistics(X_ND, KINDS_N, PAIRS), 0.8, 8)


def loss_of(step, one, temperature):
    """InfoNCE with several positives, a query at a time."""
    e_ne = torch.nn.functional.normalize(step.by_kind(X_ND, KINDS_N), dim=1).double()
    losses = []
    for q, item in enumerate(one.queries_q.tolist()):
        relevant = set(one.relevant_e[one.starts_q1[q] : one.starts_q1[q + 1]].tolist())
        good = everything = 0.0
        for place, document in enumerate(one.documents_n.tolist()):
            if document == item and place not in relevant:
                continue
            weight = math.exp(float(e_ne[item] @ e_ne[document]) / temperature)
            everything += weight
            good += weight * (place in relevant)
        losses.append(-math.log(good / everything))
    return sum(losses) / len(losses)


def test_it_lowers_the_loss_of_every_task():
    found, _ = fit.contrastive(X_ND, KINDS_N, START, TASKS, QUICK, seed=0)
    for one in TASKS:
        before, after = (loss_of(step, one, QUICK.temperature) for step in (START, found))
        assert after < 0.8 * before


def test_it_begins_where_the_closed_form_ends():
    still, _ = fit.contrastive(X_ND, KINDS_N, START, TASKS, ContrastiveSettings(steps=0), seed=0)
    assert torch.equal(still.weight_gde, START.weight_gde)
    assert torch.equal(still.bias_ge, START.bias_ge)
    assert still.by == "modality"


def test_the_scale_of_the_vectors_does_not_matter():
    """As far as the closed form it starts from does not depend on it."""
    found, _ = fit.contrastive(X_ND, KINDS_N, START, TASKS, QUICK, seed=0)
    start = fit.cca(fit.PairStatistics(100 * X_ND, KINDS_N, PAIRS), 0.8, 8)
    other, _ = fit.contrastive(100 * X_ND, KINDS_N, start, TASKS, QUICK, seed=0)
    unit = torch.nn.functional.normalize
    e_ne, other_ne = (
        unit(step.by_kind(x_nd, KINDS_N), dim=1)
        for step, x_nd in ((found, X_ND), (other, 100 * X_ND))
    )
    assert float((e_ne @ e_ne.T - other_ne @ other_ne.T).abs().mean()) < 0.1


def test_the_same_seed_gives_the_same_map():
    few = ContrastiveSettings(steps=5, queries=7, documents=9)
    first, second, other = (
        fit.contrastive(X_ND, KINDS_N, START, TASKS, few, seed)[0].weight_gde for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_batch_is_what_a_loop_says(data):
    n = data.draw(st.integers(1, 12))
    documents = data.draw(st.permutations(range(100, 100 + n)))
    q = data.draw(st.integers(1, 8))
    places = st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)
    relevant = [data.draw(places) for _ in range(q)]
    one = GradedTask.of(range(q), documents, relevant)
    limits = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    queries_q, documents_m, relevant_qm = one.batch(*limits, generator)
    assert len(queries_q) == min(q, limits[0])
    assert len(set(documents_m.tolist())) == len(documents_m)
    assert len(documents_m) >= min(n, limits[1])
    for row, query in enumerate(queries_q.tolist()):
        answers = {documents[place] for place in relevant[query]}
        assert answers <= set(documents_m.tolist())
        for column, document in enumerate(documents_m.tolist()):
            assert bool(relevant_qm[row, column]) == (document in answers)


def test_an_item_is_no_negative_of_itself():
    """i->i over one list of items: every query is among its documents."""
    items = list(range(PER_KIND, 2 * PER_KIND))
    near = [((i + 1) % PER_KIND,) for i in range(PER_KIND)]
    one = GradedTask.of(items, items, near)
    few = ContrastiveSettings(steps=40)
    found, _ = fit.contrastive(X_ND, KINDS_N, START, (one,), few, seed=0)
    assert bool(torch.isfinite(found.weight_gde).all())
    assert loss_of(found, one, 0.1) < loss_of(START, one, 0.1)


def test_a_concept_that_misleads_is_subtracted():
    """One concept is added to items at random, another one tells nothing and is never active."""
    fires_n = torch.rand(3 * PER_KIND, generator=torch.Generator().manual_seed(5)) < 0.5
    row_d = torch.nn.functional.normalize(normal(D, seed=6), dim=0)
    x_nd = X_ND + 6 * fires_n[:, None] * row_d
    codes_nc = torch.stack([6.0 * fires_n, torch.zeros(3 * PER_KIND)], 1)
    start = fit.cca(fit.PairStatistics(x_nd, KINDS_N, PAIRS), 0.8, 8)
    concepts = ConceptCodes(Codes.from_dense(codes_nc), torch.stack([row_d, normal(D, seed=7)]))
    longer = ContrastiveSettings(steps=150)
    found, strength_c = fit.contrastive(x_nd, KINDS_N, start, TASKS, longer, 0, concepts)
    assert 0.2 < float(strength_c[0]) <= 1
    assert float(strength_c[1]) == 0
    alone, nothing = fit.contrastive(x_nd, KINDS_N, start, TASKS, longer, 0)
    assert nothing is None
    assert not torch.equal(alone.weight_gde, found.weight_gde)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_parts_are_weighed_by_their_mean_norm(weight):
    x_nd = torch.cat([normal(50, 6), 40 * normal(50, 6, seed=1)], dim=1)
    step = fit.weigh(x_nd, 6, weight)
    out_nd = x_nd @ step.weight_gde[0] + step.bias_ge[0]
    first, second = (part.norm(dim=1).mean() for part in out_nd.split(6, dim=1))
    torch.testing.assert_close(first, torch.tensor(weight))
    torch.testing.assert_close(second, torch.tensor(1.0))
