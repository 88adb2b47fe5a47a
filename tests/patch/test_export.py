"""Exported modules, run as they are on random tokens, against the patch in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patch_retriever.features import Features
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.export import export_modules
from patch_retriever.patch.fit import fit_gate
from patch_retriever.patch.operators import GROUPS, Affine, Gate, Subtract
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

N, T, D, C = 18, 7, 8, 30
KINDS_N = torch.arange(N) % 3
ROLES = {"query": QUERY, "document": DOCUMENT}
POOLINGS = ("mean", "lasttoken", "mean+lasttoken")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_mask():
    """Items of different lengths, half of them padded on the left."""
    mask_nt = torch.zeros(N, T, dtype=torch.long)
    for n in range(N):
        length = 3 + n % (T - 2)
        mask_nt[n, slice(T - length, T) if n % 2 else slice(length)] = 1
    return mask_nt


MASK_NT = make_mask()


def make_tokens():
    """Tokens of three kinds that a gate tells apart by their mean, though not by the last one;
    garbage where there is padding."""
    tokens_ntd = normal(N, T, D)
    for token_td, mask_t, kind in zip(tokens_ntd, MASK_NT, KINDS_N, strict=True):
        before_the_last = mask_t.nonzero()[:-1, 0]
        token_td[before_the_last] += 9 * torch.eye(3, D)[kind]
        token_td[mask_t == 0] = 50 * normal(int((mask_t == 0).sum()), D, seed=1)
    return tokens_ntd


def pooled(tokens_ntx, pooling):
    """Pooling written out item by item."""
    rows = []
    for token_tx, mask_t in zip(tokens_ntx, MASK_NT.bool(), strict=True):
        parts = {"mean": token_tx[mask_t].mean(0), "lasttoken": token_tx[mask_t][-1]}
        rows.append(torch.cat([parts[part] for part in pooling.split("+")]))
    return torch.stack(rows)


def make_sae(threshold_c, scale=1.0):
    rows_cd = nn.functional.normalize(normal(C, D, seed=3), dim=1)
    return SparseAutoencoder(
        normal(D, C, seed=2), scale * normal(C, seed=4), rows_cd, normal(D, seed=5), threshold_c
    )


THRESHOLD_C = 2 * normal(C, seed=6).abs()
STRENGTH_C = normal(C, seed=7).clamp(0, 1)
SUBTRACT = Subtract.from_sae(make_sae(THRESHOLD_C), STRENGTH_C)
TOKENS_NTD = make_tokens()
GATE = fit_gate(pooled(TOKENS_NTD, "mean"), KINDS_N)


def make_map(by, seed, e=D, d=D):
    g = len(GROUPS[by])
    weight_gde = normal(g, d, e, seed=seed) / d**0.5
    return Affine(f"map {by}", by, weight_gde, normal(g, e, seed=seed + 50))


MAPS = {
    "no map": (),
    "all": (make_map("all", 10),),
    "role": (make_map("role", 11),),
    "modality": (make_map("modality", 12),),
    "all kinds of maps": (make_map("modality", 13), make_map("role", 14), make_map("all", 15)),
    "narrower": (make_map("modality", 16), make_map("all", 17, 5)),
}


def make_features(sae, tokens_ntd, pooling):
    codes_ntc = torch.stack([sae.encode(token_td) for token_td in tokens_ntd])
    codes = Codes.from_dense(pooled(codes_ntc, pooling.partition("+")[0]))
    return Features(pooled(tokens_ntd, pooling), pooled(tokens_ntd, "mean"), codes, KINDS_N)


def run(modules, tokens_ntd, task):
    """The modules in order, as sentence-transformers runs them."""
    features = {"token_embeddings": tokens_ntd.clone(), "attention_mask": MASK_NT.clone()}
    with torch.no_grad():
        for module in modules:
            takes_task = "task" in getattr(module, "forward_kwargs", ())
            features = module(features, task=task) if takes_task else module(features)
    return features["sentence_embedding"]


def widened(maps, pooling):
    """The same maps for the vectors of a readout of two parts: the second is weighed first."""
    if "+" not in pooling or not maps:
        return maps
    return make_map("all", 30, D, 2 * D), *maps


def assert_exported_equals_patch(patch, sae, pooling, tokens_ntd=TOKENS_NTD):
    features = make_features(sae, tokens_ntd, pooling)
    modules = export_modules(patch, D, pooling)
    for task, role in ROLES.items():
        found_ne = run(modules, tokens_ntd, task)
        difference = float((found_ne - patch.embed(features, role)).abs().max())
        assert difference <= 1e-5, (task, difference)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("subtract", [None, SUBTRACT], ids=["no subtraction", "subtraction"])
@pytest.mark.parametrize("maps", MAPS)
def test_exported_modules_equal_the_patch(maps, subtract, pooling):
    patch = Patch("last_hidden_state", subtract, widened(MAPS[maps], pooling), GATE)
    assert_exported_equals_patch(patch, make_sae(THRESHOLD_C), pooling)


def test_the_subtraction_in_these_tests_matters():
    sae = make_sae(THRESHOLD_C)
    features = make_features(sae, TOKENS_NTD, "mean")
    with_it, without = (
        Patch("last_hidden_state", s).embed(features, QUERY) for s in (SUBTRACT, None)
    )
    assert float((with_it - without).abs().max()) > 0.05
    fires_m = sae.encode(TOKENS_NTD[MASK_NT.bool()])[:, SUBTRACT.concepts_m] > 0
    assert 0.2 < float(fires_m.float().mean()) < 0.8


def test_the_gate_in_these_tests_sees_three_kinds_in_means_and_not_in_last_tokens():
    assert torch.equal(GATE.kinds(pooled(TOKENS_NTD, "mean")), KINDS_N)
    assert not torch.equal(GATE.kinds(pooled(TOKENS_NTD, "lasttoken")), KINDS_N)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_roles_differ_and_the_document_is_the_default(pooling):
    maps = widened(MAPS["role"], pooling)
    modules = export_modules(Patch("last_hidden_state", SUBTRACT, maps, GATE), D, pooling)
    query, document, neither = (run(modules, TOKENS_NTD, t) for t in ("query", "document", None))
    assert torch.equal(neither, document)
    assert not torch.allclose(query, document, atol=0.1)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("maps", ["no map", "all kinds of maps"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_thresholds_of_any_size(scale, maps, pooling):
    """Thresholds and activations large or tiny together."""
    gate = Gate(GATE.direction_2d / scale, GATE.offset_2, GATE.margin)
    sae = make_sae(scale * THRESHOLD_C, scale)
    subtract = Subtract.from_sae(sae, STRENGTH_C)
    steps = tuple(
        Affine(m.name, m.by, m.weight_gde, (scale if i == 0 else 1) * m.bias_ge)
        for i, m in enumerate(widened(MAPS[maps], pooling))
    )
    patch = Patch("last_hidden_state", subtract, steps, gate)
    assert_exported_equals_patch(patch, sae, pooling, scale * TOKENS_NTD)


@pytest.mark.parametrize("threshold", [1e-6, 1e-4, 30.0, 300.0])
def test_thresholds_tiny_and_large_beside_the_activations(threshold):
    sae = make_sae(torch.full((C,), threshold))
    sae.W_enc_dc *= 1 + 20 * (threshold > 1)  # so that some activations still pass
    fires_tc = sae.encode(TOKENS_NTD[MASK_NT.bool()]) > 0
    assert bool(fires_tc.any() & ~fires_tc.all())
    patch = Patch("last_hidden_state", Subtract.from_sae(sae, STRENGTH_C), MAPS["all"])
    assert_exported_equals_patch(patch, sae, "mean")


def test_concepts_of_thresholds_far_apart_in_one_patch():
    sae = make_sae(torch.logspace(-6, 1, C))
    patch = Patch("last_hidden_state", Subtract.from_sae(sae, torch.ones(C)), MAPS["role"])
    assert_exported_equals_patch(patch, sae, "mean")


def test_a_gate_that_no_map_asks_for_costs_nothing():
    patch = Patch("last_hidden_state", SUBTRACT, MAPS["all"], GATE)
    names = [type(module).__name__ for module in export_modules(patch, D, "lasttoken")]
    assert names == ["Dense", "Dense", "Pooling", "Dense", "Normalize"]


def test_the_identity_is_pooling_and_normalisation():
    modules = export_modules(Patch("last_hidden_state"), D, "mean")
    assert [type(module).__name__ for module in modules] == ["Pooling", "Normalize"]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("maps", MAPS)
def test_only_stock_modules_are_used(maps, pooling):
    patch = Patch("last_hidden_state", SUBTRACT, widened(MAPS[maps], pooling), GATE)
    for module in export_modules(patch, D, pooling):
        assert type(module).__module__.startswith("sentence_transformers.")
        for part in module.modules():
            assert type(part).__module__.startswith(("sentence_transformers.", "torch.nn."))


def test_the_second_part_of_a_readout_of_two_is_of_raw_tokens():
    modules = export_modules(Patch("last_hidden_state", SUBTRACT), D, "mean+lasttoken")
    found_ne = run(modules, TOKENS_NTD, None)
    patched = torch.stack([SUBTRACT(token_td) for token_td in TOKENS_NTD])
    expected = torch.cat([pooled(patched, "mean"), pooled(TOKENS_NTD, "lasttoken")], dim=1)
    torch.testing.assert_close(found_ne, nn.functional.normalize(expected, dim=1))


def test_exporting_twice_gives_the_same_weights():
    patch = Patch("last_hidden_state", SUBTRACT, MAPS["all kinds of maps"], GATE)
    first, second = (nn.Sequential(*export_modules(patch, D, "mean")) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_codes_hardly_above_and_below_their_threshold():
    tokens_td = TOKENS_NTD[MASK_NT.bool()]
    every = Subtract.from_sae(make_sae(torch.zeros(C)), torch.ones(C))
    largest_c = (tokens_td @ every.W_enc_dm + every.b_enc_m).amax(0)
    assert (largest_c > 0).all()
    for nearer in (1 - 4e-6, 1 + 4e-6):
        sae = make_sae(largest_c * nearer)
        patch = Patch("last_hidden_state", Subtract.from_sae(sae, torch.ones(C)))
        assert_exported_equals_patch(patch, sae, "mean")
