"""A build with a prompt of the user's own, a token limit and items of several pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jinja2 import Environment, meta
from PIL import Image
from sentence_transformers import SentenceTransformer

from conftest import SMALL_SAE
from patch_retriever import build_retriever
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import LAST, PAPER_PROMPTS, PAPER_READOUT
from patch_retriever.config import BuildConfig
from patch_retriever.data import scenes_data
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.patch.artefact import Patch
from patch_retriever.publish import export
from patch_retriever.report import card
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.retriever import PatchedRetriever
from patch_retriever.stages.readout import load_readout

OWN = {
    "text": "\nthis text in one word: ",
    "image": "\nthis image in one word: ",
    "both": "\nboth in one word: ",
    "generation_prompt": True,
}
LONG = "a field of colour, wide and open; " * 40


@pytest.fixture(scope="module")
def built(random_model, tmp_path_factory):
    """A build from pairs of one and of two pictures; its folder, and that of the pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(60):
        for side in "ab":
            picture = Image.new("RGB", (40 + i % 7, 30 + i % 5), (4 * i, 255 - 4 * i, 90))
            picture.putpixel((i % 30, 3 if side == "a" else 9), (255, 255, 255))
            picture.save(folder / f"{i}{side}.png")
        image = [f"{i}a.png", f"{i}b.png"] if i % 2 else f"{i}a.png"
        rows.append({"image": image, "text": f"a field of colour number {i}"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path_factory.mktemp("out") / "out"
    build_retriever(
        out,
        model=str(random_model),
        pairs=str(folder),
        sae=SMALL_SAE,
        prompt=OWN,
        pooling="lasttoken",
        max_tokens=160,
    )
    return out, folder


def test_only_the_asked_for_readouts_were_tried(built):
    tried = json.loads((built[0] / "run/readout/readout.json").read_text())["scores"]
    assert tried
    assert all(name.startswith("own prompt, last token of ") for name in tried)
    readout = load_readout(built[0] / "run/readout")
    assert (readout.prompt.both, readout.pooling, readout.max_tokens) == (
        OWN["both"],
        "lasttoken",
        160,
    )


def test_golden_inputs_hold_items_of_several_pictures(built):
    inputs = json.loads((built[0] / "golden/inputs.json").read_text())
    assert {len(item.get("images", ())) for item in inputs} == {0, 1, 2}
    result = json.loads((built[0] / "golden/result.json").read_text())
    assert result["max_abs_diff"] < 1e-5


def test_long_items_are_cut_alike_live_exported_and_at_its_base(built):
    out, folder = built
    picture = Image.open(folder / "1a.png")
    items = [LONG, {"image": picture, "text": LONG}, {"image": [picture, picture], "text": LONG}]
    model = SentenceTransformer(str(out), device="cpu")
    assert model.max_seq_length == 160
    features = model.preprocess(items)
    for ids_t, mask_t in zip(features["input_ids"], features["attention_mask"], strict=True):
        said = model.tokenizer.decode(ids_t[mask_t.bool()])
        assert int(mask_t.sum()) <= 160
        assert said.endswith("in one word: <|end|><|assistant|>")
    live = PatchedRetriever.from_folder(out)
    assert np.abs(live.encode(items) - model.encode(items)).max() < 1e-5
    base = load_encoder(f"{out}@base")
    expected = live.encode(items[:1], patch=False)
    assert np.abs(base.embed([Item(LONG)], "query") - expected).max() < 1e-5


def test_the_card_says_what_is_said_and_cut(built):
    card = (built[0] / "README.md").read_text()
    assert "**token limit**: 160" in card
    assert 'encode(..., prompt="...")' in card
    assert "prompt_name=" not in card


def test_the_papers_readout_is_exported_with_its_prompts(random_model, tmp_path):
    out = tmp_path / "out"
    patch = Patch(LAST, about={"readout": PAPER_READOUT.to_json()})
    patch.save(tmp_path / "patch")
    data = scenes_data({"calibration": 24, "validation": 20, "test": 24}, 0)
    export(load_backbone(str(random_model)), PAPER_READOUT, tmp_path / "patch", data, out)
    patch.save(out / "patch")
    model = SentenceTransformer(str(out), device="cpu")
    assert {n: p for n, p in model.prompts.items() if p} == PAPER_PROMPTS
    live = PatchedRetriever.from_folder(out)
    item = {"image": Image.new("RGB", (30, 30), "red"), "text": "make it blue"}
    for name in PAPER_PROMPTS:
        found_d = model.encode(item, prompt_name=name)
        assert np.abs(found_d - live.encode(item, prompt_name=name)).max() < 1e-5
    asked = model.encode(item, prompt_name="it->i query")
    assert np.abs(asked - model.encode(item, prompt_name="it->it query")).max() > 1e-4
    encoder = load_encoder(str(out))  # no role has a prompt of its own
    assert (encoder.prompt("query"), encoder.prompt("document")) == ("", "")


def test_the_card_of_a_model_with_the_papers_prompts_names_them():
    names = meta.find_undeclared_variables(Environment().parse(card._CARD))
    values = {name: name for name in names} | {"prompts": list(PAPER_PROMPTS), "max_tokens": None}
    written = card.model_card(**values)
    assert all(name in written for name in PAPER_PROMPTS)
    assert "token limit" not in written
    assert "as a system message before it" in card.model_card(**values | {"instruction": "system"})
    assert "in its place" in card.model_card(**values | {"instruction": "user"})


# settings


def test_a_prompt_by_name_is_written_out():
    config = BuildConfig.read(None, prompt="e5v")
    assert config.prompt is not None
    assert config.prompt.text == "\nSummary above sentence in one word: "
    assert BuildConfig(**json.loads(config.model_dump_json())) == config


def test_a_prompt_from_a_file_of_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('text: " in a word:"\ninstruction: system\n')
    config = BuildConfig.read(None, prompt=str(path))
    assert config.prompt is not None
    assert (config.prompt.text, config.prompt.instruction) == (" in a word:", "system")
    assert (config.prompt.name, config.prompt.image) == ("own", "")
    settings = tmp_path / "settings.yaml"
    settings.write_text('prompt: {text: " in a word:", instruction: system}\nmax_tokens: 300\n')
    assert BuildConfig.read(settings) == config.model_copy(update={"max_tokens": 300})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"prompt": "mine"},
            "prompt: no prompt 'mine'; there are plain, paper, one-word, e5v, system",
        ),
        ({"prompt": "gone.yaml"}, "gone.yaml: cannot be read"),
        ({"prompt": {"texts": "a"}}, "unknown key 'prompt.texts'; known keys: name, text, image"),
        ({"prompt": {"instruction": "both"}}, "prompt.instruction: Input should be 'user' or"),
        ({"pooling": "max"}, "pooling: Input should be 'mean', 'lasttoken' or 'mean+lasttoken'"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"preset": "paper", "prompt": "plain"}, "preset paper pins prompt and pooling"),
        ({"preset": "paper", "pooling": "mean"}, "preset paper pins prompt and pooling"),
    ],
)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(UserError) as caught:
        BuildConfig.read(None, **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_limit_that_is_too_small_says_the_least(random_model, tmp_path):
    with pytest.raises(UserError, match=r"max_tokens: 20 is too small; .* need \d+; give that"):
        build_retriever(
            tmp_path / "out",
            model=str(random_model),
            scenes={"calibration": 24, "validation": 20, "test": 24},
            sae=SMALL_SAE,
            max_tokens=20,
        )
