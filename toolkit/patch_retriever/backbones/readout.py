"""Readouts: how a backbone turns an item into a vector before any patch.

A readout is a prompt, a generation prompt or none, a site and a pooling. The prompt is written
into the processor's chat template, after the item in the user's turn, so that an exported model
reads items the same way with plain sentence-transformers (whose own prompts become system turns,
which read much worse).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

PoolingMode = Literal["mean", "lasttoken"]
LAST = "last_hidden_state"


@dataclass(frozen=True)
class Prompt:
    """What follows an item in the user's turn, by what the item holds."""

    name: str
    text: str = ""
    image: str = ""
    both: str = ""
    generation_prompt: bool = False
    """Whether the assistant's turn is opened, so that the last token is where an answer begins."""

    def wrap(self, chat_template: str) -> str:
        """`chat_template` with this prompt added to every user turn, in place of any other's.

        The wrapper also puts images before texts, so that the order of keys in
        `{"image": ..., "text": ...}` does not change the embedding.
        """

        def literal(match: re.Match[str]) -> str:
            return json.dumps(getattr(self, match[1]), ensure_ascii=False)

        head = re.sub("@(text|image|both)@", literal, _WRAPPER)
        if self.generation_prompt:
            head += "{%- set add_generation_prompt = true -%}"
        return head + _END + own_template(chat_template)


_WRAPPER = """\
{%- set readout = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set found = namespace(media=[], texts=[]) -%}
{%- if message['content'] is string -%}
{%- set found.texts = [message['content']] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set found.texts = found.texts + [part['text']] -%}
{%- else -%}{%- set found.media = found.media + [part] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if found.media and found.texts -%}{%- set prompt = @both@ -%}
{%- elif found.media -%}{%- set prompt = @image@ -%}
{%- else -%}{%- set prompt = @text@ -%}{%- endif -%}
{%- set text = {'type': 'text', 'text': found.texts | join('\\n') ~ prompt} -%}
{%- set content = found.media + ([text] if text['text'] else []) -%}
{%- set readout.messages = readout.messages + [{'role': 'user', 'content': content}] -%}
{%- else -%}{%- set readout.messages = readout.messages + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = readout.messages -%}
"""
_END = "{#- end of the readout -#}"


def own_template(chat_template: str) -> str:
    """The model's own chat template, without any readout that was written into it."""
    return chat_template.rpartition(_END)[2]


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
PROMPTS = {prompt.name: prompt for prompt in (PLAIN, PAPER, ONE_WORD)}


@dataclass(frozen=True)
class Readout:
    """Prompt, site and pooling. `site` is `last_hidden_state` or `layers.N`."""

    prompt: Prompt
    site: str = LAST
    pooling: PoolingMode = "mean"

    @property
    def name(self) -> str:
        """For tables: prompt, pooling and site."""
        pooling = "mean" if self.pooling == "mean" else "last token"
        site = "last layer" if self.site == LAST else self.site
        return f"{self.prompt.name} prompt, {pooling} of {site}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Readout:
        """The inverse of `to_json`."""
        return cls(Prompt(**values["prompt"]), values["site"], values["pooling"])


PAPER_READOUT = Readout(PAPER)
"""The paper's: its prompts, mean over all tokens of the last layer."""


def readout_grid(n_layers: int, after: str | None = None) -> Iterator[Readout]:
    """The readouts that `build` tries on validation: those after a site (`layers.N`), if one is
    patched.

    Every prompt with the mean and the last token, at the last layer, the one before and the
    middle one. One forward pass per prompt serves them all.
    """
    patched = -1 if after is None else int(after.removeprefix("layers."))
    numbers = sorted({n_layers - 2, n_layers // 2 - 1})
    sites = [LAST, *(f"layers.{i}" for i in numbers if i > patched)]
    for prompt in PROMPTS.values():
        for site in sites:
            for pooling in ("mean", "lasttoken"):
                yield Readout(prompt, site, pooling)
