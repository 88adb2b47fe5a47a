"""Adapters on disk: peft's layout, relative bases, merging that can be undone, wrong bases."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftConfig, get_peft_model

from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.adapters.targets import adapter_config
from patch_retriever.backbones.adapter import (
    ABOUT,
    CONFIG,
    WEIGHTS,
    Merged,
    check_adapter,
    inject,
    save_adapter,
    unload,
)
from patch_retriever.backbones.load import load_backbone
from patch_retriever.errors import UserError


@pytest.fixture
def adapter(random_model, tmp_path):
    """The folder of an adapter of random weights, beside a copy of its base."""
    shutil.copytree(random_model, tmp_path / "base")
    transformer = load_backbone(str(tmp_path / "base"))
    torch.manual_seed(0)
    peft_model = get_peft_model(
        transformer.model, adapter_config(transformer.model, AdapterSettings(rank=4))
    )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(peft_model, tmp_path / "adapter", str(tmp_path / "base"), {"made": "here"})
    return tmp_path / "adapter"


def weights(transformer):
    return {name: p.detach().clone() for name, p in transformer.model.state_dict().items()}


def test_its_base_is_relative_and_peft_reads_it(adapter):
    assert {p.name for p in adapter.iterdir()} == {CONFIG, WEIGHTS, ABOUT}
    assert PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path == "../base"
    assert check_adapter(adapter)["made"] == "here"


def test_merging_is_undone_bit_for_bit_and_may_be_nested(adapter, random_model):
    transformer = load_backbone(str(random_model))
    modules = [name for name, _ in transformer.model.named_modules()]
    before, merged = weights(transformer), Merged(transformer, adapter)
    for _ in range(2):
        with merged:
            inside = weights(transformer)
            with merged:
                for name, values in weights(transformer).items():
                    assert torch.equal(values, inside[name])
            for name, values in weights(transformer).items():
                assert torch.equal(values, inside[name])
        changed = [name for name in before if not torch.equal(before[name], inside[name])]
        assert changed
        assert all("language_model.layers" in name for name in changed)
        after = weights(transformer)
        assert list(after) == list(before)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [name for name, _ in transformer.model.named_modules()] == modules


def test_an_error_inside_restores_the_weights(adapter, random_model):
    transformer = load_backbone(str(random_model))
    before = weights(transformer)
    with pytest.raises(ZeroDivisionError), Merged(transformer, adapter):
        raise ZeroDivisionError
    assert all(torch.equal(before[n], v) for n, v in weights(transformer).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_base_in_another_dtype_is_the_same_base(adapter, random_model, dtype):
    unload(inject(load_backbone(str(random_model), dtype=dtype), adapter))


def test_another_base_is_refused(adapter, random_model):
    transformer = load_backbone(str(random_model))
    with torch.no_grad():
        transformer.model.language_model.layers[1].mlp.up_proj.weight.add_(0.1)
    before = weights(transformer)
    with pytest.raises(UserError, match=r"made for other weights \(.*base\)"):
        inject(transformer, adapter)
    assert all(torch.equal(before[n], v) for n, v in weights(transformer).items())


@pytest.mark.parametrize("name", ["paligemma2", "idefics3"])
def test_a_base_of_another_shape_is_refused(adapter, stand_in, name):
    transformer = load_backbone(str(stand_in(name)))
    modules = [n for n, _ in transformer.model.named_modules()]
    with pytest.raises(UserError, match=r"does not fit|other weights"):
        inject(transformer, adapter)
    assert [n for n, _ in transformer.model.named_modules()] == modules


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(adapter, random_model, file):
    (adapter / file).unlink()
    with pytest.raises(UserError, match=f"no adapter here .{file} is missing"):
        inject(load_backbone(str(random_model)), adapter)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_refused(adapter, random_model, file):
    (adapter / file).write_bytes((adapter / file).read_bytes()[:40])
    transformer = load_backbone(str(random_model))
    modules = [n for n, _ in transformer.model.named_modules()]
    with pytest.raises(UserError, match=r"damaged adapter|does not fit"):
        inject(transformer, adapter)
    assert [n for n, _ in transformer.model.named_modules()] == modules


def test_one_that_peft_alone_wrote_is_taken(adapter, random_model):
    (adapter / ABOUT).unlink()
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": "org/x"}))
    unload(inject(load_backbone(str(random_model)), adapter))
