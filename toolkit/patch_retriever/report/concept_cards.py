"""Concept cards: a few concepts worth a look, each with what it fires on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from patch_retriever.backbones.roles import ROLES
from patch_retriever.concepts.query import words
from patch_retriever.concepts.selection import TEXT_DOMINANT
from patch_retriever.heat import TokenHeat, token_heat
from patch_retriever.items import Item
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.contributions import strengths
from patch_retriever.report.pictures import Shown, heat_overlay, show
from patch_retriever.retrieval.collection import Collection

if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers.base.modules import Transformer

    from patch_retriever.backbones.readout import Readout
    from patch_retriever.sae.model import SparseAutoencoder

MOST = 24
"""Cards at most."""
TOP = 4
"""Pictures and texts on a card."""
PIECES = 80
"""Words shown of a text at most."""
SCORES = {
    "energy": "energy",
    "frequency": "share of items",
    "modality": "modality (1 text, 0 image)",
    "bridge": "bridge",
    "attribution": "attribution",
    "discriminative": "discriminative attribution, raw codes",
    "discriminative_centred": "discriminative attribution, centred",
}
"""Columns of the concept table that a card shows, with what it calls them."""


@dataclass(frozen=True)
class Piece:
    """A token with its share (0 to 1) of the largest activation on a token of the card."""

    text: str
    share: float
    own: bool
    """Of the item itself, not of prompt and template."""


@dataclass(frozen=True)
class HeatedItem:
    """An item that a concept fires on: heat over its patches (a data URI) and its tokens."""

    shown: Shown
    value: float
    strongest_patch: float
    overlay: str | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ConceptCard:
    """A concept, why it is shown, what the patch does with it, what it fires on."""

    concept: int
    shown_for: tuple[str, ...]
    strength: float
    why: str
    scores: dict[str, float]
    tokens: tuple[str, ...]
    images: tuple[HeatedItem, ...]
    texts: tuple[HeatedItem, ...]


def concept_cards(
    table: pa.Table,
    patch: Patch,
    collection: Collection,
    transformer: Transformer,
    readout: Readout,
    sae: SparseAutoencoder,
    batch_size: int,
) -> list[ConceptCard]:
    """Cards of the concepts that `choose` names; `collection` is calibration's."""
    strength_c = strengths(patch, table.num_rows).double().numpy()
    columns = {name: table[name].to_numpy() for name in SCORES if name in table.column_names}
    chosen = choose(columns, strength_c)
    rows = _rows(table, list(chosen), collection.items)
    numbers = sorted({top["item"] for row in rows for top in row["top_images"] + row["top_texts"]})
    items = [collection.items[number] for number in numbers]
    concepts = torch.tensor(list(chosen), dtype=torch.long)
    heats = token_heat(transformer, readout, sae, items, concepts, batch_size)
    heat_of = dict(zip(numbers, heats, strict=True))
    shown_of = {number: show(item) for number, item in zip(numbers, items, strict=True)}
    cards = []
    for j, row in enumerate(rows):
        concept, on_card = row["concept"], row["top_images"] + row["top_texts"]
        of_card = [heat_of[top["item"]] for top in on_card]
        patch_scale, token_scale = (_strongest(of_card, j, patches) for patches in (True, False))
        heated = [
            HeatedItem(
                shown_of[top["item"]],
                top["value"],
                _strongest([heat], j, patches=True),
                _overlay(heat, j, patch_scale),
                _pieces(heat, j, token_scale),
            )
            for top, heat in zip(on_card, of_card, strict=True)
        ]
        strength, n_images = float(strength_c[concept]), len(row["top_images"])
        cards.append(
            ConceptCard(
                concept,
                chosen[concept],
                strength,
                why(strength, patch),
                {title: row[name] for name, title in SCORES.items() if name in row},
                tuple(words(row["tokens"])),
                tuple(heated[:n_images]),
                tuple(heated[n_images:]),
            )
        )
    return cards


