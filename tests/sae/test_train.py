"""Training on synthetic sparse activations: what comes out, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patch_retriever.errors import UserError
from patch_retriever.sae.settings import SAESettings
from patch_retriever.sae.train import train_saes
from synthetic import MemorySource, clustered_tokens, directions, mixtures, sparse_tokens

SETTINGS = SAESettings(expansion=4, k=4, steps=240, batch_size=256, precision="fp32", seed=0)
"""The last step brings the dictionary's rows to length one (every eighth does), so that the gate
of training can be repeated on the SAE that is returned."""
ARCHITECTURES = ("topk", "batch-topk", "matryoshka", "jumprelu")
by_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def train(source, **changes):
    options = {name: changes.pop(name) for name in ("pooled_share", "pairs_p2d", "role_names")
               if name in changes}  # fmt: skip
    (trained,) = train_saes(source, [replace(SETTINGS, **changes)], **options)
    return trained


def pre_activations(sae, x_nd):
    return x_nd.double() @ sae.W_enc_dc.double() + sae.b_enc_c.double()


def dense_codes(sae, x_nd):
    u_nc = pre_activations(sae, x_nd)
    return torch.where(u_nc > sae.threshold_c, u_nc, 0.0)


def fvu_of(sae, x_nd, z_nc):
    """Fraction of variance unexplained by dense codes."""
    x_nd = x_nd.double()
    error_nd = x_nd - (z_nc @ sae.W_dec_cd.double() + sae.b_dec_d.double())
    return float((error_nd**2).sum() / ((x_nd - x_nd.mean(0)) ** 2).sum())


def l0_of(z_nc):
    return float((z_nc > 0).sum(1).double().mean())


def same(first, second):
    """Whether two SAEs are equal, bit for bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(scope="module")
def source():
    return MemorySource(sparse_tokens())


@pytest.fixture(scope="module")
def trained(source):
    """One SAE of every architecture."""
    return {name: train(source, architecture=name) for name in ARCHITECTURES}


# what training gives


@by_architecture
def test_training_explains_most_of_the_variance(architecture, source, trained):
    untrained = train(source, architecture=architecture, lr=0.0, steps=1)
    assert trained[architecture].metrics.fvu < 0.25
    assert untrained.metrics.fvu > 4 * trained[architecture].metrics.fvu


@by_architecture
def test_the_same_seed_gives_the_same_weights_and_figures(architecture, source):
    first, second = (train(source, architecture=architecture, steps=30) for _ in range(2))
    assert same(first.sae, second.sae)
    assert first.metrics == second.metrics
    assert first.conversion == second.conversion


def test_another_seed_gives_other_weights(source):
    first, second = (train(source, steps=2, seed=seed).sae for seed in (0, 1))
    assert not torch.allclose(first.W_dec_cd, second.W_dec_cd, atol=0.1)


@by_architecture
def test_concepts_have_unit_directions_and_no_negative_thresholds(architecture, trained):
    sae = trained[architecture].sae
    assert sae.k is None
    assert (sae.d_in, sae.n_concepts) == (16, 64)
    assert torch.allclose(sae.W_dec_cd.norm(dim=1), torch.ones(64), atol=1e-5)
    assert bool((sae.threshold_c >= 0).all())
    assert all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values())


def test_dictionaries_whose_rows_are_not_of_length_one_yet_are_made_so(source):
    sae = train(source, steps=5, lr=0.05).sae
    assert torch.allclose(sae.W_dec_cd.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "batch-topk", "matryoshka"])
def test_concepts_are_active_as_often_as_asked(architecture, trained):
    assert trained[architecture].metrics.l0 == pytest.approx(SETTINGS.k, rel=0.1)


def test_jumprelu_ends_near_its_target(source):
    for k in (4, 6):
        found = train(source, architecture="jumprelu", k=k, steps=600)
        assert found.metrics.l0 == pytest.approx(k, rel=0.2)


