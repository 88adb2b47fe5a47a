"""The stages of a build that make its SAE: one that is trained, or one that was given."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from conftest import SMALL_SAE, SMALL_SCENES
from patch_retriever.activations.store import StoreSource
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.build import sae_fingerprint
from patch_retriever.cli import main
from patch_retriever.config import BuildConfig
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import Patch
from patch_retriever.progress import no_progress
from patch_retriever.sae.formats import load_sae, save_sae
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.settings import SAESettings
from patch_retriever.sae.train import train_saes
from patch_retriever.sae_training import train_sae
from patch_retriever.stages.sae import adopt_sae, learn_concepts
from synthetic import directions, sparse_tokens, write_store

MEAN, LAST_TOKEN = Readout(ONE_WORD, LAST, "mean"), Readout(ONE_WORD, LAST, "lasttoken")
QUICK = {"expansion": 2, "k": 4, "steps": 40, "batch_size": 128}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder, sparse_tokens(2000), pairs=[[i, i + 100] for i in range(100)])


def make_sae(d=16, c=48, k=None, seed=0):
    rows_cd = directions(c, d, seed)
    return SparseAutoencoder(
        rows_cd.T.contiguous(), torch.zeros(c), rows_cd, torch.zeros(d), torch.full((c,), 0.5), k
    )


def learned(store, readout, folder, **settings):
    config = BuildConfig.read(None, sae=QUICK | settings.pop("sae", {}), **settings)
    learn_concepts(store.folder, readout, config, folder, no_progress)
    return load_sae(folder), json.loads((folder / "cfg.json").read_text())["metadata"]


def test_a_trained_sae_says_how_it_was_trained_and_how_good_it_is(store, tmp_path):
    sae, about = learned(store, MEAN, tmp_path)
    assert (sae.d_in, sae.n_concepts, sae.k) == (16, 32, None)
    assert set(about) == {"settings", "conversion", "metrics", "dead_in_training"}
    assert about["settings"]["steps"] == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_the_builds_seed_is_the_saes_where_it_has_none(store, tmp_path):
    saes = [
        learned(store, MEAN, tmp_path / str(number), **settings)[0].W_dec_cd
        for number, settings in enumerate(
            ({"seed": 3}, {"seed": 9, "sae": {"seed": 3}}, {"seed": 4}, {"sae": {"seed": 0}}, {})
        )
    ]
    assert torch.equal(saes[0], saes[1])
    assert torch.equal(saes[3], saes[4])
    assert not torch.equal(saes[0], saes[2])


def test_tokens_that_the_readout_pools_are_half_of_what_it_sees(store, tmp_path):
    found, _ = learned(store, LAST_TOKEN, tmp_path)
    settings = SAESettings(**QUICK)
    half, as_stored = (
        train_saes(StoreSource(store), [settings], pooled_share=share)[0].sae.W_dec_cd
        for share in (0.5, 0.0)
    )
    assert torch.equal(found.W_dec_cd, half)
    assert not torch.equal(found.W_dec_cd, as_stored)


def test_where_all_tokens_are_pooled_none_is_repeated(tmp_path):
    pooled = write_store(tmp_path, sparse_tokens(2000), pooled_t=torch.ones(2000))
    settings = SAESettings(**QUICK)
    half, as_stored = (
        train_saes(StoreSource(pooled), [settings], pooled_share=share)[0].sae.W_dec_cd
        for share in (0.5, 0.0)
    )
    assert torch.equal(half, as_stored)


@pytest.mark.parametrize("site", [LAST, "layers.1"])
def test_without_arguments_all_ways_to_train_give_the_same_sae(site, store, tmp_path):
    """`build`, `train_sae()` and `train-sae`, whatever the defaults are."""
    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "site": site}))
    learn_concepts(folder, Readout(ONE_WORD, site), BuildConfig(), tmp_path / "build", no_progress)
    train_sae(tmp_path / "function", folder)
    command = ["train-sae", str(folder), "-o", str(tmp_path / "command"), "--json"]
    assert CliRunner().invoke(main, command).exit_code == 0
    built, *others = (load_sae(tmp_path / way) for way in ("build", "function", "command"))
    assert built.input_scale == ("none" if site == LAST else "token")
    for other in others:
        assert other.input_scale == built.input_scale
        for name, tensor in built.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    first, *rest = (
        json.loads((tmp_path / way / "cfg.json").read_text())
        for way in ("build", "function", "command")
    )
    first["metadata"]["settings"].pop("seed")  # the build's own, 0; none for the others
    for config in rest:
        config["metadata"]["settings"].pop("seed")
        assert config == first


def test_pairs_are_used_where_concepts_are_shared(store, tmp_path):
    plain, shared = (
        learned(store, MEAN, tmp_path / kind, sae={"shared": kind, "shared_weight": 0.3})[0]
        for kind in ("none", "iso-energy")
    )
    assert not torch.equal(plain.W_dec_cd, shared.W_dec_cd)


# an SAE that was given


def test_a_given_sae_is_used_as_it_is(store, tmp_path):
    save_sae(make_sae(), tmp_path / "given")
    sae, about = learned(store, MEAN, tmp_path / "sae", sae_from=str(tmp_path / "given"))
    for name, tensor in make_sae().state_dict().items():
        assert torch.allclose(tensor, sae.state_dict()[name], atol=1e-6), name
    assert about["from"] == str(tmp_path / "given")
    assert about["metrics"]["tokens"] > 0


def test_a_given_topk_sae_gets_thresholds(store, tmp_path):
    save_sae(make_sae(k=5), tmp_path / "given")
    sae, about = adopt_sae(str(tmp_path / "given"), store)
    assert sae.k is None
    assert about["conversion"]["l0_gate"] == pytest.approx(5, abs=0.5)
    assert about["conversion"]["l0"] == pytest.approx(about["conversion"]["l0_gate"], rel=0.02)
    assert about["metrics"]["l0"] == pytest.approx(5, rel=0.25)


@pytest.mark.parametrize("k", [None, 5])
def test_a_given_sae_gets_a_dictionary_of_unit_rows(k, store, tmp_path):
    """What it reconstructs stays what it was."""
    save_sae(make_sae(k=k), tmp_path / "unit")
    given = make_sae(k=k)
    lengths_c = torch.linspace(0.5, 4, 48)
    given.W_dec_cd *= lengths_c[:, None]
    given.W_enc_dc /= lengths_c
    given.threshold_c /= lengths_c
    save_sae(given, tmp_path / "given")
    sae, _ = adopt_sae(str(tmp_path / "given"), store)
    assert torch.allclose(sae.W_dec_cd.norm(dim=1), torch.ones(48), atol=1e-5)
    if k is None:
        x_nd = sparse_tokens(200)
        rebuilt_nd = given.decode(given.encode(x_nd))
        assert torch.allclose(sae.decode(sae.encode(x_nd)), rebuilt_nd, atol=1e-4)
        unit, _ = adopt_sae(str(tmp_path / "unit"), store)
        assert torch.allclose(sae.encode(x_nd), unit.encode(x_nd), atol=1e-4)


def test_a_given_sae_of_another_width_is_refused(store, tmp_path):
    save_sae(make_sae(d=8), tmp_path / "given")
    with pytest.raises(UserError, match="activations of 8 dimensions; the backbone's have 16"):
        adopt_sae(str(tmp_path / "given"), store)


def test_another_sae_in_the_same_folder_is_another_input(tmp_path):
    found = set()
    for seed in (0, 1):
        save_sae(make_sae(seed=seed), tmp_path / "given")
        found.add(sae_fingerprint(str(tmp_path / "given")))
        found.add(sae_fingerprint(str(tmp_path / "given")))
    assert len(found) == 2
    assert sae_fingerprint("org/name") == "org/name"


def test_a_build_uses_the_sae_that_was_given(random_model, tmp_path):
    save_sae(make_sae(32, 128, 6), tmp_path / "given")
    settings = {"scenes": SMALL_SCENES, "sae": SMALL_SAE, "folds": 1}
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML, too
    out = tmp_path / "out"
    command = ["build", random_model, "--sae", tmp_path / "given", "--config",
               tmp_path / "settings.yaml", "-o", out, "--json"]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["folder"] == str(out)
    used = load_sae(out / "run/sae")
    assert used.k is None
    assert torch.allclose(used.W_dec_cd, make_sae(32, 128).W_dec_cd, atol=1e-6)
    assert Patch.load(out / "patch").about["method"]
    for name in ("README.md", "modules.json", "report/table.json"):
        assert (out / name).is_file(), name
    written = json.loads((out / "patch-retriever.json").read_text())
    assert written["sae_from"] == str(tmp_path / "given")