def _rows(table: pa.Table, concepts: list[int], items: Sequence[Item]) -> list[dict[str, Any]]:
    """The table's rows of some concepts, with the first `TOP` different pictures and texts."""
    rows = table.take(concepts).to_pylist()
    for row in rows:
        for column in ("top_images", "top_texts"):
            different: dict[Item, dict[str, Any]] = {}
            for top in row[column]:
                different.setdefault(items[top["item"]], top)
            row[column] = list(different.values())[:TOP]
    return rows


def choose(
    columns: dict[str, NDArray[np.float32]], strength_c: NDArray[np.float64]
) -> dict[int, tuple[str, ...]]:
    """Up to `MOST` concepts that fire, with all that puts them among the first of something.

    Every ranking gives its first concept, then every one its next, and so on.
    """
    rankings = _rankings(columns, strength_c)
    chosen: dict[int, None] = {}
    for place in range(MOST):
        for ranking in rankings.values():
            if place < len(ranking) and len(chosen) < MOST:
                chosen[ranking[place]] = None
    return {
        concept: tuple(
            f"{name}: number {ranking.index(concept) + 1}"
            for name, ranking in rankings.items()
            if concept in ranking
        )
        for concept in chosen
    }


def _rankings(
    columns: dict[str, NDArray[np.float32]], strength_c: NDArray[np.float64]
) -> dict[str, list[int]]:
    """The first `MOST` concepts of every ranking."""
    energy_c, modality_c = columns["energy"], columns["modality"]
    fires_c = energy_c > 0

    def first(key_c: NDArray[Any], allowed_c: NDArray[np.bool_] = fires_c) -> list[int]:
        order = np.argsort(-key_c, kind="stable")
        return order[(allowed_c & fires_c)[order]][:MOST].tolist()

    return {
        "energy taken out by the patch": first(strength_c * energy_c, strength_c > 0),
        "highest attribution": first(columns["attribution"]),
        "lowest discriminative attribution": first(-columns["discriminative_centred"]),
        "highest discriminative attribution": first(columns["discriminative_centred"]),
        "highest bridge score": first(columns["bridge"]),
        "energy of text-dominant concepts": first(energy_c, modality_c > TEXT_DOMINANT),
        "energy of visual concepts": first(energy_c, modality_c < 1 - TEXT_DOMINANT),
    }


def why(strength: float, patch: Patch) -> str:
    """Why the patch subtracts a concept with a strength, or keeps it (strength 0)."""
    method = patch.about["method"]
    if not patch.subtractions:
        return f"the exported patch ({method}) subtracts no concept"
    if strength == 0:
        n = len(patch.strengths)
        return f"not among the {n} concepts that the exported patch ({method}) subtracts"
    reason = patch.about.get("reason") or method
    return f"strength {strength:.2f}: {reason}"


def _strongest(heats: Sequence[TokenHeat], j: int, patches: bool) -> float:
    """The largest activation of the j-th concept on patches, or on all other tokens; 0 at least."""
    image = ROLES.index("image")
    found = [heat.codes_tm[(heat.roles_t == image) == patches, j] for heat in heats]
    return float(torch.cat([torch.zeros(1), *found]).max())


def _overlay(heat: TokenHeat, j: int, scale: float) -> str | None:
    """Heat over the picture, if the concept fires on it."""
    heat_hw = heat.patches(j)
    if heat_hw is None or not bool((heat_hw > 0).any()):
        return None
    return heat_overlay(heat_hw, scale)


def _pieces(heat: TokenHeat, j: int, scale: float) -> tuple[Piece, ...]:
    """The words of the item, and those tokens of prompt and template that the concept fires on."""
    found: list[Piece] = []
    words = 0
    codes_t = heat.codes_tm[:, j].tolist()
    for token, role, code in zip(heat.tokens, heat.roles_t.tolist(), codes_t, strict=True):
        own = ROLES[role] == "text"
        words += own
        if own and words > PIECES:
            if words == PIECES + 1:
                found.append(Piece("…", 0.0, True))
        elif own or (code > 0 and ROLES[role] != "image"):
            text = token.strip() or ("⏎" if "\n" in token else "␣")
            found.append(Piece(text, round(max(code, 0.0) / max(scale, 1e-30), 3), own))
    return tuple(found)
