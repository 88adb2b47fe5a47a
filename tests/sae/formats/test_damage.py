"""Damaged files of every format: one line that names the file, and no code is run."""

from __future__ import annotations

import pickle

import pytest
import torch

CASES = {
    "ours/jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "saelens/topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "sparsify/topk": ("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
    "dictionary_learning/standard": ("encoder.weight", "encoder.bias", "decoder.weight", "bias"),
    "dictionary_learning/topk": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"),
    "dictionary_learning/matryoshka": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "overcomplete/state": (
        "encoder.final_block.0.weight",
        "encoder.final_block.0.bias",
        "dictionary._weights",
        "dictionary.multiplier",
    ),
}
"""Saved SAEs and their tensors."""
TENSORS = [(case, name) for case, names in CASES.items() for name in names]
WEIGHTS = [(case, name) for case, name in TENSORS if name != "k"]
FOLDERS = [case for case in CASES if not case.startswith("overcomplete")]

everywhere = pytest.mark.parametrize("case", CASES)


@everywhere
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights(copied, case, share):
    saved = copied(case)
    content = saved.weights.read_bytes()
    saved.weights.write_bytes(content[: int(share * len(content))])
    saved.assert_refused(saved.weights)


@everywhere
def test_weights_that_are_text(copied, case):
    saved = copied(case)
    saved.weights.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    saved.assert_refused(saved.weights)


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_a_missing_tensor(copied, case, name):
    saved = copied(case)
    saved.change_tensors(**{name: None})
    saved.assert_refused(saved.weights, name)


@pytest.mark.parametrize(("case", "name"), WEIGHTS)
def test_a_tensor_of_another_shape(copied, case, name):
    saved = copied(case)
    tensor = saved.tensors()[name]
    longer = torch.cat([tensor.reshape(1, -1)] * 2) if tensor.ndim < 2 else tensor[:, :-1]
    saved.change_tensors(**{name: longer.contiguous()})
    saved.assert_refused(saved.weights, ", not ")


@pytest.mark.parametrize(("case", "name"), WEIGHTS)
def test_a_tensor_of_whole_numbers(copied, case, name):
    saved = copied(case)
    saved.change_tensors(**{name: saved.tensors()[name].int()})
    saved.assert_refused(saved.weights, name, "int32")


@pytest.mark.parametrize(("case", "name"), WEIGHTS)
def test_a_tensor_with_nan(copied, case, name):
    saved = copied(case)
    tensor = saved.tensors()[name]
    tensor[(-1,) * tensor.ndim] = float("nan")
    saved.change_tensors(**{name: tensor})
    saved.assert_refused(saved.weights, name, "NaN")


@everywhere
def test_a_tensor_that_is_not_understood(copied, case):
    saved = copied(case)
    saved.change_tensors(W_skip=torch.ones(8, 8))
    saved.assert_refused(saved.weights, "W_skip")


@pytest.mark.parametrize("case", FOLDERS)
def test_a_missing_config(copied, case):
    saved = copied(case)
    saved.config.unlink()
    saved.assert_refused(saved.config)


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"jumprelu"', "\ufeff{}", "\x00"])
def test_a_config_that_is_no_config(copied, case, text):
    saved = copied(case)
    saved.config.write_text(text, encoding="utf-8")
    saved.assert_refused(saved.config)


@pytest.mark.parametrize("case", ["ours/jumprelu", "saelens/topk", "sparsify/topk"])
@pytest.mark.parametrize("width", [None, 0, -8, 8.0, "8", True, [8]])
def test_a_width_that_is_no_width(copied, case, width):
    saved = copied(case)
    saved.change_config(d_in=width)
    saved.assert_refused(saved.config, "d_in", repr(width))


@pytest.mark.parametrize("case", ["ours/jumprelu", "saelens/topk", "sparsify/topk"])
def test_another_width_than_the_weights(copied, case):
    saved = copied(case)
    saved.change_config(d_in=9)
    saved.assert_refused(saved.weights, "9")


@pytest.mark.parametrize("case", ["saelens/topk", "sparsify/topk"])
@pytest.mark.parametrize("k", [None, 0, 17, 2.5, "3"])
def test_a_k_that_is_no_k(copied, case, k):
    saved = copied(case)
    saved.change_config(k=k)
    saved.assert_refused(saved.config, "k is", str(k))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@everywhere
def test_a_pickle_in_place_of_the_weights_is_not_run(copied, case, tmp_path):
    saved, crater = copied(case), tmp_path / "crater"
    saved.weights.write_bytes(pickle.dumps(Bomb(crater)))
    saved.assert_refused(saved.weights)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater))).close()
    assert crater.exists()


@pytest.mark.parametrize("case", ["dictionary_learning/topk", "overcomplete/model_state"])
def test_a_bomb_among_tensors_that_torch_saved_is_not_run(copied, case, tmp_path):
    saved, crater = copied(case), tmp_path / "crater"
    torch.save({**saved.tensors(), "more": Bomb(crater)}, saved.weights)
    saved.assert_refused(saved.weights, "code", "state_dict")
    assert not crater.exists()
