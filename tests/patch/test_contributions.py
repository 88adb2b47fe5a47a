"""The parts of a similarity: against vectors made one by one, and against their sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.contributions import PooledItem, contributions, strengths
from patch_retriever.patch.operators import GROUPS, Affine, Gate, Subtract, apply_maps
from patch_retriever.sae.model import SparseAutoencoder

QUICK = settings(deadline=None, database=None, max_examples=60)
D, C = 6, 10
EVERY = torch.arange(C)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(seed=0):
    rows_cd = torch.nn.functional.normalize(normal(C, D, seed=seed), dim=1)
    return SparseAutoencoder(
        normal(D, C, seed=seed + 1),
        normal(C, seed=seed + 2),
        rows_cd,
        normal(D, seed=seed + 3),
        normal(C, seed=seed + 4).abs(),
    )


def make_map(by, seed):
    g = len(GROUPS[by])
    return Affine(by, by, normal(g, D, D, seed=seed), normal(g, D, seed=seed + 1))


def make_gate(seed):
    """The second switch is on only where the first is, as between kinds of items."""
    direction_d = normal(D, seed=seed)
    return Gate(torch.stack([direction_d, direction_d]), torch.tensor([0.5, -0.5]), 1.0)


def make_item(seed):
    codes_c = normal(C, seed=seed).clamp(min=0)
    return PooledItem(normal(D, seed=seed + 1), normal(D, seed=seed + 2), codes_c)


def make_patch(sae, by, subtracts, seed=0):
    strength_c = torch.rand(C, generator=torch.Generator().manual_seed(seed)) - 0.4
    strength_c[0] = 1  # one concept is removed altogether
    subtract = Subtract.from_sae(sae, strength_c.clamp(min=0)) if subtracts else None
    maps = tuple(make_map(group, seed + 10 * i) for i, group in enumerate(by))
    return Patch("last_hidden_state", subtract, maps, make_gate(seed + 5))


def embedding(patch, sae, item, role):
    """The unit embedding, by the operators themselves."""
    x_d = item.pooled_d
    if patch.subtract is not None:
        removed = patch.subtract.concepts_m
        codes_m = item.codes_c[removed] * patch.subtract.strength_m
        x_d = x_d - codes_m @ sae.W_dec_cd[removed]
    out_ne = apply_maps(patch.maps, patch.gate, x_d[None], item.mean_d[None], role)
    return torch.nn.functional.normalize(out_ne, dim=1)[0]


def vectors(patch, sae, item, role):
    """Every part's own vector, made one at a time in float64: concepts, geometry, residual."""
    kind = int(patch.gate.kinds(item.mean_d[None]))
    strength_c = dict.fromkeys(range(C), 0.0)
    if patch.subtract is not None:
        strength_c |= dict(
            zip(patch.subtract.concepts_m.tolist(), patch.subtract.strength_m.tolist(), strict=True)
        )

    def mapped(x_d, shifted):
        for step in patch.maps:
            g = step.group(role, kind)
            x_d = x_d @ step.weight_gde[g].double() + shifted * step.bias_ge[g].double()
        return x_d

    rows_cd, codes_c = sae.W_dec_cd.double(), item.codes_c.double()
    residual_d = item.pooled_d.double() - sae.b_dec_d.double()
    for i in range(C):
        residual_d = residual_d - codes_c[i] * rows_cd[i]
    parts = [mapped((1 - strength_c[i]) * codes_c[i] * rows_cd[i], False) for i in range(C)]
    parts.append(mapped(sae.b_dec_d.double(), True))
    parts.append(mapped(residual_d, False))
    length = sum(parts).norm()
    return [part_e / length for part_e in parts]


by_patch = pytest.mark.parametrize(
    ("by", "subtracts"),
    [
        ((), False),
        ((), True),
        (("all",), False),
        (("role",), True),
        (("modality",), False),
        (("modality", "role", "all"), True),
    ],
)


@by_patch
@QUICK
@given(seed=st.integers(0, 10_000))
def test_every_part_is_what_its_own_vector_adds(by, subtracts, seed):
    sae = make_sae(seed)
    patch = make_patch(sae, by, subtracts, seed)
    query, document = make_item(seed + 100), make_item(seed + 200)
    found = contributions(patch, sae, query, document, EVERY)
    of_query, of_document = (
        vectors(patch, sae, item, role) for item, role in ((query, QUERY), (document, DOCUMENT))
    )
    e_query, e_document = sum(of_query), sum(of_document)
    expected = [
        float(a_e @ e_document + b_e @ e_query) / 2
        for a_e, b_e in zip(of_query, of_document, strict=True)
    ]
    parts = [*found.concepts_m.tolist(), found.geometry, found.residual]
    scale = 1 + max(map(abs, expected))
    assert parts == pytest.approx(expected, abs=1e-5 * scale)


@by_patch
@QUICK
@given(seed=st.integers(0, 10_000))
def test_the_parts_sum_to_the_similarity_of_the_embeddings(by, subtracts, seed):
    sae = make_sae(seed)
    patch = make_patch(sae, by, subtracts, seed)
    query, document = make_item(seed + 100), make_item(seed + 200)
    found = contributions(patch, sae, query, document, EVERY)
    assert float(found.concepts_m.sum()) + found.geometry + found.residual == pytest.approx(
        found.score, abs=1e-9 * (1 + float(found.concepts_m.abs().sum()))
    )
    e_query, e_document = (
        embedding(patch, sae, item, role) for item, role in ((query, QUERY), (document, DOCUMENT))
    )
    assert found.score == pytest.approx(float(e_query @ e_document), abs=1e-5)


