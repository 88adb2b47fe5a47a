"""Items as model inputs: batches, the role of every token, and pooling weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patch_retriever.backbones.inputs import ROLES, TokenRoles, item_batches, pool, pooling_weights
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, PLAIN, Prompt, Readout
from patch_retriever.items import Item

QUICK = settings(deadline=None, database=None, max_examples=60)
N_IMAGE_TOKENS = 36


class Plain:
    """A picture of one colour."""

    name = "plain"

    def open(self):
        return Image.new("RGB", (72, 72), (200, 30, 30))


SHORT, LONG = "a cat", "two small cats on a large grey mat, one of them asleep"
ITEMS = {
    "text": Item(SHORT),
    "long text": Item(LONG),
    "image": Item(picture=Plain()),
    "both": Item(SHORT, Plain()),
    "long both": Item(LONG, Plain()),
}
ASKING = Prompt("asking", text=" what is it?", image="and this?", both=" is this it?")
PROMPTS = (PLAIN, PAPER, ONE_WORD, ASKING)
by_prompt = pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


def roles_and_ids(transformer, prompt, names):
    """(item's name, its role numbers and token ids without padding) of one batch."""
    set_readout(transformer, Readout(prompt))
    features = transformer.preprocess([ITEMS[name].load() for name in names])
    roles_nt = TokenRoles(transformer)(features)
    mask_nt = features["attention_mask"].bool()
    assert bool((roles_nt[~mask_nt] == ROLES.index("special")).all())
    for name, roles_t, ids_t, mask_t in zip(
        names, roles_nt, features["input_ids"], mask_nt, strict=True
    ):
        yield name, roles_t[mask_t], ids_t[mask_t]


def words(transformer, roles_t, ids_t, role):
    return transformer.tokenizer.decode(ids_t[roles_t == ROLES.index(role)])


@by_prompt
@pytest.mark.parametrize("together", [True, False])
def test_the_words_of_the_text_are_text(transformer, prompt, together):
    batches = [list(ITEMS)] if together else [[name] for name in ITEMS]
    for names in batches:
        for name, roles_t, ids_t in roles_and_ids(transformer, prompt, names):
            assert words(transformer, roles_t, ids_t, "text") == (ITEMS[name].text or ""), name


@by_prompt
def test_the_prompts_words_are_instruction(transformer, prompt):
    for name, roles_t, ids_t in roles_and_ids(transformer, prompt, list(ITEMS)):
        expected = getattr(prompt, ITEMS[name].kind)
        assert words(transformer, roles_t, ids_t, "instruction") == expected, name


@by_prompt
def test_image_placeholders_are_image_and_nothing_else_is(transformer, prompt):
    placeholder = transformer.tokenizer.convert_tokens_to_ids("<image>")
    for name, roles_t, ids_t in roles_and_ids(transformer, prompt, list(ITEMS)):
        image_t = roles_t == ROLES.index("image")
        assert torch.equal(image_t, ids_t == placeholder)
        has_picture = ITEMS[name].picture is not None
        assert int(image_t.sum()) == (N_IMAGE_TOKENS if has_picture else 0)


@by_prompt
def test_the_template_is_special(transformer, prompt):
    expected = "<|user|><|end|>" + prompt.generation_prompt * "<|assistant|>"
    for _, roles_t, ids_t in roles_and_ids(transformer, prompt, list(ITEMS)):
        assert words(transformer, roles_t, ids_t, "special") == expected


@pytest.mark.parametrize(
    "prompt",
    [Prompt("image only", image="what can be seen here?"), Prompt("text only", text=" again?")],
    ids=lambda prompt: prompt.name,
)
def test_prompts_for_one_kind_alone_are_instruction_there(transformer, prompt):
    for name, roles_t, ids_t in roles_and_ids(transformer, prompt, list(ITEMS)):
        expected = getattr(prompt, ITEMS[name].kind)
        assert words(transformer, roles_t, ids_t, "instruction") == expected, name
        assert words(transformer, roles_t, ids_t, "text") == (ITEMS[name].text or ""), name


def test_a_text_that_repeats_the_prompt_is_still_text(transformer):
    repeated = Item(f"{SHORT}{ASKING.text}")
    set_readout(transformer, Readout(ASKING))
    features = transformer.preprocess([repeated.load()])
    roles_t, ids_t = TokenRoles(transformer)(features)[0], features["input_ids"][0]
    assert words(transformer, roles_t, ids_t, "text") == repeated.text
    assert words(transformer, roles_t, ids_t, "instruction") == ASKING.text


def test_batches_hold_every_item_once_with_similar_items_together(transformer):
    set_readout(transformer, Readout(PLAIN))
    items = [*ITEMS.values(), *ITEMS.values()]
    batches = list(item_batches(transformer, items, batch_size=2))
    assert sorted(n for numbers, _ in batches for n in numbers) == list(range(len(items)))
    for numbers, features in batches:
        assert len(features["input_ids"]) == len(numbers)
        assert len({(items[n].kind, items[n].text) for n in numbers}) == 1


def test_rows_of_a_batch_belong_to_the_items_they_are_numbered_with(transformer):
    set_readout(transformer, Readout(PLAIN))
    items = list(ITEMS.values())
    for numbers, features in item_batches(transformer, items, batch_size=3):
        for number, ids_t in zip(numbers, features["input_ids"], strict=True):
            decoded = transformer.tokenizer.decode(ids_t)
            assert (items[number].text or "") in decoded
            assert ("<image>" in decoded) == (items[number].picture is not None)


RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("mask_nt", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
def test_the_mean_weighs_every_token_of_an_item_alike(mask_nt):
    expected_nt = mask_nt * torch.tensor([[1 / 3], [1 / 4], [1.0]])
    assert torch.allclose(pooling_weights(mask_nt, "mean"), expected_nt)


def test_the_last_token_with_padding_on_the_right():
    assert pooling_weights(RIGHT, "lasttoken").argmax(1).tolist() == [2, 3, 0]


def test_the_last_token_with_padding_on_the_left():
    assert pooling_weights(RIGHT.flip(1), "lasttoken").argmax(1).tolist() == [3, 3, 3]


@st.composite
def padded(draw):
    """(tokens, mask, lengths): items padded on either side, with garbage there."""
    width = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    mask_nt = torch.zeros(len(lengths), width, dtype=torch.long)
    for row_t, length in zip(mask_nt, lengths, strict=True):
        row_t[slice(width - length, None) if draw(st.booleans()) else slice(length)] = 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return torch.randn(len(lengths), width, 3, generator=generator), mask_nt


@QUICK
@given(padded())
def test_pooled_vectors_see_no_padding(batch):
    tokens_ntd, mask_nt = batch
    for pooling, expected in (("mean", lambda t: t.mean(0)), ("lasttoken", lambda t: t[-1])):
        pooled_nd = pool(tokens_ntd, pooling_weights(mask_nt, pooling))
        for found_d, token_td, mask_t in zip(pooled_nd, tokens_ntd, mask_nt, strict=True):
            assert torch.allclose(found_d, expected(token_td[mask_t.bool()]), atol=1e-6)