def test_raw_activations_of_large_mean_and_scale_reconstruct_as_well(trained):
    tokens_td = sparse_tokens()
    mean_d = 1000 * directions(1, 16, seed=5)[0]
    large = MemorySource(40 * tokens_td + mean_d)
    for architecture in ("topk", "jumprelu"):
        found = train(large, architecture=architecture)
        assert found.metrics.fvu < 1.3 * trained[architecture].metrics.fvu
        x_nd = large.held_out_td[1::2]
        assert fvu_of(found.sae, x_nd, dense_codes(found.sae, x_nd)) < 0.3


def test_dead_concepts_are_revived():
    source, dead, fvu = MemorySource(clustered_tokens()), {}, {}
    for aux_weight in (0.0, 0.25):
        seen = []
        settings = replace(
            SETTINGS,
            expansion=8,
            steps=1500,
            dead_after_tokens=20 * 256,
            k_aux=256,
            aux_weight=aux_weight,
        )
        (trained,) = train_saes(source, [settings], watch=seen.append)
        dead[aux_weight], fvu[aux_weight] = seen[-1].dead[0], trained.metrics.fvu
    assert dead[0.0] > 0.1
    assert dead[0.25] < dead[0.0] / 2
    # a small weight revives fewer, but all that it revives serves the reconstruction
    (light,) = train_saes(source, [replace(settings, k_aux=16, aux_weight=1 / 32)])
    assert light.metrics.fvu < 0.95 * fvu[0.0]


def test_bf16_selection_is_about_as_good_as_float32(source, trained):
    bf16 = train(source, precision="bf16")
    assert bf16.metrics.fvu == pytest.approx(trained["topk"].metrics.fvu, rel=0.25)
    assert not same(bf16.sae, trained["topk"].sae)
    assert bf16.sae.W_dec_cd.dtype == torch.float32


def test_auto_is_one_of_the_two_precisions(source):
    auto, *others = (
        train(source, steps=20, precision=precision).sae for precision in ("auto", "bf16", "fp32")
    )
    assert sum(same(auto, other) for other in others) == 1


def test_a_share_of_pooled_tokens_makes_their_reconstruction_better():
    """Few of the tokens are pooled ones, which have directions of their own."""
    pooled_t = torch.arange(4000) % 39 == 0
    tokens_td = sparse_tokens()
    tokens_td[pooled_t] = mixtures(int(pooled_t.sum()), 20, 3) @ directions(20, 16, seed=9)
    source = MemorySource(tokens_td, pooled_t=pooled_t, roles_t=pooled_t.to(torch.uint8))
    without, shared = (
        train(source, k=3, pooled_share=share, role_names=("others", "pooled"))
        for share in (0.0, 0.7)
    )
    assert shared.metrics.fvu_by_role["pooled"] < 0.8 * without.metrics.fvu_by_role["pooled"]


# what is said of it


@by_architecture
def test_figures_are_those_of_the_sae_on_tokens_that_it_never_saw(architecture, source, trained):
    found = trained[architecture]
    x_nd = source.held_out_td[1::2]
    z_nc = dense_codes(found.sae, x_nd)
    out_nd = (z_nc @ found.sae.W_dec_cd.double()).float() + found.sae.b_dec_d
    metrics = found.metrics
    assert metrics.tokens == len(x_nd) == 200
    assert metrics.fvu == pytest.approx(fvu_of(found.sae, x_nd, z_nc), rel=1e-3)
    assert metrics.l0 == pytest.approx(l0_of(z_nc), rel=1e-3)
    assert metrics.dead == pytest.approx(float((z_nc == 0).all(0).double().mean()))
    dense_c = (z_nc > 0).double().mean(0) > 0.1
    assert metrics.dense == pytest.approx(float(dense_c.double().mean()))
    cosines_n = torch.nn.functional.cosine_similarity(x_nd, out_nd)
    assert metrics.cosine == pytest.approx(float(cosines_n.mean()), rel=1e-3)


def gated_again(architecture, sae, x_nd):
    """The codes of the training gate on the SAE that it became."""
    u_nc = pre_activations(sae, x_nd)
    if architecture == "topk":
        lowest = u_nc.topk(SETTINGS.k, dim=1).values[:, -1:]
    elif architecture == "jumprelu":
        lowest = sae.threshold_c.double() + 1e-12
    else:
        lowest = u_nc.flatten().topk(SETTINGS.k * len(x_nd)).values[-1]
    return torch.where((u_nc >= lowest) & (u_nc > 0), u_nc, 0.0)


