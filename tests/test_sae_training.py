"""Training SAEs by themselves: what lies in the folder afterwards, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from patch_retriever.activations.store import Store
from patch_retriever.errors import UserError
from patch_retriever.sae.formats import load_sae
from patch_retriever.sae.metrics import stability
from patch_retriever.sae.settings import SAESettings
from patch_retriever.sae_training import CHECKPOINTS, folder_names, stabilities, train_sae
from synthetic import sparse_tokens, write_store

SETTINGS = SAESettings(expansion=2, k=4, steps=20, batch_size=128, seed=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    tokens_td = sparse_tokens(2000)
    roles_t = torch.arange(2000) // 3 % 4
    return write_store(folder, tokens_td, roles_t, pairs=[[i, i + 100] for i in range(100)]).folder


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_what_is_returned(store, tmp_path):
    (trained,) = train_sae(tmp_path / "sae", store, [SETTINGS], checkpoint_every=5)
    assert files_in(tmp_path / "sae") == ["cfg.json", "sae_weights.safetensors"]
    assert not (tmp_path / "sae" / CHECKPOINTS).exists()
    loaded = load_sae(tmp_path / "sae")
    for name, tensor in trained.sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    metadata = json.loads((tmp_path / "sae/cfg.json").read_text())["metadata"]
    assert metadata == json.loads(json.dumps(trained.about()))
    assert set(metadata["metrics"]["fvu_by_role"]) == {"image", "text", "instruction", "special"}
    assert metadata["settings"]["k"] == 4


def test_several_lie_in_folders_of_their_names(store, tmp_path):
    settings = [replace(SETTINGS, k=k, seed=seed) for k in (2, 4) for seed in (0, 1)]
    trained = train_sae(tmp_path, store, settings)
    names = ["topk-k2-x2-seed0", "topk-k2-x2-seed1", "topk-k4-x2-seed0", "topk-k4-x2-seed1"]
    assert folder_names(settings) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, one in zip(names, trained, strict=True):
        assert torch.equal(load_sae(tmp_path / name).W_dec_cd, one.sae.W_dec_cd)


def test_two_of_the_same_name_are_refused_before_anything_is_done(tmp_path):
    with pytest.raises(UserError, match="topk-k4-x2-seed0 twice"):
        train_sae(tmp_path / "out", tmp_path / "no store", [SETTINGS, replace(SETTINGS, lr=0.1)])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_sae_is_not_written_over(store, tmp_path):
    train_sae(tmp_path / "several/topk-k4-x2-seed1", store, [SETTINGS])
    before = files_in(tmp_path)
    for out, settings in (
        ("several/topk-k4-x2-seed1", [SETTINGS]),
        ("several", [SETTINGS, replace(SETTINGS, seed=1)]),
    ):
        with pytest.raises(UserError, match="topk-k4-x2-seed1: holds a trained SAE already"):
            train_sae(tmp_path / out, store, settings)
    assert files_in(tmp_path) == before


def test_a_file_instead_of_a_folder_is_refused_before_training(store, tmp_path):
    (tmp_path / "file").write_text("words")
    with pytest.raises(UserError, match=f"^{tmp_path / 'file'}: "):
        train_sae(tmp_path / "file", store, [SETTINGS], watch=lambda _: pytest.fail("it trains"))
    assert (tmp_path / "file").read_text() == "words"


def test_what_else_lies_in_the_folder_stays_there(store, tmp_path):
    """Somebody's `checkpoint` folder, too."""
    for name in ("notes.txt", f"{CHECKPOINTS}/model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    train_sae(tmp_path, store, [SETTINGS], checkpoint_every=5)
    assert files_in(tmp_path) == [
        "cfg.json",
        f"{CHECKPOINTS}/model.bin",
        "notes.txt",
        "sae_weights.safetensors",
    ]


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: no finished activation store"):
        train_sae(tmp_path / "sae", tmp_path, [SETTINGS])
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("n", [1, 2, 10])
def test_a_store_of_very_few_tokens_is_refused_or_trained_on(n, tmp_path):
    write_store(tmp_path / "store", sparse_tokens(n))
    try:
        (trained,) = train_sae(tmp_path / "sae", tmp_path / "store", [SETTINGS])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert trained.metrics.tokens > 0


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device, store, tmp_path):
    with pytest.raises(UserError, match=f"'{device}'"):
        train_sae(tmp_path, store, [SETTINGS], device=device)


