"""The removal and pairs curves on the small build, against patches made one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.analysis.finished import open_build
from patch_retriever.analysis.pairs import (
    METHODS,
    Style,
    drawn,
    draws_of,
    numbers,
    pairs_of,
)
from patch_retriever.analysis.removal import curve_of, first_of, random_like, selections, without
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.retrieval.collection import Task
from patch_retriever.retrieval.evaluate import evaluate

steady = settings(deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def build(finished_build):
    return open_build(finished_build)


@pytest.fixture(scope="module")
def c(build):
    return build.calibration


def subtracting(c, concepts):
    strength_c = torch.zeros(c.sae.n_concepts)
    strength_c[concepts] = 1.0
    return Subtract.from_sae(c.sae, strength_c)


# removal


def test_removal_is_the_patch_that_subtracts_the_concepts(c):
    ranking_m = torch.randperm(c.sae.n_concepts, generator=torch.Generator().manual_seed(1))
    steps = [1, 5, 30, c.sae.n_concepts]
    found = list(without(c.features, c.sae, [ranking_m[:n] for n in steps]))
    for n, features in zip(steps, found, strict=True):
        expected_nd = subtracting(c, ranking_m[:n]).on_pooled(
            c.features.pooled_nd, c.features.codes
        )
        assert torch.allclose(features.pooled_nd, expected_nd, atol=1e-4)
        assert torch.equal(features.mean_nd, c.features.mean_nd)  # what the gate sees


def test_a_curve_is_that_of_exportable_patches(build, c):
    ranking_m = selections(c)["attribution"][:6]
    curve = curve_of(build, first_of(ranking_m), "validation")
    assert curve.steps == [1, 2, 4, 6]
    collection = build.data.splits["validation"]
    for at, n in enumerate(curve.steps):
        subtract = subtracting(c, ranking_m[:n])
        by = c.sides[-1]
        centre = fit.centre(c.vectors(subtract).statistics(by))
        for then, maps in (("nothing", ()), ("centring", (centre,))):
            patch = Patch(c.site, subtract, maps, c.gate)
            expected = evaluate([patch], build.validation, collection)
            assert curve.outcomes[then][at].score == pytest.approx(expected.score, abs=0.01)


def test_selections_put_first_what_they_are_named_after(c):
    scores, found = c.concepts, selections(c)
    every = set(range(c.sae.n_concepts))
    for name, score_c, sign in (
        ("attribution", scores.attribution, 1),
        ("discriminative attribution, raw", scores.discriminative, -1),
        ("discriminative attribution, centred", scores.discriminative_centred, -1),
    ):
        ranked = (sign * score_c[found[name]]).tolist()
        assert ranked == sorted(ranked, reverse=True)
        assert set(found[name].tolist()) == every
    for name, holds in (
        ("text-dominant", lambda m: m > 0.8),
        ("unimodal", lambda m: m < 0.05 or m > 0.95),
    ):
        energies = scores.energy[found[name]].tolist()
        assert energies == sorted(energies, reverse=True)
        assert set(found[name].tolist()) == {
            i for i in every if float(scores.energy[i]) > 0 and holds(float(scores.modality[i]))
        }


def test_random_concepts_are_other_ones_of_about_the_same_energy(c):
    removals = first_of(selections(c)["attribution"][:16])
    draws = random_like(c, removals)
    energy = c.concepts.energy
    assert len({tuple(draw[-1].tolist()) for draw in draws}) == len(draws) == 3
    for draw in draws:
        for random_m, removed_m in zip(draw, removals, strict=True):
            assert len(random_m) == len(removed_m)
            assert not set(random_m.tolist()) & set(removed_m.tolist())
        total = float(energy[removals[-1]].sum())
        assert float(energy[draw[-1]].sum()) == pytest.approx(total, rel=0.1)


# pairs


@steady
@given(st.integers(1, 5000))
def test_numbers_of_pairs_double_from_25_and_end_at_all(total):
    found = numbers(total)
    assert found[-1] == total
    assert found[:-1] == [n for n in (25 * 2**i for i in range(20)) if n < 0.8 * total]
    assert draws_of(total, total) == 1


def test_pairs_are_all_of_a_query_and_a_document_that_fits_it():
    task = Task("t->i", "t->i", (3, 4), (7, 8, 9), ((0, 2), (1,)))
    assert pairs_of(task).tolist() == [[3, 7], [3, 9], [4, 8]]


def test_fewer_pairs_are_among_more():
    pairs_n2 = torch.arange(80).reshape(40, 2)
    few, more = (drawn(pairs_n2, n, 7).tolist() for n in (10, 30))
    assert few == more[:10]
    assert len({tuple(pair) for pair in more}) == 30
    assert drawn(pairs_n2, 10, 8).tolist() != few


def test_pairs_are_of_the_named_task_only(build):
    task = build.data.splits["calibration"].tasks[0]
    pairs_n2 = pairs_of(task)
    assert len(pairs_n2) == len(task.queries)
    items = build.data.splits["calibration"].items
    for query, document in pairs_n2.tolist()[:10]:
        assert (items[query].kind, items[document].kind) == ("text", "image")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_depends_on_its_pairs_alone_among_pairs(name, build, c):
    """Other pairs of calibration must not leak in: the curve would be flat."""
    task = build.data.splits["calibration"].tasks[0]
    style, pairs_n2 = Style.of(c, task), pairs_of(task)
    first, second, again = (
        next(METHODS[name](style, pairs)) for pairs in (pairs_n2[:12], pairs_n2[12:], pairs_n2[:12])
    )
    embeddings = [patch.embed(build.test, 0) for patch in (first, again, second)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.allclose(embeddings[0], embeddings[2], atol=1e-3)
    assert torch.allclose(embeddings[0].norm(dim=1), torch.ones(len(embeddings[0])), atol=1e-4)


def test_a_style_knows_its_own_texts_and_all_images(build, c):
    collection = build.data.splits["calibration"]
    task = collection.tasks[0]
    style = Style.of(c, task)
    for item, kind in enumerate(style.kinds_n.tolist()):
        true = {"text": 0, "image": 1, "both": 2}[collection.items[item].kind]
        assert kind == (-1 if true == 0 and item not in task.queries else true)
    assert torch.allclose(
        style.centred_nd[list(task.queries)].mean(0),
        torch.zeros(style.centred_nd.shape[1]),
        atol=1e-4,
    )
    others = [i for i, kind in enumerate(style.kinds_n.tolist()) if kind == -1]
    assert torch.equal(style.centred_nd[others], c.features.pooled_nd[others])
