"""Where a model is loaded to, and how much memory that takes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

import patch_retriever
from commands import error_line, invoke
from conftest import SMALL_SAE, SMALL_SCENES
from families import missing
from patch_retriever import build_retriever
from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import PAPER_READOUT, PLAIN, Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.probe import Probe

PLACED = ("llava", "gemma3", "paligemma2", "chameleon", "qwen2-vl")


class Red:
    """A picture."""

    name = "red"

    def open(self):
        return Image.new("RGB", (60, 40), "red")


CHATS = [item.load() for item in (Item("a cat"), Item(picture=Red()), Item("a cat", Red()))]


def on_disk(transformer):
    """Everything on the CPU but the decoder layers, which are read from the disk as they are run:
    what "auto" does with a model that is larger than the memory that there is."""
    model = transformer.model
    layers = layers_path(model)
    decoder = layers.rpartition(".")[0]
    found = {name: "cpu" for name, _ in model.named_children() if name != decoder}
    inside = model.get_submodule(decoder).named_children()
    found |= {f"{decoder}.{name}".lstrip("."): "cpu" for name, _ in inside}
    return {**found, layers: "disk"}


@pytest.mark.parametrize("name", PLACED)
def test_a_model_with_layers_on_the_disk_gives_the_same(stand_in, name):
    if lacking := missing(name):
        pytest.skip(f"{name}: its processor needs {', '.join(lacking)}")
    plain = load_backbone(str(stand_in(name)))
    placed = load_backbone(str(stand_in(name)), device_map=on_disk(plain))
    assert {str(p.device) for p in placed.parameters()} == {"cpu", "meta"}
    assert device_of(placed) == torch.device("cpu")
    expected_nd = with_readout(plain, PAPER_READOUT).encode(CHATS)
    assert np.array_equal(with_readout(placed, PAPER_READOUT).encode(CHATS), expected_nd)
    features = plain.preprocess(CHATS)
    sites = ["layers.0", "layers.2", "last_hidden_state"]
    expected = Probe(plain).read(features, sites)
    probe = Probe(placed)
    found = probe.read(features, sites)
    assert all(torch.equal(found[site], expected[site]) for site in sites)
    doubled = probe.read(features, sites, {"layers.1": lambda h_ntd: 2 * h_ntd})
    assert not torch.allclose(doubled["last_hidden_state"], expected["last_hidden_state"])


@pytest.mark.parametrize("name", ["llava", "idefics3", "paligemma2"])
def test_auto_puts_on_the_disk_what_the_memory_does_not_hold(stand_in, name, monkeypatch):
    plain = load_backbone(str(stand_in(name)))
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    for ask in ("get_max_memory", "get_balanced_memory"):
        monkeypatch.setattr(
            f"transformers.integrations.accelerate.{ask}",
            lambda *_, **__: {"cpu": int(0.7 * size) + 20_000},
        )
    placed = load_backbone(str(stand_in(name)), device_map="auto")
    assert set(placed.model.hf_device_map.values()) == {"cpu", "disk"}
    expected_nd = with_readout(plain, PAPER_READOUT).encode(CHATS)
    assert np.array_equal(with_readout(placed, PAPER_READOUT).encode(CHATS), expected_nd)


def test_auto_on_one_device_is_that_device(random_model):
    plain, auto = (
        load_backbone(str(random_model)),
        load_backbone(str(random_model), device_map="auto"),
    )
    assert device_of(auto) == next(auto.parameters()).device
    expected_nd = with_readout(plain, PAPER_READOUT).encode(CHATS)
    assert np.abs(with_readout(auto, PAPER_READOUT).encode(CHATS) - expected_nd).max() < 1e-5


def test_a_build_with_layers_on_the_disk_gives_the_same(finished_build, random_model, tmp_path):
    config = json.loads((finished_build / "patch-retriever.json").read_text())
    device_map = on_disk(load_backbone(str(random_model)))
    settings = {"model": str(random_model), "scenes": SMALL_SCENES, "sae": SMALL_SAE, "folds": 1}
    assert config["device_map"] is None
    made = build_retriever(tmp_path / "out", device_map=device_map, **settings)
    assert made.table == (finished_build / "report" / "table.txt").read_text().rstrip()


def test_a_device_beside_a_device_map_is_refused(random_model, tmp_path):
    line = "a device map says where the model goes; leave device 'cuda' out"
    with pytest.raises(UserError, match=f"^{line}$"):
        load_backbone(str(random_model), device="cuda", device_map="auto")
    asked = ("--device", "cuda", "--device-map", "auto", "-o", tmp_path / "out")
    assert error_line(invoke("build", random_model, *asked)) == line


REFUSED = {
    "everywhere": "a device map that does not fit (When passing device_map as a string",
    "model.language_model": "a device map with no part of this model (model.language_model); its "
    "parts are vision_tower, multi_modal_projector, language_model",
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_device_map_that_does_not_fit_is_refused_in_one_line(random_model, said):
    device_map = said if "." not in said else {"": "cpu", said: "disk"}
    with pytest.raises(UserError, match=f"^{re.escape(f'{random_model}: {REFUSED[said]}')}"):
        load_backbone(str(random_model), device_map=device_map)


def test_a_part_that_cannot_be_offloaded_is_said(stand_in):
    folder = str(stand_in("chameleon"))
    device_map = {**on_disk(load_backbone(folder)), "vqmodel": "disk"}
    line = f"{folder}: its vqmodel.quantize cannot be offloaded; name a device for it"
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        load_backbone(folder, device_map=device_map)
    parts = dict(load_backbone(folder).model.vqmodel.named_children())
    split = {f"vqmodel.{part}": "cpu" if part == "quantize" else "disk" for part in parts}
    del device_map["vqmodel"]
    placed = load_backbone(folder, device_map=device_map | split)
    expected_nd = with_readout(load_backbone(folder), PAPER_READOUT).encode(CHATS)
    assert np.array_equal(with_readout(placed, PAPER_READOUT).encode(CHATS), expected_nd)


@pytest.mark.parametrize("said", ["{", "{'a': 1}"])
def test_a_device_map_that_is_no_json_is_refused(random_model, tmp_path, said):
    result = invoke("build", random_model, "--device-map", said, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "not a JSON object" in result.stderr


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_is_asked_for_is_used(random_model, attention):
    plain = load_backbone(str(random_model))
    asked = load_backbone(str(random_model), attention=attention)
    assert asked.config._attn_implementation == attention
    expected_nd = with_readout(plain, PAPER_READOUT).encode(CHATS)
    assert np.abs(with_readout(asked, PAPER_READOUT).encode(CHATS) - expected_nd).max() < 1e-5


@pytest.mark.parametrize("attention", ["no_such", "flash_attention_2"])
def test_an_attention_that_is_not_there_is_refused_in_one_line(random_model, attention):
    with pytest.raises(UserError) as error:
        load_backbone(str(random_model), attention=attention)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{random_model}: that attention cannot be used (")


@pytest.mark.parametrize("name", ["paligemma2", "gemma3", "llava"])
def test_flash_attention_is_refused_where_it_would_hide_tokens(stand_in, name, monkeypatch):
    class Stop(Exception):
        pass

    monkeypatch.setattr("patch_retriever.backbones.load.take_chats", Mock(side_effect=Stop))
    # as if flash attention were installed
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda *_, **__: "sdpa"
    )
    taken = pytest.raises(Stop)
    refused = pytest.raises(UserError, match=r"would hide; use sdpa$")
    with taken if name == "llava" else refused:
        load_backbone(str(stand_in(name)), attention="flash_attention_2")


MEASURE = """\
import json, resource, sys