# shared concepts


@pytest.mark.parametrize("kind", ["iso-energy", "group-sparse"])
def test_concepts_are_shared_over_the_stores_pairs(kind, store, tmp_path):
    plain, shared = (
        train_sae(tmp_path / name, store, [replace(SETTINGS, shared=name, shared_weight=0.3)])
        for name in ("none", kind)
    )
    assert not torch.equal(plain[0].sae.W_dec_cd, shared[0].sae.W_dec_cd)


def test_pairs_that_are_swapped_or_in_another_order_are_pairs_all_the_same(tmp_path):
    """Other pairs are another training, but one that still works."""
    fvus = []
    for number, pairs in enumerate(([[0, 1], [2, 3], [4, 5]], [[5, 4], [1, 0], [3, 2]])):
        folder = tmp_path / str(number)
        write_store(folder / "store", sparse_tokens(2000), pairs=pairs)
        settings = [replace(SETTINGS, shared="iso-energy")]
        fvus.append(train_sae(folder / "sae", folder / "store", settings)[0].metrics.fvu)
    assert fvus[0] == pytest.approx(fvus[1], rel=0.05)


def test_a_store_without_pairs_cannot_share_concepts(tmp_path):
    folder = write_store(tmp_path / "store", sparse_tokens(500)).folder
    with pytest.raises(UserError, match=f"^{folder}: no pairs"):
        train_sae(tmp_path / "sae", folder, [replace(SETTINGS, shared="iso-energy")])
    assert not (tmp_path / "sae").exists()


def test_without_a_store_concepts_cannot_be_shared(tmp_path):
    with pytest.raises(UserError, match="pairs"):
        train_sae(tmp_path / "sae", None, [replace(SETTINGS, shared="iso-energy")])


# stability


def test_stabilities_are_of_saes_that_differ_in_the_seed_alone(store, tmp_path):
    settings = [
        replace(SETTINGS, k=k, expansion=e, seed=seed)
        for k, e in ((2, 2), (4, 2), (4, 1))
        for seed in (0, 1, 2)
    ]
    trained = train_sae(tmp_path, store, settings)
    found = stabilities(trained)
    expected = [
        stability(trained[i].sae.W_dec_cd, trained[j].sae.W_dec_cd)
        for group in ((0, 1, 2), (3, 4, 5), (6, 7, 8))
        for i, j in ((group[0], group[1]), (group[0], group[2]), (group[1], group[2]))
    ]
    assert list(found.values()) == expected
    assert all(0 < value < 1 for value in expected)


def test_a_single_sae_has_no_stability(store, tmp_path):
    assert stabilities(train_sae(tmp_path, store, [SETTINGS])) == {}


# without a store


def test_activations_straight_from_a_backbone(random_model, photo_folder, tmp_path):
    seen = []
    (trained,) = train_sae(
        tmp_path / "sae",
        None,
        [replace(SETTINGS, steps=30)],
        model=str(random_model),
        pairs=str(photo_folder / "pairs.jsonl"),
        prompt="one-word",
        watch=seen.append,
    )
    assert files_in(tmp_path / "sae") == ["cfg.json", "sae_weights.safetensors"]
    assert trained.sae.d_in == 32
    assert seen[-1].fvu[0] < seen[0].fvu[0]
    assert {"image", "text", "instruction"} <= set(trained.metrics.fvu_by_role)


def test_the_same_training_from_a_backbone_gives_the_same_bits(
    random_model, photo_folder, tmp_path
):
    class Stopped(Exception):
        pass

    def stop(now):
        if now.step >= 20:
            raise Stopped

    def train(name, **more):
        return train_sae(
            tmp_path / name, None, [replace(SETTINGS, steps=30)], model=str(random_model),
            pairs=str(photo_folder / "pairs.jsonl"), checkpoint_every=7, **more,
        )  # fmt: skip

    (whole,) = train("whole")
    with pytest.raises(Stopped):
        train("stopped", watch=stop)
    (rest,) = train("stopped")
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, rest.sae.state_dict()[name]), name


def test_a_store_of_a_build_can_be_trained_on(finished_build, tmp_path):
    folder = finished_build / "run/collect"
    (trained,) = train_sae(tmp_path, folder, [replace(SETTINGS, shared="iso-energy")])
    assert trained.sae.d_in == Store(folder).d == 32
    assert set(trained.metrics.fvu_by_role) == {"image", "text", "instruction", "special"}