@by_architecture
def test_figures_of_the_conversion_are_those_of_gate_and_thresholds(architecture, source, trained):
    sae, conversion = trained[architecture].sae, trained[architecture].conversion
    x_nd = source.held_out_td[0::2]
    by_gate_nc, by_threshold_nc = gated_again(architecture, sae, x_nd), dense_codes(sae, x_nd)
    assert conversion.l0_gate == pytest.approx(l0_of(by_gate_nc), rel=2e-3)
    assert conversion.l0 == pytest.approx(l0_of(by_threshold_nc), rel=2e-3)
    assert conversion.fvu_gate == pytest.approx(fvu_of(sae, x_nd, by_gate_nc), rel=5e-3)
    assert conversion.fvu == pytest.approx(fvu_of(sae, x_nd, by_threshold_nc), rel=5e-3)


def test_each_concept_fires_as_often_as_the_gate_chose_it(source, trained):
    sae, x_nd = trained["topk"].sae, source.held_out_td[0::2]
    chosen_c = (gated_again("topk", sae, x_nd) > 0).sum(0)
    fires_c = (dense_codes(sae, x_nd) > 0).sum(0)
    assert int(chosen_c.max()) > 20
    assert torch.equal(fires_c, chosen_c)


def test_each_concept_fires_about_as_often_on_other_tokens(source, trained):
    sae, x_nd = trained["topk"].sae, source.training_td.float()
    chosen_c = (gated_again("topk", sae, x_nd) > 0).double().mean(0)
    fires_c = (dense_codes(sae, x_nd) > 0).double().mean(0)
    assert float((fires_c - chosen_c).abs().max()) <= 0.04


def test_figures_per_role_are_against_the_roles_mean():
    tokens_td = sparse_tokens()
    roles_t = torch.arange(4000) % 3
    tokens_td[roles_t == 1] += 10
    source = MemorySource(tokens_td, roles_t=roles_t)
    found = train(source, role_names=("plain", "far", "third", "nobody"))
    assert set(found.metrics.fvu_by_role) == {"plain", "far", "third"}
    x_nd, roles_n = source.held_out_td[1::2], source.held_out_roles_t[1::2]
    z_nc = dense_codes(found.sae, x_nd)
    for number, name in enumerate(("plain", "far", "third")):
        rows = roles_n == number
        expected = fvu_of(found.sae, x_nd[rows], z_nc[rows])
        assert found.metrics.fvu_by_role[name] == pytest.approx(expected, rel=1e-3)


def test_who_watches_gets_figures_every_ten_steps_and_at_the_end(source):
    seen, totals = [], []

    def progress(steps, total):
        totals.append(total)
        return steps

    settings = [replace(SETTINGS, k=k, steps=84) for k in (3, 5)]
    trained = train_saes(source, settings, watch=seen.append, progress=progress)
    assert totals == [84]
    assert [now.step for now in seen] == [10, 20, 30, 40, 50, 60, 70, 80, 84]
    for now in seen:
        assert now.tokens_per_second > 0
        assert len(now.fvu) == len(now.dead) == 2
        assert all(0 <= dead <= 1 for dead in now.dead)
        assert now.l0 == pytest.approx([3, 5], rel=0.05)
    for i in (0, 1):
        assert seen[-1].fvu[i] < 0.7 * seen[0].fvu[i]
        assert seen[-1].fvu[i] > 0.8 * trained[i].conversion.fvu_gate


# a scale per token


def sized_tokens(n=6000, d=16, sinks=0):
    """Sparse mixtures whose sizes differ a thousandfold; some are sinks, all alike and huge."""
    x_nd = sparse_tokens(n, d)
    generator = torch.Generator().manual_seed(5)
    x_nd *= 10 ** (3 * torch.rand(n, 1, generator=generator))
    sink_n = torch.rand(n, generator=generator) < sinks
    x_nd[sink_n] = 3e5 * torch.eye(1, d)
    return x_nd, sink_n