def test_a_gate_in_a_state_of_no_kind_is_followed_too():
    sae = make_sae()
    item = make_item(1)
    direction_d = item.mean_d / item.mean_d.norm()
    gate = Gate(torch.stack([-direction_d, direction_d]), torch.zeros(2), 1.0)
    assert gate.switches(item.mean_d[None]).tolist() == [[0.0, 1.0]]
    patch = replace(make_patch(sae, ("modality",), True), gate=gate)
    found = contributions(patch, sae, item, make_item(2), EVERY)
    expected = embedding(patch, sae, item, QUERY) @ embedding(patch, sae, make_item(2), DOCUMENT)
    assert found.score == pytest.approx(float(expected), abs=1e-5)


def test_concepts_that_fire_nowhere_need_not_be_asked_about():
    sae, query, document = make_sae(), make_item(1), make_item(2)
    patch = make_patch(sae, ("role", "all"), True)
    active_m = ((query.codes_c > 0) | (document.codes_c > 0)).nonzero()[:, 0]
    assert len(active_m) < C
    some = contributions(patch, sae, query, document, active_m)
    every = contributions(patch, sae, query, document, EVERY)
    silent_c = torch.ones(C, dtype=torch.bool)
    silent_c[active_m] = False
    assert torch.equal(every.concepts_m[silent_c], torch.zeros(C - len(active_m)).double())
    assert torch.allclose(some.concepts_m, every.concepts_m[active_m], atol=1e-12)
    for name in ("score", "geometry", "residual"):
        assert getattr(some, name) == pytest.approx(getattr(every, name), abs=1e-12)


def test_a_concept_that_is_removed_adds_nothing():
    sae = make_sae()
    patch = make_patch(sae, ("all",), True)
    items = [replace(make_item(i), codes_c=torch.ones(C)) for i in (1, 2)]
    assert strengths(patch, C)[0] == 1
    assert contributions(patch, sae, *items, EVERY).concepts_m[0] == 0
    assert contributions(Patch(patch.site), sae, *items, EVERY).concepts_m[0] != 0


def test_what_the_sae_rebuilds_exactly_leaves_no_residual():
    sae = make_sae()
    items = []
    for seed in (1, 2):
        item = make_item(seed)
        items.append(replace(item, pooled_d=sae.decode(item.codes_c[None])[0]))
    found = contributions(make_patch(sae, ("role",), True), sae, *items, EVERY)
    assert found.residual == pytest.approx(0, abs=1e-6)


def test_with_a_scale_per_token_the_base_is_that_of_the_pooled_reconstruction():
    """The mean of tokens' reconstructions, token by token, is concepts and geometry; what they miss
    is the residual."""
    sae = make_sae()
    sae.input_scale = "token"
    items, rebuilt, missed = [], [], []
    for seed in (1, 2):
        x_td = 3 * normal(5, D, seed=seed) + 0.5
        out_td = sae.decode(sae.encode(x_td), x_td)
        item = make_item(seed)
        pooled = {"pooled_d": x_td.mean(0), "codes_c": sae.encode(x_td).mean(0)}
        items.append(replace(item, **pooled, scale=sae.scale(x_td).mean()))
        rebuilt.append(out_td.mean(0).double())
        missed.append((x_td - out_td).mean(0).double())
    found = contributions(Patch("last_hidden_state"), sae, *items, EVERY)
    unit = [torch.nn.functional.normalize(item.pooled_d.double(), dim=0) for item in items]
    lengths = [item.pooled_d.double().norm() for item in items]
    parts = [
        sum(float(of[i] @ unit[1 - i] / lengths[i]) for i in (0, 1)) / 2 for of in (rebuilt, missed)
    ]
    assert float(found.concepts_m.sum()) + found.geometry == pytest.approx(parts[0], abs=1e-5)
    assert found.residual == pytest.approx(parts[1], abs=1e-5)
    assert found.score == pytest.approx(float(unit[0] @ unit[1]), abs=1e-6)


def test_without_maps_the_geometry_is_the_bias_of_the_sae():
    sae = make_sae()
    sae.b_dec_d.zero_()
    patch = make_patch(sae, (), True)
    assert contributions(patch, sae, make_item(1), make_item(2), EVERY).geometry == 0


def test_the_sides_count_alike():
    sae, query, document = make_sae(), make_item(1), make_item(2)
    patch = make_patch(sae, ("modality", "all"), True)
    found, turned = (
        contributions(patch, sae, *items, EVERY) for items in ((query, document), (document, query))
    )
    assert torch.allclose(found.concepts_m, turned.concepts_m, atol=1e-12)
    assert found.score == pytest.approx(turned.score, abs=1e-12)


def test_strengths_are_zero_where_the_patch_leaves_a_concept_alone():
    sae = make_sae()
    assert torch.equal(strengths(Patch("pooled"), C), torch.zeros(C))
    strength_c = torch.linspace(0, 1, C)
    patch = Patch("pooled", Subtract.from_sae(sae, strength_c))
    assert torch.equal(strengths(patch, C), strength_c)
