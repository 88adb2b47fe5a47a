"""The role of every token of a batch."""

from __future__ import annotations

import pytest
import torch

from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, PLAIN, Prompt, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.items import Item
from pictured import ITEMS, SHORT

N_IMAGE_TOKENS = 36


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
