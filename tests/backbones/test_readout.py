"""Readouts: what a wrapped chat template renders, and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from patch_retriever.backbones.readout import (
    LAST,
    ONE_WORD,
    PAPER,
    PAPER_READOUT,
    PLAIN,
    PROMPTS,
    Prompt,
    Readout,
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
IMAGE = {"type": "image", "image": "a picture"}


def render(prompt, *messages, template=CHAT_TEMPLATE, **options):
    wrapped = prompt.wrap(template)
    rendered, _ = render_jinja_template([list(messages)], chat_template=wrapped, **options)
    return rendered[0]


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": list(content)}


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


def test_a_system_message_is_left_as_it_is():
    system = {"role": "system", "content": "be brief"}
    rendered = render(ASKING, system, user(text("a cat")))
    assert rendered == "<|system|>be brief<|end|><|user|>a cat [text?]<|end|>"


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


@pytest.mark.parametrize("name", PROMPTS)
def test_wrapping_again_puts_one_prompt_in_place_of_another(name):
    prompt = PROMPTS[name]
    assert prompt.wrap(ASKING.wrap(CHAT_TEMPLATE)) == prompt.wrap(CHAT_TEMPLATE)
    assert prompt.wrap(prompt.wrap(CHAT_TEMPLATE)) == prompt.wrap(CHAT_TEMPLATE)


@pytest.mark.parametrize("readout", [*readout_grid(5), Readout(ASKING, "layers.0", "lasttoken")])
def test_readouts_survive_json(readout):
    assert Readout.from_json(json.loads(json.dumps(readout.to_json()))) == readout


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 28])
def test_the_grid_holds_every_prompt_with_both_poolings_and_layers_that_exist(layers):
    grid = list(readout_grid(layers))
    assert PAPER_READOUT in grid
    assert len({readout.name for readout in grid}) == len(grid)
    for name in PROMPTS:
        poolings = {r.pooling for r in grid if r.prompt.name == name and r.site == LAST}
        assert poolings == {"mean", "lasttoken"}
    numbers = [int(r.site.removeprefix("layers.")) for r in grid if r.site != LAST]
    assert all(0 <= number < layers - 1 for number in numbers)