import torch, transformers.models.llava.modeling_llava, sentence_transformers  # noqa
from sentence_transformers.base.modules import Transformer  # noqa
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa
from patch_retriever.backbones.load import load_backbone

load_backbone(sys.argv[1])  # a small one: everything that is imported on the way
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
transformer = load_backbone(sys.argv[2], dtype=sys.argv[3])
weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
for p in transformer.parameters():
    p.sum()  # what is mapped from the file is read
print(json.dumps({"weights": weights, "more": peak() - before}))
"""


@pytest.fixture(scope="module")
def large(stand_in, tmp_path_factory):
    """The same as a small LLaVA, with 200 MB in bfloat16."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("large") / "llava"
    shutil.copytree(stand_in("llava"), folder)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
    }
    config = LlavaConfig(**values)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_takes_little_more_memory_than_the_weights(stand_in, large, dtype):
    path = str(Path(patch_retriever.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(stand_in("llava")), str(large), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["weights"] > (2 if dtype == "float32" else 1) * 190e6
    # beside them, when they are converted, the file's own pages
    files = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    allowed = found["weights"] + (files if dtype == "float32" else 0)
    assert found["more"] < 1.25 * allowed, found


def test_a_readout_can_be_set_on_a_placed_model_again(random_model):
    plain = load_backbone(str(random_model))
    placed = load_backbone(str(random_model), device_map=on_disk(plain))
    for readout in (PAPER_READOUT, Readout(PLAIN, "layers.0", "lasttoken")):
        expected_nd = with_readout(plain, readout).encode(CHATS)
        assert np.array_equal(with_readout(placed, readout).encode(CHATS), expected_nd)
