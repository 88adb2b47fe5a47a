"""Texts that can be embedded."""

from __future__ import annotations

import unicodedata

_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Unicode's categories of what leaves no mark; what has none yet may leave one."""


def text_fault(text: str) -> str | None:
    """What keeps a text from being embedded, as an error says it; None if nothing does."""
    if not shows(text):
        return "a text of nothing that shows"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "a text with half of a surrogate pair, which is no Unicode"
    if "\0" in text:
        return "a text with a null character"
    return None


def shows(text: str) -> bool:
    """Whether anything of it is seen: not only spaces, controls and characters of no width."""
    return any(unicodedata.category(letter) not in _UNSEEN for letter in text)
