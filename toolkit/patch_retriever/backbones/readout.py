"""Readouts: how a backbone turns an item into a vector before any patch.

A readout is a prompt, a generation prompt or none, where the decoder ends, a site, a pooling and
perhaps a token limit. The
prompt is written into the processor's chat template, after the item in the user's turn, so that an
exported model reads items the same way with plain sentence-transformers. Its `prompt=` and
`prompt_name=` become a system message, which reads much worse: the template writes it after the
item too, in place of the readout's own prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

PoolingMode = Literal["mean", "lasttoken", "mean+lasttoken"]
"""`mean+lasttoken` puts both beside each other in one vector, twice as wide."""
POOLINGS: tuple[PoolingMode, ...] = get_args(PoolingMode)
_POOLING_NAMES = {
    "mean": "mean",
    "lasttoken": "last token",
    "mean+lasttoken": "mean and last token",
}
LAST = "last_hidden_state"
BEFORE_MLP = ".attention"
"""How the site before a layer's MLP ends."""


def layer_number(site: str) -> int:
    """N of `layers.N`.

    Raises:
        ValueError: it is another site.
    """
    if not re.fullmatch(r"layers\.\d+", site):
        raise ValueError(f"{site!r} is no layer (layers.N)")
    return int(site.removeprefix("layers."))


@dataclass(frozen=True)
class Room:
    """How much a token limit leaves beside a picture.

    A template cannot count tokens. It counts the bytes of UTF-8: a token is one at least.
    """

    text: int
    """Tokens that are left beside the template and one picture."""
    picture: int
    """Tokens that every further picture takes."""
    prompt: int
    """Tokens of the readout's own prompt; of another the bytes are counted, too."""


@dataclass(frozen=True)
class Prompt:
    """What follows an item in the user's turn, by what the item holds."""

    name: str = "own"
    text: str = ""
    image: str = ""
    both: str = ""
    generation_prompt: bool = False
    """Whether the assistant's turn is opened, so that the last token is where an answer begins."""
    instruction: Literal["user", "system"] = "user"
    """Where a prompt given at encoding goes: after the item, in place of this one, or into a system
    message before the item, with this one after it."""
    system: str = ""
    """What a system message before the item says, where the model's template has such messages."""

    def wrap(
        self, chat_template: str, room: Room | None = None, placeholders: Sequence[str] = ()
    ) -> str:
        """`chat_template` with this prompt added to every user turn, in place of any other's.

        Tokens that stand for a picture (`placeholders`) are said as text where a text has them.

        The wrapper also puts images before texts, so that the order of keys in
        `{"image": ..., "text": ...}` does not change the embedding. With `room` it cuts the text of
        an item with pictures, so that no token limit cuts its pictures or its prompt.
        """
        values = {
            **asdict(self),
            "takes": self.instruction == "user",
            "room": room and room.text,
            "picture": room and room.picture,
            "own": room and room.prompt,
        }

        def literal(match: re.Match[str]) -> str:
            return json.dumps(values[match[1]], ensure_ascii=False)

        as_text = "".join(
            f" | replace({json.dumps(token)}, {json.dumps(f'{token[0]} {token[1:]}')})"
            for token in placeholders
        )
        parts = _WRAPPER.replace("@as_text@", as_text).partition(_CUT)
        wrapper = "".join(parts if room else parts[::2])
        wrapper += _SYSTEM if self.system else ""
        head = re.sub("@(text|image|both|takes|room|picture|own|system)@", literal, wrapper)
        if self.generation_prompt:
            head += "{%- set add_generation_prompt = true -%}"
        return head + _END + own_template(chat_template)


_CUT = """\
{%- if media -%}
{%- set said = readout.system if own else readout.system ~ prompt -%}
{%- set taken = said.encode('utf-8') | length + (@own@ if own else 0) -%}
{%- set room = @room@ - (media | length - 1) * @picture@ - taken -%}
{%- set text = text.encode('utf-8')[:[room, 0] | max].decode('utf-8', 'ignore') -%}
{%- endif -%}
"""
_WRAPPER = (
    """\
{%- set readout = namespace(messages=[], asked=none, system='') -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set texts = [content] if content is string else
    content | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
{%- set text = texts | join('\\n')@as_text@ -%}
{%- if message['role'] == 'system' and @takes@ -%}
{%- set readout.asked = text -%}
{%- elif message['role'] == 'user' -%}
{%- set media = [] if content is string else
    content | rejectattr('type', 'equalto', 'text') | list -%}
{%- set prompt = @both@ if media and texts else @image@ if media else @text@ -%}
{%- set own = readout.asked is none and readout_prompt is not defined -%}
{%- if readout.asked is not none -%}
{%- set prompt = ('\\n' if text and readout.asked[:1].strip() else '') ~ readout.asked -%}
{%- endif -%}
{%- if readout_prompt is defined -%}{%- set prompt = readout_prompt -%}{%- endif -%}
"""
    + _CUT
    + """\
{%- set text = text ~ prompt -%}
{%- set content = media + ([{'type': 'text', 'text': text}] if text else []) -%}
{%- set readout.messages = readout.messages + [{'role': 'user', 'content': content}] -%}
{%- else -%}
{%- set readout.system = readout.system ~ text -%}
{%- set readout.messages = readout.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = readout.messages -%}
"""
)
_SYSTEM = """\
{%- set said = [{'role': 'system', 'content': [{'type': 'text', 'text': @system@}]}] -%}
{%- set messages = said + readout.messages -%}
"""
_END = "{#- end of the readout -#}"
PROMPT_VARIABLE = "readout_prompt"
"""The template's variable that takes the place of any prompt after an item."""


