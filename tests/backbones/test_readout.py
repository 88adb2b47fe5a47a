"""Readouts: what a wrapped chat template renders, and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from patch_retriever.backbones.readout import (
    LAST,
    ONE_WORD,
    PAPER,
    PAPER_PROMPTS,
    PAPER_READOUT,
    PLAIN,
    PROMPT_VARIABLE,
    PROMPTS,
    TRIED,
    Prompt,
    Readout,
    Room,
    has_readout,
    layer_number,
    own_template,
    readout_grid,
)
from tiny_mllm.architecture import CHAT_TEMPLATE

QUICK = settings(
    deadline=None,
    database=None,
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],  # every example compiles a template
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # no lone surrogates
ASKING = Prompt("asking", text=" [text?]", image="[image?]", both=" [both?]")
SYSTEM = replace(ASKING, instruction="system")
IMAGE = {"type": "image", "image": "a picture"}


def render(prompt, *messages, template=CHAT_TEMPLATE, **options):
    wrapped = prompt.wrap(template)
    rendered, _ = render_jinja_template([list(messages)], chat_template=wrapped, **options)
    return rendered[0]


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": list(content)}


ITEMS = ([text("a cat")], [IMAGE], [IMAGE, text("a cat")])


def test_text_is_followed_by_the_prompt_for_texts():
    assert render(ASKING, user(text("a cat"))) == "<|user|>a cat [text?]<|end|>"


def test_an_image_is_followed_by_the_prompt_for_images():
    assert render(ASKING, user(IMAGE)) == "<|user|><image>[image?]<|end|>"


def test_image_and_text_are_followed_by_the_prompt_for_both():
    assert render(ASKING, user(IMAGE, text("a cat"))) == "<|user|><image>a cat [both?]<|end|>"


def test_the_order_of_text_and_image_does_not_matter():
    first, second = user(text("a cat"), IMAGE), user(IMAGE, text("a cat"))
    template = "{{ messages }}"  # one that shows the order, as most templates keep it
    assert render(ASKING, first) == render(ASKING, second)
    assert render(ASKING, first, template=template) == render(ASKING, second, template=template)


def test_a_string_as_content_is_a_text():
    message = {"role": "user", "content": "a cat"}
    assert render(ASKING, message) == render(ASKING, user(text("a cat")))


def test_several_texts_become_one_with_the_prompt_at_the_end():
    rendered = render(ASKING, user(text("a cat"), IMAGE, text("a dog")))
    assert rendered == "<|user|><image>a cat\na dog [both?]<|end|>"


def test_several_images_stay_several():
    assert render(ASKING, user(IMAGE, IMAGE)) == "<|user|><image><image>[image?]<|end|>"


def system(content):
    return {"role": "system", "content": content}


@pytest.mark.parametrize("content", ["be brief", [text("be brief")], [text("be"), text("brief")]])
def test_a_system_message_takes_the_place_of_the_prompt(content):
    said = "be brief" if len(content) != 2 else "be\nbrief"
    rendered = [render(ASKING, system(content), user(*c)) for c in ITEMS]
    assert rendered == [
        f"<|user|>a cat\n{said}<|end|>",
        f"<|user|><image>{said}<|end|>",
        f"<|user|><image>a cat\n{said}<|end|>",
    ]


@pytest.mark.parametrize("said", ["\nbe brief", " be brief"])
def test_a_system_message_that_begins_with_space_is_not_moved_further(said):
    assert render(ASKING, system(said), user(text("a cat"))) == f"<|user|>a cat{said}<|end|>"


def test_an_empty_system_message_takes_the_prompt_away():
    assert render(ASKING, system(""), user(text("a cat"))) == "<|user|>a cat<|end|>"


@pytest.mark.parametrize("content", ["be brief", [text("be brief")]])
def test_a_system_message_may_stay_one_beside_the_prompt(content):
    rendered = render(SYSTEM, system(content), user(text("a cat")))
    assert rendered == "<|system|>be brief<|end|><|user|>a cat [text?]<|end|>"


def test_a_prompt_may_have_a_system_message_of_its_own():
    levels = replace(ASKING, system="sort")
    assert [render(levels, user(*c)) for c in ITEMS] == [
        f"<|system|>sort<|end|>{render(ASKING, user(*c))}" for c in ITEMS
    ]
    both = render(replace(SYSTEM, system="sort"), system("be brief"), user(text("a cat")))
    assert both == ("<|system|>sort<|end|><|system|>be brief<|end|><|user|>a cat [text?]<|end|>")


def test_a_variable_takes_the_place_of_any_prompt_after_an_item():
    for prompt in (ASKING, SYSTEM):
        rendered = render(prompt, user(text("a cat")), **{PROMPT_VARIABLE: "[other]"})
        assert rendered == "<|user|>a cat[other]<|end|>"
        assert render(prompt, user(text("a cat")), **{PROMPT_VARIABLE: ""}) == (
            "<|user|>a cat<|end|>"
        )
    rendered = render(ASKING, system("be brief"), user(IMAGE), **{PROMPT_VARIABLE: "[other]"})
    assert rendered == "<|user|><image>[other]<|end|>"


LIMITED = Room(text=30, picture=10, prompt=6)


def limited(prompt, *messages):
    wrapped = prompt.wrap(CHAT_TEMPLATE, LIMITED)
    rendered, _ = render_jinja_template([list(messages)], chat_template=wrapped)
    return rendered[0]


@pytest.mark.parametrize(
    ("pictures", "asked", "kept"),
    [(1, "", 24), (2, "", 14), (3, "", 4), (4, "", 0), (9, "", 0), (1, "\nin red", 23)],
)
def test_in_the_room_beside_pictures_the_text_is_cut_and_the_prompt_is_not(pictures, asked, kept):
    content = [*(pictures * [IMAGE]), text("0123456789" * 9)]
    before = [system(asked)] if asked else []
    expected = ("0123456789" * 9)[:kept] + (asked or " [both?]")
    assert limited(ASKING, *before, user(*content)) == (
        f"<|user|>{pictures * '<image>'}{expected}<|end|>"
    )


def test_a_text_without_pictures_is_left_to_the_tokenizer():
    assert limited(ASKING, user(text("x" * 99))) == f"<|user|>{'x' * 99} [text?]<|end|>"


def test_a_system_message_takes_room_too():
    rendered = limited(SYSTEM, system("be brief"), user(IMAGE, text("x" * 99)))
    assert rendered == (
        f"<|system|>be brief<|end|><|user|><image>{(30 - 6 - 8) * 'x'} [both?]<|end|>"
    )


@QUICK
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_text_is_cut_between_letters(value):
    rendered = limited(ASKING, user(IMAGE, text(value)))
    kept = rendered.removeprefix("<|user|><image>").removesuffix(" [both?]<|end|>")
    assert value.startswith(kept)
    assert len(kept.encode()) <= 24
    assert kept == value or len(value[: len(kept) + 1].encode()) > 24


def test_every_user_turn_gets_the_prompt_and_no_answer_does():
    answer = {"role": "assistant", "content": [text("yes")]}
    rendered = render(ASKING, user(text("a")), answer, user(IMAGE))
    assert rendered == (
        "<|user|>a [text?]<|end|><|assistant|>yes<|end|><|user|><image>[image?]<|end|>"
    )


def test_an_empty_text_still_gets_its_prompt():
    assert render(ASKING, user(text(""))) == "<|user|> [text?]<|end|>"


@pytest.mark.parametrize("content", [[text("a cat")], [IMAGE], [IMAGE, text("a cat")]])
def test_the_plain_prompt_renders_what_the_template_alone_does(content):
    alone, _ = render_jinja_template([[user(*content)]], chat_template=CHAT_TEMPLATE)
    assert render(PLAIN, user(*content)) == alone[0]


def test_the_papers_prompts():
    assert render(PAPER, user(IMAGE)) == (
        "<|user|><image>\nSummarize the above image in one word: <|end|>"
    )
    assert render(PAPER, user(text("a cat"))) == (
        "<|user|>a cat\nSummarize the above sentence in one word: <|end|>"
    )
    assert render(PAPER, user(IMAGE, text("a cat"))) == (
        "<|user|><image>a cat\nSummarize the above image and sentence in one word: <|end|>"
    )


def test_a_generation_prompt_opens_the_assistants_turn():
    assert render(ONE_WORD, user(text("a cat"))).endswith("in one word.<|end|><|assistant|>")
    assert "<|assistant|>" not in render(PAPER, user(text("a cat")))


def test_a_caller_may_still_ask_for_a_generation_prompt():
    rendered = render(ASKING, user(text("a cat")), add_generation_prompt=True)
    assert rendered == "<|user|>a cat [text?]<|end|><|assistant|>"


@QUICK
@given(TEXTS, TEXTS, TEXTS, st.booleans())
def test_any_prompt_renders_as_it_is_written(of_text, of_image, of_both, generation_prompt):
    prompt = Prompt("made", of_text, of_image, of_both, generation_prompt)
    end = "<|end|>" + generation_prompt * "<|assistant|>"
    assert render(prompt, user(text("a"))) == f"<|user|>a{of_text}{end}"
    assert render(prompt, user(IMAGE)) == f"<|user|><image>{of_image}{end}"
    assert render(prompt, user(IMAGE, text("a"))) == f"<|user|><image>a{of_both}{end}"


@pytest.mark.parametrize(
    "written", ["@image@", 'say "it"', "{{ x }}", "{% x %}", "a\\nb", "ein Wörtchen 🙂"]
)
def test_prompts_with_signs_that_mean_something_elsewhere(written):
    prompt = Prompt("made", text=written, image="[image?]")
    assert render(prompt, user(text("a "))) == f"<|user|>a {written}<|end|>"


@QUICK
@given(TEXTS)
def test_any_text_of_an_item_is_kept_as_it_is(value):
    assert render(ASKING, user(text(value))) == f"<|user|>{value} [text?]<|end|>"


@QUICK
@given(TEXTS, TEXTS, st.booleans(), TEXTS)
def test_the_models_own_template_comes_back(of_text, of_both, generation_prompt, template):
    prompt = Prompt("made", text=of_text, both=of_both, generation_prompt=generation_prompt)
    assert own_template(prompt.wrap(template)) == template


def test_a_template_without_a_readout_is_its_own():
    assert own_template(CHAT_TEMPLATE) == CHAT_TEMPLATE
    assert not has_readout(CHAT_TEMPLATE)
    assert has_readout(PLAIN.wrap(CHAT_TEMPLATE))
    assert own_template(ASKING.wrap(CHAT_TEMPLATE, LIMITED)) == CHAT_TEMPLATE


def test_readouts_of_older_patches_are_read():
    about = {"name": "paper", "text": "t", "image": "i", "both": "b", "generation_prompt": False}
    values = {"prompt": about, "site": LAST, "pooling": "mean"}
    assert Readout.from_json(values) == Readout(Prompt("paper", "t", "i", "b"))


def test_the_papers_prompts_per_direction():
    """Those of the released code, direction by direction."""
    assert len(PAPER_PROMPTS) == 16
    text, image = PAPER.text, PAPER.image
    both = {
        "t->it document": "\nSummarize above image and sentence in one word: ",
        "it->t query": "\nSummarize above image and sentence in one word: ",
        "it->i query": "\nSummarize the above image with the question in one word: ",
        "it->it query": "\nSummarize the above image and the sentence in one word: ",
        "it->it document": "\nSummarize the above image and the sentence in one word: ",
    }
    texts = ("t->i query", "t->t query", "t->t document", "t->it query", "i->t document")
    assert {name: PAPER_PROMPTS[name] for name in both} == both
    assert {PAPER_PROMPTS[name] for name in (*texts, "it->t document")} == {text}
    images = {name for name, said in PAPER_PROMPTS.items() if said == image}
    assert images == {
        *("t->i document", "i->t query", "i->i query", "i->i document", "it->i document")
    }


def test_only_the_papers_readout_offers_its_prompts():
    assert PAPER_READOUT.prompts == PAPER_PROMPTS
    assert Readout(PAPER, "layers.1", "lasttoken").prompts == PAPER_PROMPTS
    assert Readout(ONE_WORD).prompts == Readout(ASKING).prompts == {}


@pytest.mark.parametrize("name", PROMPTS)
def test_wrapping_again_puts_one_prompt_in_place_of_another(name):
    prompt = PROMPTS[name]
    assert prompt.wrap(ASKING.wrap(CHAT_TEMPLATE)) == prompt.wrap(CHAT_TEMPLATE)
    assert prompt.wrap(prompt.wrap(CHAT_TEMPLATE)) == prompt.wrap(CHAT_TEMPLATE)


@pytest.mark.parametrize(
    "readout", [*readout_grid(5), Readout(SYSTEM, "layers.0", "lasttoken", max_tokens=99)]
)
def test_readouts_survive_json(readout):
    assert Readout.from_json(json.loads(json.dumps(readout.to_json()))) == readout


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 28])
def test_the_grid_holds_every_prompt_with_every_pooling_and_layers_that_exist(layers):
    grid = list(readout_grid(layers))
    assert PAPER_READOUT in grid
    assert len({readout.name for readout in grid}) == len(grid)
    for prompt in TRIED:
        for cut in {r.cut for r in grid}:
            poolings = {r.pooling for r in grid if r.prompt == prompt and r.cut == cut}
            assert poolings == {"mean", "lasttoken", "mean+lasttoken"}
    assert {r.site for r in grid} == {LAST}
    cuts = {r.cut for r in grid} - {None, f"layers.{layers - 1}.attention"}
    assert all(0 <= layer_number(cut) < layers - 1 for cut in cuts)
