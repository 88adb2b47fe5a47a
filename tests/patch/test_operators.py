"""The operators of a patch: each against its definition, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largest import Largest
from patch_retriever.patch.operators import (
    GROUPS,
    Affine,
    Gate,
    Subtract,
    apply_composed,
    apply_maps,
    compose,
)
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

QUICK = settings(deadline=None, database=None, max_examples=25)
SEEDS = st.integers(0, 10_000)


def make_sae(seed=0, d=5, c=11, bias=0.0, input_scale="none"):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    rows_cd = torch.nn.functional.normalize(rand(c, d), dim=1)
    return SparseAutoencoder(
        rand(d, c), rand(c) + bias, rows_cd, rand(d), rand(c).abs(), None, input_scale
    )


def make_strength(seed, c=11):
    """Strengths in [0, 1], about half of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(c, generator=generator) * (torch.rand(c, generator=generator) < 0.5)


def subtracted_by_hand(sae, strength_c, h_d, keep=()):
    """h - sum a z(h) d, concept by concept."""
    out_d, std, x_d = h_d.clone(), 1.0, h_d
    if sae.input_scale == "token":
        std = float((h_d - h_d.mean()).square().sum() / (len(h_d) - 1)) ** 0.5
        x_d = (h_d - h_d.mean()) / (std + 1e-5)
    for c in range(sae.n_concepts):
        u = x_d @ sae.W_enc_dc[:, c] + sae.b_enc_c[c]
        if u > sae.threshold_c[c] and c not in keep:
            out_d -= strength_c[c] * std * u * sae.W_dec_cd[c]
    return out_d


SCALES = st.sampled_from(["none", "token"])


@QUICK
@given(SEEDS, SCALES)
def test_subtract_equals_a_loop_over_tokens_and_concepts(seed, input_scale):
    sae, strength_c = make_sae(seed, input_scale=input_scale), make_strength(seed)
    h_ntd = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    patched_ntd = Subtract.from_sae(sae, strength_c)(h_ntd)
    for n in range(2):
        for t in range(3):
            expected_d = subtracted_by_hand(sae, strength_c, h_ntd[n, t])
            assert torch.allclose(patched_ntd[n, t], expected_d, atol=1e-5)


@QUICK
@given(SEEDS, st.sets(st.integers(0, 10)))
def test_kept_concepts_are_not_subtracted(seed, keep):
    sae, strength_c = make_sae(seed), make_strength(seed)
    subtract = Subtract.from_sae(sae, strength_c)
    h_nd = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    expected = [subtracted_by_hand(sae, strength_c, h_d, keep) for h_d in h_nd]
    assert torch.allclose(subtract.keeping(keep)(h_nd), torch.stack(expected), atol=1e-5)


def test_keeping_every_concept_changes_nothing():
    subtract = Subtract.from_sae(make_sae(), make_strength(0))
    h_nd = torch.randn(6, 5)
    assert torch.equal(subtract.keeping(subtract.concepts_m.tolist())(h_nd), h_nd)


def test_only_rows_with_a_strength_are_held():
    sae, strength_c = make_sae(), torch.zeros(11)
    strength_c[[3, 8]] = torch.tensor([0.25, 1.0])
    subtract = Subtract.from_sae(sae, strength_c)
    assert subtract.concepts_m.tolist() == [3, 8]
    assert subtract.strength_m.tolist() == [0.25, 1.0]
    assert torch.equal(subtract.W_enc_dm, sae.W_enc_dc[:, [3, 8]])
    assert torch.equal(subtract.b_enc_m, sae.b_enc_c[[3, 8]])
    assert torch.equal(subtract.threshold_m, sae.threshold_c[[3, 8]])
    assert torch.equal(subtract.W_dec_md, sae.W_dec_cd[[3, 8]])


def test_subtracting_no_concept_is_the_identity():
    subtract = Subtract.from_sae(make_sae(), torch.zeros(11))
    h_nd = torch.randn(3, 5)
    assert torch.equal(subtract(h_nd), h_nd)
    codes = Codes.from_dense(make_sae().encode(h_nd))
    assert torch.equal(subtract.on_pooled(h_nd, codes), h_nd)


def pooled_weights(pooling, lengths, width):
    """One row of weights per item, tokens first and padding after them."""
    weights_nt = torch.zeros(len(lengths), width)
    for row_t, length in zip(weights_nt, lengths, strict=True):
        if pooling == "mean":
            row_t[:length] = 1 / length
        else:
            row_t[length - 1] = 1
    return weights_nt


@QUICK
@given(SEEDS, st.lists(st.integers(1, 6), min_size=1, max_size=5), SCALES)
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_on_pooled_equals_pooling_the_patched_tokens(pooling, seed, lengths, input_scale):
    sae, strength_c = make_sae(seed, input_scale=input_scale), make_strength(seed + 1)
    subtract = Subtract.from_sae(sae, strength_c)
    generator = torch.Generator().manual_seed(seed)
    h_ntd = 2 * torch.randn(len(lengths), 6, 5, generator=generator)
    weights_nt = pooled_weights(pooling, lengths, 6)
    codes_ntc = torch.stack([sae.encode(h_td) for h_td in h_ntd])
    pooled_nd = torch.einsum("nt,ntd->nd", weights_nt, h_ntd)
    codes = Codes.from_dense(torch.einsum("nt,ntc->nc", weights_nt, codes_ntc))
    expected_nd = torch.einsum("nt,ntd->nd", weights_nt, subtract(h_ntd))
    assert torch.allclose(subtract.on_pooled(pooled_nd, codes), expected_nd, atol=1e-5)


