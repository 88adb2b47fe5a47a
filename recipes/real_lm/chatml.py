"""ChatML: the template of the language model with images in it, and dialogues as token ids."""

from __future__ import annotations

from typing import Any

from tiny_mllm.conversations import IGNORED, Conversation, Dialogue, Encoder

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""SmolLM2's own, with images before the text of a turn, and without the system turn of 21 tokens
that it writes where a chat has none."""


class ChatMLEncoder(Encoder):
    """Dialogues to token ids, as the chat template writes them."""

    def __init__(self, tokenizer: Any, n_image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        self.image = [tokenizer.convert_tokens_to_ids("<image>")] * n_image_tokens
        self._user = self._ids("<|im_start|>user\n")
        self._assistant = self._ids("<|im_end|>\n<|im_start|>assistant\n")
        self._end = self._ids("<|im_end|>")
        self._between = self._ids("\n")

    def encode(self, dialogue: Dialogue) -> Conversation:
        """Ids and labels; only the assistant's answers, with their end, count."""
        ids: list[int] = []
        labels: list[int] = []
        for turn, (asked, answer) in enumerate(dialogue.turns):
            image = self.image if dialogue.with_image and turn == 0 else []
            between = self._between if turn else []
            given = [*between, *self._user, *image, *self._ids(asked), *self._assistant]
            answered = [*self._ids(answer), *self._end]
            ids += [*given, *answered]
            labels += [*[IGNORED] * len(given), *answered]
        return Conversation(ids, labels, dialogue.with_image)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