def fvu_of_standardised(sae, x_nd):
    """Of every token in units of its own size, so that small ones count like large ones."""
    size_n1 = x_nd.std(1, keepdim=True)
    out_nd = sae.decode(sae.encode(x_nd), x_nd)
    unit_nd = x_nd / size_n1
    left = (unit_nd - out_nd / size_n1).square().sum()
    return float(left / (unit_nd - unit_nd.mean(0)).square().sum())


def test_a_scale_per_token_explains_tokens_of_all_sizes():
    x_nd, _ = sized_tokens()
    source = MemorySource(x_nd)
    by_token, by_site = (train(source, input_scale=scale).sae for scale in ("token", "site"))
    assert (by_token.input_scale, by_site.input_scale) == ("token", "none")
    fvus = [fvu_of_standardised(sae, source.held_out_td) for sae in (by_token, by_site)]
    assert fvus[0] < 0.3
    assert fvus[0] < 0.5 * fvus[1]


def test_with_a_scale_per_token_sinks_cost_ordinary_tokens_nothing():
    plain_nd, _ = sized_tokens()
    x_nd, sink_n = sized_tokens(sinks=0.05)
    ordinary_nd = plain_nd[-400:][~sink_n[-400:]]
    fvus = [
        fvu_of_standardised(train(MemorySource(tokens_nd), input_scale="token").sae, ordinary_nd)
        for tokens_nd in (plain_nd, x_nd)
    ]
    assert fvus[1] < 1.1 * fvus[0]


@by_architecture
def test_folding_keeps_what_was_trained_with_a_scale_per_token(architecture):
    """L0 and FVU by the gate are those of the weights in training, on standardised tokens."""
    found = train(MemorySource(sized_tokens()[0]), architecture=architecture, input_scale="token")
    assert found.sae.input_scale == "token"
    assert found.conversion.l0_gate == pytest.approx(4, rel=0.25)
    assert found.conversion.l0 == pytest.approx(found.conversion.l0_gate, rel=0.2)
    assert found.metrics.fvu < 0.4


def test_saes_of_both_scales_train_in_one_pass(source):
    several = [replace(SETTINGS, steps=40, input_scale=scale) for scale in ("token", "site")]
    together = train_saes(source, several)
    for settings, one in zip(several, together, strict=True):
        assert same(one.sae, train_saes(source, [settings])[0].sae)
    assert not same(*(one.sae for one in together))


def test_deadness_counts_tokens_whatever_the_batch_size():
    """After n tokens without a firing a concept is dead, in however many steps they came."""
    silent = {}
    for batch_size in (32, 128):
        seen = []
        source = MemorySource(clustered_tokens())
        settings = replace(
            SETTINGS, lr=0.0, steps=8192 // batch_size, batch_size=batch_size, expansion=8,
            dead_after_tokens=2560, aux_weight=0.0,
        )  # fmt: skip
        (trained,) = train_saes(source, [settings], watch=seen.append)
        tokens = [now.step * batch_size for now in seen]
        alive = [n for n, now in zip(tokens, seen, strict=True) if now.dead[0] == 0]
        dead = [n for n, now in zip(tokens, seen, strict=True) if now.dead[0] > 0]
        assert max(alive) < 2560 <= min(dead)
        silent[batch_size] = trained.dead_in_training
    assert silent[32] == pytest.approx(silent[128], abs=0.03)
    assert 0.1 < silent[32] < 1


# several at once


def test_saes_of_one_pass_equal_each_trained_alone(source):
    several = [
        replace(SETTINGS, steps=60, dead_after_tokens=2560),
        replace(SETTINGS, steps=60, dead_after_tokens=2560, k=7, expansion=2),
        replace(SETTINGS, steps=60, dead_after_tokens=2560, architecture="jumprelu"),
        replace(
            SETTINGS, steps=60, dead_after_tokens=2560, architecture="matryoshka", precision="bf16"
        ),
    ]
    together = train_saes(source, several)
    for settings, one in zip(several, together, strict=True):
        (alone,) = train_saes(source, [settings])
        assert one.settings == settings.resolved(None, 16, 60)
        assert same(one.sae, alone.sae)
        assert one.about() == alone.about()


