"""The SAE: encoding, and its files in SAELens' layout."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from patch_retriever.errors import UserError
from patch_retriever.sae.model import SparseAutoencoder

D, C = 6, 17


def make_sae(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    rows_cd = torch.nn.functional.normalize(rand(C, D), dim=1)
    return SparseAutoencoder(rand(D, C), rand(C), rows_cd, rand(D), rand(C).abs())


@pytest.fixture
def saved(tmp_path):
    make_sae().save(tmp_path, {"fvu": 0.25})
    return tmp_path


def test_encode_equals_a_loop_over_items_and_concepts():
    sae = make_sae()
    x_nd = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    expected_nc = torch.zeros(9, C)
    for n in range(9):
        for c in range(C):
            u = float(sae.b_enc_c[c])
            u += sum(float(x_nd[n, j]) * float(sae.W_enc_dc[j, c]) for j in range(D))
            expected_nc[n, c] = u if u > float(sae.threshold_c[c]) else 0.0
    codes_nc = sae.encode(x_nd)
    assert torch.equal(codes_nc != 0, expected_nc != 0)
    assert torch.allclose(codes_nc, expected_nc, atol=1e-5)
    assert 0 < int((codes_nc != 0).sum()) < codes_nc.numel()


def test_a_concept_at_its_threshold_is_silent():
    eye, zero = torch.eye(2), torch.zeros(2)
    sae = SparseAutoencoder(eye, zero, eye, zero, torch.tensor([0.5, 0.25]))
    assert torch.equal(sae.encode(torch.tensor([[0.5, 0.5]])), torch.tensor([[0.0, 0.5]]))


def test_decode_adds_rows_and_bias():
    sae = make_sae()
    codes_nc = torch.zeros(1, C)
    codes_nc[0, [2, 5]] = torch.tensor([1.5, 0.5])
    expected_d = 1.5 * sae.W_dec_cd[2] + 0.5 * sae.W_dec_cd[5] + sae.b_dec_d
    assert torch.allclose(sae.decode(codes_nc)[0], expected_d, atol=1e-6)


def test_width_and_number_of_concepts():
    assert (make_sae().d_in, make_sae().n_concepts) == (D, C)


def test_what_is_loaded_is_what_was_saved(saved):
    loaded, sae = SparseAutoencoder.load(saved), make_sae()
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x_nd = torch.randn(5, D)
    assert torch.equal(loaded.encode(x_nd), sae.encode(x_nd))


def test_files_are_in_saelens_layout(saved):
    shapes = {k: tuple(v.shape) for k, v in load_file(saved / "sae_weights.safetensors").items()}
    assert shapes == {
        "W_enc": (D, C),
        "b_enc": (C,),
        "W_dec": (C, D),
        "b_dec": (D,),
        "threshold": (C,),
    }
    config = json.loads((saved / "cfg.json").read_text())
    assert (
        config.items()
        >= {
            "architecture": "jumprelu",
            "d_in": D,
            "d_sae": C,
            "dtype": "float32",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "metadata": {"fvu": 0.25},
        }.items()
    )


def test_nothing_but_json_and_safetensors_is_written(saved):
    assert {p.name for p in saved.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def assert_unreadable(folder):
    with pytest.raises(UserError) as error:
        SparseAutoencoder.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    assert_unreadable(tmp_path / "nowhere")


def test_a_foreign_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_unreadable(tmp_path)


def test_truncated_weights(saved):
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    assert_unreadable(saved)


def test_missing_weights(saved):
    (saved / "sae_weights.safetensors").unlink()
    assert_unreadable(saved)


@pytest.mark.parametrize("missing", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_missing_tensor(saved, missing):
    weights = saved / "sae_weights.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != missing}, weights)
    assert_unreadable(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"jumprelu"', "\ufeff{}"])
def test_a_config_that_is_no_config(saved, text):
    (saved / "cfg.json").write_text(text, encoding="utf-8")
    assert_unreadable(saved)


def test_weights_that_do_not_fit_each_other(saved):
    weights = saved / "sae_weights.safetensors"
    save_file({**load_file(weights), "W_dec": torch.zeros(C + 1, D)}, weights)
    assert_unreadable(saved)


def test_another_architecture_is_named(saved):
    config = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps({**config, "architecture": "topk"}))
    with pytest.raises(UserError, match="topk"):
        SparseAutoencoder.load(saved)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_place_of_the_weights_is_not_run(saved):
    crater = saved / "crater"
    (saved / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb(crater)))
    assert_unreadable(saved)
    assert not crater.exists()
