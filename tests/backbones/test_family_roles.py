"""Token roles of every model family, against a decode of the ids."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from families import FAMILIES, parameter
from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, PLAIN, Prompt, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles, image_grids
from patch_retriever.items import Item

ASKING = Prompt("asking", text=" what is it?", both=" is this it?")
PROMPTS = (PLAIN, PAPER, ONE_WORD, ASKING)
by_prompt = pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)


class Plain:
    """A picture of one colour."""

    def __init__(self, width: int, height: int, colour: str) -> None:
        self.name = f"{width} x {height} {colour}"
        self.size, self.colour = (width, height), colour

    def open(self):
        return Image.new("RGB", self.size, self.colour)


SQUARE, TALL, WIDE = Plain(60, 60, "red"), Plain(40, 120, "blue"), Plain(90, 60, "green")
LONG = "two small dogs on a mat, asleep"
ITEMS = [
    Item("a cat"),
    Item(LONG),
    Item(picture=SQUARE),
    Item(picture=TALL),
    Item(None, TALL, (WIDE,)),
    Item("a cat", TALL),
    Item(LONG, SQUARE),
    Item("a cat", SQUARE, (TALL, WIDE)),
]


@pytest.fixture(scope="module", params=map(parameter, FAMILIES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def transformer(stand_in, name):
    return load_backbone(str(stand_in(name)))


def words_by_role(transformer, items, prompt=None):
    """For every item the text of its tokens of a role, `words(role)`."""
    features = transformer.preprocess([item.load() for item in items], prompt)
    roles_nt = TokenRoles(transformer, prompt)(features)
    image = image_token_id(transformer.config)
    assert torch.equal(roles_nt == ROLES.index("image"), features["input_ids"] == image)
    assert bool((roles_nt[features["attention_mask"] == 0] == ROLES.index("special")).all())
    for ids_t, roles_t in zip(features["input_ids"], roles_nt, strict=True):

        def words(role, ids_t=ids_t, roles_t=roles_t):
            return transformer.tokenizer.decode(ids_t[roles_t == ROLES.index(role)]).strip()

        yield words


@by_prompt
@pytest.mark.parametrize("together", [True, False])
def test_roles_are_those_of_the_decoded_ids(transformer, prompt, together):
    set_readout(transformer, Readout(prompt))
    for items in [ITEMS] if together else [[item] for item in ITEMS]:
        for item, words in zip(items, words_by_role(transformer, items), strict=True):
            assert words("text") == (item.text or "")
            assert words("instruction") == getattr(prompt, item.kind).strip()
            assert bool(words("image")) == bool(item.pictures)


@pytest.mark.parametrize("prompt", [PAPER, ONE_WORD], ids=lambda prompt: prompt.name)
def test_a_prompt_given_at_encoding_is_the_instruction(transformer, prompt):
    set_readout(transformer, Readout(prompt))
    asked = "which cat is it"
    for item, words in zip(ITEMS, words_by_role(transformer, ITEMS, asked), strict=True):
        assert words("text") == (item.text or "")
        assert words("instruction") == asked


def test_a_system_message_is_instruction_beside_the_readouts(name, transformer):
    both = Prompt("both", text=" what is it?", both=" is it?", instruction="system")
    set_readout(transformer, Readout(both))
    for item, words in zip(ITEMS, words_by_role(transformer, ITEMS, "be brief"), strict=True):
        assert words("text") == (item.text or "")
        said = words("instruction")
        assert said.startswith("be brief"), name
        assert said.removeprefix("be brief").strip() == getattr(both, item.kind).strip()


def test_the_turn_of_an_answer_is_the_templates(stand_in):
    transformer = load_backbone(str(stand_in("llava")))  # it opens one without a special token
    set_readout(transformer, Readout(ONE_WORD))
    for words in words_by_role(transformer, ITEMS):
        assert words("special").replace("<pad>", "").endswith("ASSISTANT:")


def test_the_text_is_text_whatever_it_says(transformer):
    set_readout(transformer, Readout(ASKING))
    (words,) = words_by_role(transformer, [Item("a cat what is it?")])
    assert words("text") == "a cat what is it?"
    assert words("instruction") == "what is it?"


GRIDS = {
    "llava": (3, 3),
    "llava-next": None,
    "gemma3": (2, 2),
    "paligemma2": (3, 3),
    "chameleon": (2, 2),
    "idefics3": None,
    "smolvlm": None,
    "llava-onevision": None,
    "internvl": None,
    "qwen2-vl": (4, 1),
    "qwen2.5-vl": (4, 1),
    "qwen3-vl": (4, 1),
}
"""Rows and columns of the tall picture's tokens; None where they are not one grid."""


def test_grids_of_image_tokens(name, transformer):
    set_readout(transformer, Readout(PLAIN))
    items = [Item(picture=TALL), Item("a cat"), Item(None, WIDE, (SQUARE,)), Item(picture=TALL)]
    features = transformer.preprocess([item.load() for item in items])
    n, _, two, _ = (features["input_ids"] == image_token_id(transformer.config)).sum(1).tolist()
    grid = GRIDS[name] or (1, n)
    assert image_grids(transformer.config, features) == [grid, None, (1, two), grid]
