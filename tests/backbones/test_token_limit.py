"""The token limit of every model family: what is cut, what never is, live and exported."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from sentence_transformers import SentenceTransformer

from families import FAMILIES, parameter
from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, PLAIN, Prompt, Readout
from patch_retriever.backbones.token_limit import largest_picture
from patch_retriever.errors import UserError

LONG = "two small dogs on a mat, asleep; " * 60
SPARE = 40


@pytest.fixture(scope="module", params=map(parameter, FAMILIES))
def folder(request, stand_in):
    return stand_in(request.param)


@pytest.fixture(scope="module")
def transformer(folder):
    return load_backbone(str(folder))


def least(transformer, prompt):
    """The smallest limit, as the refusal of a smaller one says."""
    with pytest.raises(UserError) as caught:
        set_readout(transformer, Readout(prompt, max_tokens=1))
    line = str(caught.value)
    assert "\n" not in line
    return int(re.search(r"need (\d+)", line)[1])


def chat(pictures=(), text=None):
    content = [{"type": "image", "image": picture} for picture in pictures]
    if text is not None:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def read(transformer, *chats, prompt=None):
    """(decoded, number of tokens, number of image tokens) of every item."""
    features = transformer.preprocess(list(chats), prompt)
    image = image_token_id(transformer.config)
    for ids_t, mask_t in zip(features["input_ids"], features["attention_mask"].bool(), strict=True):
        ids_t = ids_t[mask_t]
        yield transformer.tokenizer.decode(ids_t), len(ids_t), int((ids_t == image).sum())


def end_of(transformer, prompt, kind):
    """What follows the item's text, without any limit."""
    transformer.max_seq_length = 10**30
    set_readout(transformer, Readout(prompt))
    pictures = [largest_picture(transformer)] if kind == "both" else []
    ((said, _, n_image),) = read(transformer, chat(pictures, "Z"))
    return said.rpartition("Z")[2], n_image


@pytest.mark.parametrize("prompt", [PAPER, ONE_WORD], ids=lambda prompt: prompt.name)
def test_neither_pictures_nor_prompt_are_cut(transformer, prompt):
    ends = {kind: end_of(transformer, prompt, kind) for kind in ("text", "both")}
    picture = largest_picture(transformer)
    floor = least(transformer, prompt)
    for limit in (floor, floor + SPARE):
        set_readout(transformer, Readout(prompt, max_tokens=limit))
        rows = read(transformer, chat([], LONG), chat([picture], LONG), chat([picture]))
        (text, n, _), (both, n_both, n_image), (_, n_alone, n_image_alone) = rows
        assert n == limit
        assert text.endswith(ends["text"][0])
        assert n_both <= limit
        assert both.endswith(ends["both"][0])
        assert n_image == n_image_alone == ends["both"][1]
        assert n_alone <= limit
    assert "two small dogs" in text
    assert "two small dogs" in both


def test_a_short_item_is_read_as_without_a_limit(transformer):
    transformer.max_seq_length = 10**30
    set_readout(transformer, Readout(PAPER))
    chats = [chat([], "a cat"), chat([Image.new("RGB", (40, 40))], "a cat")]
    expected = list(read(transformer, *chats))
    limit = least(transformer, PAPER) + SPARE
    set_readout(transformer, Readout(PAPER, max_tokens=limit))
    assert list(read(transformer, *chats)) == expected


@pytest.mark.parametrize("instruction", ["user", "system"])
def test_a_prompt_given_at_encoding_is_never_cut(transformer, instruction):
    prompt = Prompt("own", both="\nin one word: ", instruction=instruction)
    asked = "Find a picture of the same animal"
    set_readout(transformer, Readout(prompt, max_tokens=least(transformer, prompt) + 2 * SPARE))
    picture = largest_picture(transformer)
    for said, _, _ in read(transformer, chat([], LONG), chat([picture], LONG), prompt=asked):
        assert asked in said


