"""SAELens' layout: what we write, old configs, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from saved import assert_same_codes

from patch_retriever.errors import UserError
from patch_retriever.sae.formats import load_sae, save_sae
from patch_retriever.sae.model import SparseAutoencoder

D, C = 6, 17
SHAPES = {"W_enc": (D, C), "b_enc": (C,), "W_dec": (C, D), "b_dec": (D,)}


def make_sae(k=None):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    return SparseAutoencoder(rand(D, C), rand(C), rand(C, D), rand(D), rand(C).abs(), k)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    sae = make_sae()
    save_sae(sae, tmp_path)
    loaded = load_sae(str(tmp_path))
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x_nd = torch.randn(5, D)
    assert torch.equal(loaded.encode(x_nd), sae.encode(x_nd))


def test_a_topk_sae_is_loaded_with_its_gate(tmp_path):
    sae = make_sae(k=4)
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    x_nd = torch.randn(5, D)
    assert loaded.k == 4
    assert torch.equal(loaded.encode(x_nd), sae.encode(x_nd))


@pytest.mark.parametrize(
    ("k", "gate", "more"),
    [
        (None, {"architecture": "jumprelu"}, {"threshold": (C,)}),
        (4, {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": False}, {}),
    ],
)
def test_files_are_in_saelens_layout(tmp_path, k, gate, more):
    save_sae(make_sae(k), tmp_path, {"fvu": 0.25})
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {**SHAPES, **more}
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        **gate,
        "d_in": D,
        "d_sae": C,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"fvu": 0.25},
        "saved_by": "patch-retriever",
        "sae_lens_version": "6.0.0",
    }


def test_without_apply_b_dec_to_input_saelens_applies_it(copied):
    saved = copied("saelens/standard")
    saved.change_config("apply_b_dec_to_input")
    assert_same_codes(saved)


def test_a_row_of_zeros_that_is_rescaled_stays_one(copied):
    saved = copied("saelens/topk_rescaled")
    rows_cd = saved.tensors()["W_dec"]
    rows_cd[5] = 0
    saved.change_tensors(W_dec=rows_cd)
    sae = saved.load()
    x_nd, _, _ = saved.codes()
    assert not bool(sae.encode(x_nd)[:, 5].any())
    assert bool(sae.decode(sae.encode(x_nd)).isfinite().all())


def test_a_topk_config_from_before_6_0(copied):
    saved = copied("saelens/topk")
    saved.change_config(
        "architecture",
        "k",
        "metadata",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 3},
        normalize_activations=False,
    )
    assert_same_codes(saved)


def test_a_relu_config_from_before_6_0(copied):
    saved = copied("saelens/standard")
    saved.change_config(
        "architecture", "metadata", "apply_b_dec_to_input", "normalize_activations",
        activation_fn_str="relu", activation_fn_kwargs={},
    )  # fmt: skip
    assert_same_codes(saved)


def test_a_scale_of_ones_from_old_versions_is_ignored(copied):
    saved = copied("saelens/standard")
    saved.change_tensors(scaling_factor=torch.ones(16))
    assert_same_codes(saved)
    saved.change_tensors(scaling_factor=torch.full((16,), 1.5))
    saved.assert_refused(saved.weights, "scaling_factor")


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("gated", "biases of their own"),
        ("abstopk", "negative"),
        ("matching_pursuit", "searched"),
        ("temporal", "tokens before"),
        ("transcoder", "another"),
        ("skip_transcoder", "another"),
        ("jumprelu_transcoder", "another"),
        ("jumprelu_skip_transcoder", "another"),
        ("batchtopk", "save_inference_model"),
        ("matryoshka_batchtopk", "save_inference_model"),
        ("of-tomorrow", "unknown"),
        (None, "unknown"),
        (["topk"], "unknown"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(copied, architecture, why):
    saved = copied("saelens/standard")
    saved.change_config(architecture=architecture)
    saved.assert_refused(saved.config, repr(architecture), why)


@pytest.mark.parametrize(
    ("normalisation", "why"),
    [
        ("expected_average_only_in", "fold_activation_norm_scaling_factor"),
        (True, "fold_activation_norm_scaling_factor"),
        ("covariance_whitening", "fold_activation_whitening"),
        ("constant_norm_rescale", "each token"),
        ("of-tomorrow", "only none and layer_norm"),
        (["none"], "only none and layer_norm"),
    ],
)
def test_normalised_activations_are_refused_with_the_reason(copied, normalisation, why):
    saved = copied("saelens/standard")
    saved.change_config(normalize_activations=normalisation)
    saved.assert_refused(saved.config, "normalised", why)


def test_another_activation_is_refused(copied):
    saved = copied("saelens/standard")
    saved.change_config(activation_fn_str="tanh-relu")
    saved.assert_refused(saved.config, "tanh-relu")


def test_jumprelu_without_thresholds_is_refused(copied):
    saved = copied("saelens/jumprelu")
    saved.change_tensors(threshold=None)
    saved.assert_refused(saved.weights, "threshold")


def test_a_standard_sae_with_thresholds_is_refused(copied):
    saved = copied("saelens/standard")
    saved.change_tensors(threshold=torch.ones(16))
    saved.assert_refused(saved.weights, "threshold")


def test_a_folder_without_an_sae(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no SAE \(cfg.json with sae_weights.safetensors, ") as e:
        load_sae(tmp_path)
    assert str(e.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(e.value)


def test_k_is_not_chosen_where_the_config_says_it(copied):
    saved = copied("saelens/topk")
    saved.k = 5
    saved.assert_refused(saved.folder, "k=5")
