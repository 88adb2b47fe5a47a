"""What the methods select: which concepts, how strongly, and nothing under another's name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from calibrations import KINDS_N, C, D, every_patch, make_calibration

from patch_retriever.patch.methods import methods

CALIBRATION = make_calibration()
CONCEPTS = CALIBRATION.concepts
METHODS = {method.id: method for method in methods(CALIBRATION)}


def selected(patch):
    """Strength of every concept, (c,)."""
    strength_c = torch.zeros(C)
    strength_c[patch.subtract.concepts_m] = patch.subtract.strength_m
    return strength_c


def test_text_dominant_concepts_are_those_above_the_threshold():
    made = every_patch(METHODS["text-dominant"])
    assert {s["strength"] for s, _ in made} == {0.5, 1.0}
    assert len({s["threshold"] for s, _ in made}) > 1
    for setting, patch in made:
        dominant = [float(m) > setting["threshold"] for m in CONCEPTS.modality]
        assert 0 < sum(dominant) < C
        assert selected(patch).tolist() == [setting["strength"] * d for d in dominant], setting


def test_unimodal_concepts_are_those_outside_of_the_bimodal_mask():
    made = every_patch(METHODS["unimodal"])
    assert 0.05 in {s["eps"] for s, _ in made}
    for setting, patch in made:
        eps = setting["eps"]
        bimodal = [eps <= float(m) <= 1 - eps for m in CONCEPTS.modality]
        assert 0 < sum(bimodal) < C
        assert selected(patch).tolist() == [float(not b) for b in bimodal], setting


@pytest.mark.parametrize(
    ("name", "controlled"),
    [
        ("text-dominant-random", "text-dominant"),
        ("unimodal-random", "unimodal"),
    ],
)
def test_random_concepts_have_the_strengths_of_what_they_control_for(name, controlled):
    for setting in METHODS[controlled].grid:
        (real,) = METHODS[controlled].make(**setting)
        for random in METHODS[name].make(**setting):
            assert sorted(selected(random)) == sorted(selected(real))
            assert not torch.equal(selected(random), selected(real))


def test_the_papers_ablation_takes_the_first_singular_vectors_of_the_top_concepts():
    made = every_patch(METHODS["attribution-subspace"])
    assert any(s["r"] < s["n"] for s, _ in made) and any(s["r"] == s["n"] for s, _ in made)
    x_nd = CALIBRATION.features.pooled_nd.double().numpy()
    for setting, patch in made:
        top = np.argsort(-CONCEPTS.attribution.numpy())[: setting["n"]]
        _, _, vt = np.linalg.svd(CALIBRATION.sae.W_dec_cd[top].double().numpy())
        v = vt[: setting["r"]].T
        expected_nd = torch.from_numpy(x_nd - x_nd @ v @ v.T).float()
        found_nd = CALIBRATION.features.pooled_nd @ patch.maps[0].weight_gde[0]
        assert torch.allclose(found_nd, expected_nd, atol=1e-3), setting


def test_random_subspaces_have_the_ranks_of_the_ablation():
    random = METHODS["attribution-subspace-random"]
    assert random.grid == METHODS["attribution-subspace"].grid
    for setting, patch in every_patch(random):
        removed_dd = torch.eye(D) - patch.maps[0].weight_gde[0]
        assert torch.linalg.matrix_rank(removed_dd, atol=1e-4) == setting["r"]


def test_shuffled_gains_are_the_same_strengths_on_other_concepts():
    for setting in METHODS["learned-gains"].grid:
        for real in METHODS["learned-gains"].make(**setting):
            made = METHODS["learned-gains-shuffled"].make(**setting)
            assert len({tuple(selected(one).tolist()) for one in made}) == 3
            for one in made:
                assert sorted(selected(one)) == sorted(selected(real))
                both = int(((selected(one) > 0) & (selected(real) > 0)).sum())
                assert one.about["match"]["overlap"] == both


def test_gains_on_random_directions_without_a_change_would_change_nothing():
    """The codes of the directions rebuild every vector, so gains of one are the identity."""
    from patch_retriever.patch.methods import gains

    setting = METHODS["learned-gains-untrained"].grid[0]
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(gains, "learn_gains", lambda _, parts, *__: torch.ones(parts.n_gains))
        made = {method.id: method for method in methods(make_calibration())}
        (patch,) = made["learned-gains-untrained"].make(**setting)
    assert torch.allclose(patch.maps[-1].weight_gde[0], torch.eye(D), atol=1e-5)
    (patch,) = METHODS["learned-gains-untrained"].make(**setting)
    assert float((patch.maps[-1].weight_gde[0] - torch.eye(D)).abs().max()) > 0.01


def test_leace_leaves_kinds_alike_on_average():
    x_nd = CALIBRATION.features.pooled_nd
    for setting, patch in every_patch(METHODS["leace"]):
        out_nd = x_nd
        for step in patch.maps:
            assert step.by == "all"
            out_nd = out_nd @ step.weight_gde[0] + step.bias_ge[0]
        mean_d = torch.zeros(D) if setting["then"] == "centre" else x_nd.mean(0)
        for kind in range(3):
            assert torch.allclose(out_nd[kind == KINDS_N].mean(0), mean_d, atol=1e-3)


# selections of nothing


def changed(**scores):
    """The same calibration split with other scores."""
    return replace(CALIBRATION, concepts=replace(CONCEPTS, **scores))


def names_without_patches(c):
    return {method.id for method in methods(c) if not every_patch(method)}


def test_every_method_selects_something_here():
    assert names_without_patches(CALIBRATION) == set()


def test_without_concepts_of_one_modality_their_rows_make_no_patch():
    """No patch at all, instead of the base under another name."""
    missing = names_without_patches(changed(modality=torch.full((C,), 0.5)))
    assert missing == {name for name in METHODS if "text-dominant" in name or "unimodal" in name}
    assert len(missing) == 8


def test_a_threshold_that_no_concept_passes_makes_no_patch_and_others_do():
    c = changed(modality=torch.linspace(0.3, 0.9, C))
    removal = {method.id: method for method in methods(c)}["text-dominant"]
    assert {s["threshold"] for s in removal.grid} == {0.6, 0.8, 0.95}
    assert {s["threshold"] for s, _ in every_patch(removal)} == {0.6, 0.8}


def test_concepts_that_never_fire_are_not_selected():
    energy_c = CONCEPTS.energy.clone()
    energy_c[::2] = 0
    for method in methods(changed(energy=energy_c)):
        if method.id in ("attribution", "discriminative-raw", "discriminative-centred"):
            for setting, patch in every_patch(method):
                assert bool((patch.subtract.concepts_m % 2 == 1).all()), method.id
                assert len(patch.subtract.concepts_m) == min(setting["n"], C // 2)


def test_where_no_concept_fires_no_concept_method_makes_a_patch():
    codes = CALIBRATION.features.codes
    silent = codes.kept(torch.zeros(len(codes.values_e), dtype=torch.bool))
    zero_c = torch.zeros(C)
    c = replace(
        changed(energy=zero_c, modality=torch.full((C,), 0.5)),
        features=replace(CALIBRATION.features, codes=silent),
    )
    missing = names_without_patches(c)
    assert missing == {name for name, method in METHODS.items() if method.concepts}
    assert {"learned-gains", "attribution-subspace"} <= missing
    (pairs,) = (method for method in methods(c) if method.id == "pair")
    assert {s["first"] for s, _ in every_patch(pairs)} == {"ReAlign"}