def own_template(chat_template: str) -> str:
    """The model's own chat template, without any readout that was written into it."""
    return chat_template.rpartition(_END)[2]


def has_readout(chat_template: str) -> bool:
    """Whether a readout was written into a chat template."""
    return _END in chat_template


PLAIN = Prompt("plain")
PAPER = Prompt(
    "paper",
    text="\nSummarize the above sentence in one word: ",
    image="\nSummarize the above image in one word: ",
    both="\nSummarize the above image and sentence in one word: ",
)
"""The paper's prompts (its released code: no generation prompt, mean over all tokens)."""
ONE_WORD = Prompt(
    "one-word",
    text="\ndescribe the sentence in one word.",
    image="describe the image in one word.",
    both="\ndescribe the image and sentence in one word.",
    generation_prompt=True,
)
"""In the manner of E5-V (arXiv 2407.12580), with the assistant's turn opened."""
E5V = Prompt(
    "e5v",
    text="\nSummary above sentence in one word: ",
    image="\nSummary above image in one word: ",
    both="\nSummary above image and sentence in one word: ",
    generation_prompt=True,
)
"""E5-V's own for texts and for images (arXiv 2407.12580, the model's card), for both in their
manner."""
SYSTEM = Prompt(
    "system",
    text="\nRepresent the given text in one word: ",
    image="\nRepresent the given image in one word: ",
    both="\nRepresent the given image and text in one word: ",
    generation_prompt=True,
    system="Given an image, summarize the provided image in one word. "
    "Given only text, describe the text in one word.",
)
"""On two levels, a system message and the user's turn, in the manner of arXiv 2508.00955."""
PROMPTS = {prompt.name: prompt for prompt in (PLAIN, PAPER, ONE_WORD, E5V, SYSTEM)}
"""All that have a name."""
TRIED = (PLAIN, PAPER, ONE_WORD)
"""Those that `build` tries on validation."""

_PAPER_BOTH = {
    "it->t query": "\nSummarize above image and sentence in one word: ",
    "t->it document": "\nSummarize above image and sentence in one word: ",
    "it->i query": "\nSummarize the above image with the question in one word: ",
    "it->it query": "\nSummarize the above image and the sentence in one word: ",
    "it->it document": "\nSummarize the above image and the sentence in one word: ",
}
_DIRECTIONS = ("t->i", "t->t", "t->it", "i->t", "i->i", "it->t", "it->i", "it->it")
PAPER_PROMPTS = {
    name: _PAPER_BOTH.get(name) or (PAPER.image if holds == "i" else PAPER.text)
    for direction in _DIRECTIONS
    for role, holds in zip(("query", "document"), direction.split("->"), strict=True)
    for name in [f"{direction} {role}"]
}
"""The paper's prompt for either side of every direction (its released code, dataset/*.py): for
`prompt_name=` of a model with the paper's readout."""


@dataclass(frozen=True)
class Readout:
    """Prompt, site, pooling, token limit and end of the decoder. `site` is `last_hidden_state` or
    `layers.N`."""

    prompt: Prompt
    site: str = LAST
    pooling: PoolingMode = "mean"
    max_tokens: int | None = None
    """The longest input in tokens; None for the model's own limit."""
    cut: str | None = None
    """Where the decoder ends: after a layer (`layers.N`), or before that layer's MLP
    (`layers.N.attention`; FreeRet, arXiv 2509.24621, leaves the last one out). The final norm
    follows. None for the whole decoder."""

    @property
    def name(self) -> str:
        """For tables: prompt, pooling and site."""
        site = "last layer" if self.site == LAST else self.site
        if self.cut is not None and self.site == LAST:
            site = f"the decoder cut at {self.cut}"
        return f"{self.prompt.name} prompt, {_POOLING_NAMES[self.pooling]} of {site}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by name that `encode(..., prompt_name=)` offers beside the readout's own."""
        return dict(PAPER_PROMPTS) if self.prompt == PAPER else {}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Readout:
        """The inverse of `to_json`."""
        return cls(**{**values, "prompt": Prompt(**values["prompt"])})


PAPER_READOUT = Readout(PAPER)
"""The paper's: its prompts, mean over all tokens of the last layer."""


def readout_grid(
    n_layers: int,
    prompts: Sequence[Prompt] = TRIED,
    poolings: Sequence[PoolingMode] = POOLINGS,
    max_tokens: int | None = None,
    after: str | None = None,
    skip_mlp: bool = True,
) -> Iterator[Readout]:
    """The readouts that `build` tries on validation: those after a site (`layers.N`), if one is
    patched.

    Every prompt with every pooling of the whole decoder, of the decoder without its last MLP (if
    `skip_mlp`: not all families can), without its last layer, and of its first half. One forward
    pass per prompt serves them all.
    """
    patched = -1 if after is None else layer_number(after)
    numbers = sorted({n_layers - 2, n_layers // 2 - 1})
    cuts: list[str | None] = [None, *(f"layers.{i}" for i in numbers if i > patched)]
    if skip_mlp and n_layers - 1 > patched:
        cuts.append(f"layers.{n_layers - 1}{BEFORE_MLP}")
    for prompt in prompts:
        for cut in cuts:
            for pooling in poolings:
                yield Readout(prompt, LAST, pooling, max_tokens, cut)