def test_saes_of_several_seeds_see_the_same_tokens_from_other_weights(source):
    first, second = train_saes(source, [replace(SETTINGS, steps=2, seed=seed) for seed in (0, 1)])
    (alone,) = train_saes(source, [replace(SETTINGS, steps=2, seed=0)])
    assert same(first.sae, alone.sae)
    assert not torch.allclose(first.sae.W_dec_cd, second.sae.W_dec_cd, atol=0.1)
    assert torch.allclose(first.sae.b_dec_d, second.sae.b_dec_d, atol=0.1)


# shared concepts


def pairs_of_modalities(n, seed, d=32, n_directions=24, alike=0.85):
    """Both sides of a pair mix the same concepts; a concept's directions in the two modalities
    have a cosine of alike^2, and the modalities lie apart."""
    of_all, of_one, of_two, apart = (directions(n_directions, d, s) for s in (100, 101, 102, 103))
    codes_pc = mixtures(n, n_directions, 3, seed)
    sides = []
    for own, side in ((of_one, 0), (of_two, 1)):
        rows = alike * of_all + (1 - alike**2) ** 0.5 * own
        sides.append(codes_pc @ torch.nn.functional.normalize(rows, dim=1) + 2 * apart[side])
    return torch.stack(sides, 1)


def found_by_codes(sae, pairs_p2d):
    """How many sides have their other side's codes as the nearest by cosine."""
    a_pc, b_pc = (
        torch.nn.functional.normalize(sae.encode(pairs_p2d[:, side]), dim=1) for side in (0, 1)
    )
    return float(((a_pc @ b_pc.T).argmax(1) == torch.arange(len(a_pc))).float().mean())


def test_shared_concepts_make_pairs_agree():
    pairs_p2d, new_p2d = pairs_of_modalities(2000, 0), pairs_of_modalities(400, 1)
    source = MemorySource(pairs_p2d.flatten(0, 1))
    found, fvus = {}, {}
    for kind in ("none", "iso-energy", "group-sparse"):
        trained = train(
            source,
            pairs_p2d=pairs_p2d,
            shared=kind,
            shared_weight=0.1,
            pairs_per_step=128,
            expansion=2,
            k=5,
            steps=600,
        )
        found[kind], fvus[kind] = found_by_codes(trained.sae, new_p2d), trained.metrics.fvu
    assert found["iso-energy"] > 1.5 * found["none"]
    assert found["group-sparse"] > 1.25 * found["none"]
    assert max(fvus.values()) < 0.2


def test_pairs_change_nothing_where_nothing_is_shared(source):
    pairs_p2d = pairs_of_modalities(20, 0, d=16)
    settings = {"steps": 20, "shared": "none"}
    assert same(train(source, **settings).sae, train(source, pairs_p2d=pairs_p2d, **settings).sae)


def test_fewer_pairs_than_a_step_takes_are_enough(source):
    pairs_p2d = pairs_of_modalities(5, 0, d=16)
    settings = {"steps": 20, "pairs_per_step": 64, "pairs_p2d": pairs_p2d}
    plain, shared = (train(source, shared=kind, **settings) for kind in ("none", "iso-energy"))
    assert not same(plain.sae, shared.sae)
    assert shared.metrics.fvu < 1.2 * plain.metrics.fvu


# wrong settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "topp"}, "topp"),
        ({"options": {"prefixes": [0.5, 1]}}, "prefixes"),
        ({"architecture": "matryoshka", "options": {"prefixes": [0.5]}}, "prefixes"),
        ({"architecture": "matryoshka", "options": {"prefixes": []}}, "prefixes"),
        ({"architecture": "jumprelu", "options": {"bandwidth": 0}}, "bandwidth"),
        ({"architecture": "jumprelu", "options": {"bandwidth": "wide"}}, "bandwidth"),
        ({"architecture": "jumprelu", "options": {"l0_weight": None}}, "l0_weight"),
        ({"k": 65}, "65"),
    ],
)
def test_a_wrong_setting_is_named(settings, named, source):
    with pytest.raises(UserError, match=named):
        train(source, steps=2, **settings)


@by_architecture
def test_all_concepts_at_once_are_allowed(architecture, source):
    assert train(source, architecture=architecture, k=64, steps=10).metrics.l0 > 10
