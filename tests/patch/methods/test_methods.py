"""The methods of the table, all of them, on a small synthetic calibration split."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from calibrations import KINDS_N, PER_KIND, D, N, every_patch, make_calibration

from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.methods import methods

CALIBRATION = make_calibration()
WITHOUT_GATE = replace(CALIBRATION, gate=None)
METHODS = {method.name: method for method in methods(CALIBRATION)}
CONTROLS = [name for name in METHODS if "random" in name or "shuffled" in name]


@pytest.fixture(scope="module")
def patches():
    """Every patch of every method, by its name."""
    return {name: every_patch(method) for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def patches_without_gate():
    return {method.name: every_patch(method) for method in methods(WITHOUT_GATE)}


def chosen(made, setting):
    return [patch for s, patch in made if s == setting]


def assert_valid(patch):
    assert patch.site == "last_hidden_state"
    for role in (QUERY, DOCUMENT):
        embedded_ne = patch.embed(CALIBRATION.features, role)
        assert len(embedded_ne) == N
        assert torch.allclose(embedded_ne.norm(dim=1), torch.ones(N), atol=1e-4)
    if patch.subtract is not None:
        strength_m = patch.subtract.strength_m
        assert bool(((strength_m != 0) & (strength_m.abs() <= 1)).all())
        assert bool((strength_m > 0).all()) or "learned with the alignment" in patch.about["reason"]
    json.dumps(patch.about)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_makes_a_valid_patch(name, patches):
    assert patches[name]
    for _, patch in patches[name]:
        assert_valid(patch)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_can_be_chosen_make_one_patch_and_controls_three(name, patches):
    for setting in METHODS[name].grid:
        made = len(chosen(patches[name], setting))
        assert made == (3 if METHODS[name].control else 1) or (name, made) == ("learned gains", 0)


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_different_plain_json(name):
    settings = [json.dumps(setting) for setting in METHODS[name].grid]
    assert len(set(settings)) == len(settings)


def test_names_are_unique():
    assert len(METHODS) == len(list(methods(CALIBRATION)))


def test_exactly_the_random_methods_are_controls():
    assert CONTROLS
    assert [name for name, method in METHODS.items() if method.control] == CONTROLS


def test_the_plain_baselines_stand_in_the_table():
    expected = {
        "nothing": {"base, chosen readout"},
        "unpaired items": {
            "centring, all items",
            "centring, per side",
            "centring, per modality",
            "standardisation (I0T), per side",
            "standardisation (I0T), per modality",
            "all-but-the-top, all items",
            "PCA whitening, all items",
            "ZCA whitening, per side",
            "ZCA whitening, per modality",
            "ReAlign, per side",
            "ReAlign, per modality",
            "LEACE on the modality",
        },
        "pairs": {
            "Procrustes",
            "CCA",
            "ridge regression",
            "learned gains",
            "gains on principal components",
            "random subspace removed",
        },
    }
    for needs, names in expected.items():
        assert names <= {name for name, method in METHODS.items() if method.needs == needs}


def test_the_base_changes_nothing(patches):
    ((_, base),) = patches["base, chosen readout"]
    expected_nd = torch.nn.functional.normalize(CALIBRATION.features.pooled_nd, dim=1)
    assert torch.equal(base.embed(CALIBRATION.features, QUERY), expected_nd)


@pytest.mark.parametrize("ranking", ["attribution", "discriminative", "discriminative_centred"])
def test_removal_takes_the_concepts_that_its_score_puts_first(ranking, patches):
    name = {
        "attribution": "removed by attribution",
        "discriminative": "removed by discriminative attribution, raw",
        "discriminative_centred": "removed by discriminative attribution, centred",
    }[ranking]
    sign = 1 if ranking == "attribution" else -1  # distractors agree more with hard negatives
    score_c = sign * getattr(CALIBRATION.concepts, ranking)
    for setting, patch in patches[name]:
        worst_m = patch.subtract.concepts_m
        rest_c = CALIBRATION.concepts.energy > 0
        assert bool(rest_c[worst_m].all())
        rest_c[worst_m] = False
        assert len(worst_m) == setting["n"]
        assert float(score_c[worst_m].min()) >= float(score_c[rest_c].max())
        assert torch.equal(patch.subtract.strength_m, torch.ones(setting["n"]))


RANDOM_CONCEPTS = {
    **{
        f"random concepts, energy as {kind} ones{then}": f"{kind} concepts removed{then}"
        for kind in ("text-dominant", "unimodal")
        for then in ("", ", then ReAlign")
    },
    **{
        f"random concepts, energy as by {name}": f"removed by {name}"
        for name in (
            "attribution",
            "discriminative attribution, raw",
            "discriminative attribution, centred",
        )
    },
}
"""Controls and what each controls for."""


def chosen_concepts(made, setting):
    return [patch.subtract.concepts_m for patch in chosen(made, setting)]


def test_every_control_of_random_concepts_is_tested_here():
    assert set(RANDOM_CONCEPTS) == {name for name in CONTROLS if "concepts" in name}


@pytest.mark.parametrize(("name", "controlled"), RANDOM_CONCEPTS.items())
def test_random_concepts_are_as_many_and_as_energetic_as_what_they_control_for(
    name, controlled, patches
):
    energy_c = CALIBRATION.concepts.energy
    for setting in METHODS[controlled].grid:
        (real_m,) = chosen_concepts(patches[controlled], setting)
        for random_m in chosen_concepts(patches[name], setting):
            assert len(random_m) == len(real_m), setting
            energy = float(energy_c[random_m].sum())
            assert energy == pytest.approx(float(energy_c[real_m].sum()), rel=0.15), setting


@pytest.mark.parametrize(("name", "controlled"), RANDOM_CONCEPTS.items())
def test_random_concepts_differ_by_draw_and_from_what_they_control_for(name, controlled, patches):
    setting = METHODS[name].grid[0]
    found = [
        *chosen_concepts(patches[name], setting),
        *chosen_concepts(patches[controlled], setting),
    ]
    assert len({frozenset(m.tolist()) for m in found}) == 4


def test_random_subspaces_have_the_rank_they_name(patches):
    for setting, patch in patches["random subspace removed"]:
        weight_dd = patch.maps[0].weight_gde[0]
        assert int(torch.linalg.matrix_rank(weight_dd, atol=1e-4)) == D - setting["r"]


@pytest.mark.parametrize(("name", "controlled"), RANDOM_CONCEPTS.items())
def test_what_comes_after_a_removal_comes_after_its_control_too(name, controlled, patches):
    for setting in METHODS[controlled].grid:
        steps = {
            tuple((step.name, step.by) for step in patch.maps)
            for row in (name, controlled)
            for patch in chosen(patches[row], setting)
        }
        expected = {
            "nothing": (),
            "centre": (("centre", "modality"),),
            "ReAlign": ((f"realign {setting.get('beta')}", "modality"),),
        }
        assert steps == {expected[setting["then"]]}, setting


def test_what_is_centred_has_mean_zero_in_each_kind(patches):
    x_nd = CALIBRATION.features.pooled_nd
    ((_, patch),) = patches["centring, per modality"]
    for kind in range(3):
        rows = kind == KINDS_N
        out_nd = x_nd[rows] @ patch.maps[0].weight_gde[kind] + patch.maps[0].bias_ge[kind]
        assert float(out_nd.mean(0).abs().max()) < 1e-4


def test_statistics_per_side_are_those_of_queries_and_documents(patches):
    ((_, patch),) = patches["centring, per side"]
    for group, items in enumerate((CALIBRATION.query_items, CALIBRATION.document_items)):
        mean_d = CALIBRATION.features.pooled_nd[items].mean(0)
        assert torch.allclose(patch.maps[0].bias_ge[group], -mean_d, atol=1e-5)


def test_pairs_methods_bring_pairs_closer_than_the_base(patches):
    def agreement(patch):
        """How much closer a text is to its own image than to the others."""
        e_nd = patch.embed(CALIBRATION.features, QUERY)
        scores_nn = e_nd[:PER_KIND] @ e_nd[PER_KIND : 2 * PER_KIND].T
        return float(scores_nn.diagonal().mean() - scores_nn.mean())

    base = agreement(patches["base, chosen readout"][0][1])
    for name in (
        "Procrustes",
        "CCA",
        "ridge regression",
        "learned gains",
        "gains on principal components",
    ):
        for setting, patch in patches[name]:
            assert agreement(patch) > base, (name, setting)


def test_making_a_patch_again_makes_the_same(patches):
    again = {method.name: method for method in methods(CALIBRATION)}
    for name in ("learned gains", "random subspace removed", next(iter(RANDOM_CONCEPTS))):
        setting = METHODS[name].grid[0]
        first = [patch for s, patch in patches[name] if s == setting]
        for old, new in zip(first, again[name].make(**setting), strict=True):
            embeddings = [p.embed(CALIBRATION.features, QUERY) for p in (old, new)]
            assert torch.equal(*embeddings)


def test_without_a_gate_every_patch_is_valid_and_no_map_is_by_modality(patches_without_gate):
    for made in patches_without_gate.values():
        for _, patch in made:
            assert patch.gate is None
            assert all(step.by != "modality" for step in patch.maps)
            assert_valid(patch)


def test_without_a_gate_the_rows_per_modality_are_left_out(patches_without_gate):
    missing = set(METHODS) - set(patches_without_gate)
    assert {"centring, per modality", "Procrustes", "CCA", "ridge regression"} <= missing
    assert not [name for name in patches_without_gate if "per modality" in name]
    assert set(patches_without_gate) < set(METHODS)


def test_patches_survive_the_disk(patches, tmp_path):
    for name, made in patches.items():
        _, patch = made[-1]
        patch.save(tmp_path)
        loaded = Patch.load(tmp_path)
        for role in (QUERY, DOCUMENT):
            embeddings = [p.embed(CALIBRATION.features, role) for p in (patch, loaded)]
            assert torch.equal(*embeddings), name