def test_several_pictures_leave_less_room_and_too_many_are_refused(transformer):
    picture = largest_picture(transformer)
    limit = least(transformer, ONE_WORD)
    set_readout(transformer, Readout(ONE_WORD, max_tokens=limit + 300))
    end = ONE_WORD.both.strip()
    for n in (2, 3):
        ((said, length, _),) = read(transformer, chat(n * [picture], LONG))
        assert length <= limit + 300
        assert end in said
    set_readout(transformer, Readout(ONE_WORD, max_tokens=limit))
    with pytest.raises((ValueError, TypeError)):  # the latter is how Idefics3 says it
        transformer.preprocess([chat(40 * [picture], "a cat")])


def test_no_picture_becomes_more_tokens_than_the_largest(transformer):
    transformer.max_seq_length = 10**30
    set_readout(transformer, Readout(PLAIN))
    ((_, most, _),) = read(transformer, chat([largest_picture(transformer)]))
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (900, 900), (20, 900), (900, 20), *rng.integers(10, 300, (12, 2)).tolist()]
    rows = read(transformer, *(chat([Image.new("RGB", tuple(size))]) for size in sizes))
    assert max(n for _, n, _ in rows) <= most


QUICK = settings(
    deadline=None, database=None, max_examples=25, phases=[Phase.explicit, Phase.generate]
)


@pytest.fixture(scope="module")
def narrow(transformer):
    """Under a limit that leaves little room."""
    end, _ = end_of(transformer, PAPER, "both")
    limit = least(transformer, PAPER) + 12
    set_readout(transformer, Readout(PAPER, max_tokens=limit))
    return transformer, limit, end


@QUICK
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>"), max_size=60)
)
def test_whatever_the_text_the_prompt_is_whole(narrow, text):
    transformer, limit, end = narrow
    picture = Image.new("RGB", (64, 64))
    ((said, length, _),) = read(transformer, chat([picture], text))
    assert length <= limit
    assert said.endswith(end)


def test_live_and_exported_cut_alike(transformer, tmp_path):
    limit = least(transformer, PAPER) + SPARE
    model = with_readout(transformer, Readout(PAPER, max_tokens=limit))
    picture = Image.new("RGB", (50, 70), "red")
    items = [LONG, {"image": picture, "text": LONG}, picture, "a cat"]
    live_nd = model.encode(items)
    model.save(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert loaded.max_seq_length == limit
    assert np.abs(loaded.encode(items) - live_nd).max() < 1e-5
    one_by_one = np.stack([loaded.encode(item) for item in items])
    assert np.abs(one_by_one - live_nd).max() < 1e-5
    again = with_readout(load_backbone(str(tmp_path)), Readout(PAPER, max_tokens=limit))
    assert np.abs(again.encode(items) - live_nd).max() < 1e-5


def test_an_export_takes_another_limit(transformer, tmp_path):
    floor = least(transformer, PAPER)
    model = with_readout(transformer, Readout(PAPER, max_tokens=floor + SPARE))
    model.encode([LONG])
    model.save(str(tmp_path))
    again = load_backbone(str(tmp_path))
    set_readout(again, Readout(PAPER, max_tokens=floor + 2 * SPARE))
    assert [n for _, n, _ in read(again, chat([], LONG))] == [floor + 2 * SPARE]


def test_another_readout_brings_its_own_end(transformer):
    """sentence-transformers remembers the end of a template that is there no more."""
    limit = least(transformer, ONE_WORD) + SPARE
    for prompt in (PAPER, ONE_WORD, PAPER):
        set_readout(transformer, Readout(prompt, max_tokens=limit))
        ((said, _, _),) = read(transformer, chat([], LONG))
        assert prompt.text.strip() in said


def test_a_limit_beyond_the_models_own_is_refused(transformer):
    most = transformer.config.get_text_config().max_position_embeddings
    with pytest.raises(UserError, match=f"the model takes {most} tokens at most"):
        set_readout(transformer, Readout(PLAIN, max_tokens=most + 1))