D, KINDS_N = 4, torch.tensor([0, 1, 2, 2, 0, 1])
GATE = Gate(torch.eye(2, D) * 3, torch.tensor([-1.5, -1.5]), 1.0)
MEAN_ND = torch.zeros(len(KINDS_N), D)
MEAN_ND[:, 0] = (KINDS_N >= 1).float()
MEAN_ND[:, 1] = (KINDS_N == 2).float()


def make_map(by, generator, d=D, e=D):
    g = len(GROUPS[by])
    weight_gde = torch.randn(g, d, e, generator=generator) / d**0.5
    return Affine("made", by, weight_gde, torch.randn(g, e, generator=generator))


def one_by_one(maps, x_nd, role, kinds_n):
    """Every map in turn, item by item, each with the statistics of the item's group."""
    rows = []
    for x_d, kind in zip(x_nd, kinds_n.tolist(), strict=True):
        for step in maps:
            group = {"all": 0, "role": role, "modality": kind}[step.by]
            x_d = x_d @ step.weight_gde[group] + step.bias_ge[group]
        rows.append(x_d)
    return torch.stack(rows)


BYS = st.lists(st.sampled_from(["all", "role", "modality"]), max_size=4)


@QUICK
@given(BYS, SEEDS, st.sampled_from([0, 1]))
def test_applied_maps_equal_the_maps_one_by_one(bys, seed, role):
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(make_map(by, generator) for by in bys)
    x_nd = torch.randn(len(KINDS_N), D, generator=generator)
    expected_nd = one_by_one(maps, x_nd, role, KINDS_N)
    assert torch.allclose(apply_maps(maps, GATE, x_nd, MEAN_ND, role), expected_nd, atol=1e-4)


@QUICK
@given(st.lists(st.sampled_from(["all", "role"]), max_size=4), SEEDS, st.sampled_from([0, 1]))
def test_maps_need_no_gate_where_none_is_by_modality(bys, seed, role):
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(make_map(by, generator) for by in bys)
    x_nd = torch.randn(5, D, generator=generator)
    expected_nd = one_by_one(maps, x_nd, role, torch.zeros(5).long())
    assert torch.allclose(apply_maps(maps, None, x_nd, x_nd, role), expected_nd, atol=1e-4)


@QUICK
@given(BYS, SEEDS, st.sampled_from([0, 1]))
def test_composed_weights_are_all_maps_as_one_for_each_kind(bys, seed, role):
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(make_map(by, generator) for by in bys)
    x_nd = torch.randn(5, D, generator=generator)
    weight_kde, bias_ke = compose(maps, D, role)
    for kind in range(3):
        expected_nd = one_by_one(maps, x_nd, role, torch.full((5,), kind))
        assert torch.allclose(x_nd @ weight_kde[kind] + bias_ke[kind], expected_nd, atol=1e-4)


def test_maps_may_change_the_width():
    generator = torch.Generator().manual_seed(0)
    maps = (make_map("modality", generator, D, 3), make_map("role", generator, 3, 2))
    x_nd = torch.randn(len(KINDS_N), D)
    found_ne = apply_maps(maps, GATE, x_nd, MEAN_ND, 1)
    assert found_ne.shape == (len(KINDS_N), 2)
    assert torch.allclose(found_ne, one_by_one(maps, x_nd, 1, KINDS_N), atol=1e-5)


def test_no_maps_change_nothing():
    x_nd = torch.randn(len(KINDS_N), D)
    assert torch.equal(apply_maps((), None, x_nd, MEAN_ND, 0), x_nd)


@pytest.mark.parametrize("role", [0, 1])
def test_every_pair_of_switches_gives_what_the_telescope_gives(role):
    """Both, but no image, too: hyperplanes know nothing of each other."""
    generator = torch.Generator().manual_seed(0)
    maps = (make_map("modality", generator), make_map("role", generator))
    mean_nd = torch.zeros(8, D)
    mean_nd[:, 0], mean_nd[:, 1] = torch.arange(8) % 2, torch.arange(8) // 2 % 2
    x_nd = torch.randn(8, D, generator=generator)
    expected_nd = apply_composed(*compose(maps, D, role), GATE, x_nd, mean_nd)
    assert torch.allclose(apply_maps(maps, GATE, x_nd, mean_nd, role), expected_nd, atol=1e-5)


def test_subtracting_pooled_codes_makes_no_dictionary():
    n, c, d = 50, 100_000, 8
    codes = Codes(torch.arange(n + 1), torch.arange(n) * 7, torch.ones(n), c)
    rows_md = torch.randn(3, d, generator=torch.Generator().manual_seed(0))
    concepts_m = torch.tensor([0, 14, 99_999])
    subtract = Subtract(
        concepts_m, torch.tensor([1.0, 0.5, 1]), rows_md.T, torch.zeros(3), torch.zeros(3), rows_md
    )
    pooled_nd = torch.zeros(n, d)
    with Largest() as largest:
        out_nd = subtract.on_pooled(pooled_nd, codes)
    expected_nd = torch.zeros(n, d)
    expected_nd[0], expected_nd[2] = -rows_md[0], -0.5 * rows_md[1]
    assert torch.allclose(out_nd, expected_nd)
    assert largest.numel <= c  # a number for every concept


def test_the_gate_tells_kinds_by_its_two_hyperplanes():
    assert GATE.kinds(MEAN_ND).tolist() == KINDS_N.tolist()
    assert GATE.switches(MEAN_ND).tolist() == [[k >= 1, k == 2] for k in KINDS_N.tolist()]


@pytest.mark.parametrize(("by", "groups"), [("all", 2), ("role", 1), ("role", 3), ("modality", 2)])
def test_a_map_needs_statistics_for_each_of_its_groups(by, groups):
    with pytest.raises(ValueError, match="made"):
        Affine("made", by, torch.zeros(groups, 2, 2), torch.zeros(groups, 2))
