"""Which concepts get a card, and what a card says."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import wild
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.roles import ROLES
from patch_retriever.features import Features
from patch_retriever.heat import TokenHeat
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.report import concept_cards as cards
from patch_retriever.sae.formats import load_sae
from patch_retriever.stages.readout import load_readout


def columns_of(c: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("attribution", "discriminative", "discriminative_centred", "bridge")
    columns = {name: rng.normal(size=c).astype(np.float32) for name in names}
    columns["modality"] = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], c).astype(np.float32)
    columns["energy"] = (rng.random(c) * (rng.random(c) < 0.7)).astype(np.float32)
    return columns


KEYS = {
    "energy taken out by the patch": lambda x, s: (s * x["energy"], s > 0),
    "highest attribution": lambda x, s: (x["attribution"], s >= 0),
    "lowest discriminative attribution": lambda x, s: (-x["discriminative_centred"], s >= 0),
    "highest discriminative attribution": lambda x, s: (x["discriminative_centred"], s >= 0),
    "highest bridge score": lambda x, s: (x["bridge"], s >= 0),
    "energy of text-dominant concepts": lambda x, _: (x["energy"], x["modality"] > 0.8),
    "energy of visual concepts": lambda x, _: (x["energy"], x["modality"] < 0.2),
}


def brute_place(name: str, x, strength_c, concept: int) -> int:
    key_c, allowed_c = KEYS[name](x, strength_c)
    allowed_c = allowed_c & (x["energy"] > 0)
    assert allowed_c[concept]
    return 1 + int((allowed_c & (key_c > key_c[concept])).sum())


@settings(max_examples=60, deadline=None)
@given(c=st.integers(1, 80), seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.2, 1.0]))
def test_chosen_concepts_fire_are_few_and_are_what_their_labels_say(c, seed, share):
    x = columns_of(c, seed)
    rng = np.random.default_rng(seed + 1)
    strength_c = rng.random(c) * (rng.random(c) < share)
    chosen = cards.choose(x, strength_c)
    fires = int((x["energy"] > 0).sum())
    assert len(chosen) == min(cards.MOST, fires)
    for concept, labels in chosen.items():
        assert x["energy"][concept] > 0
        assert labels
        for label in labels:
            name, place = label.split(": number ")
            assert int(place) == brute_place(name, x, strength_c, concept)
    said = {label for labels in chosen.values() for label in labels}
    for name, key in KEYS.items():  # the first of every ranking is there
        allowed_c = key(x, strength_c)[1] & (x["energy"] > 0)
        assert (f"{name}: number 1" in said) == bool(allowed_c.any())


def patch(strengths: dict[int, float], **about: str) -> Patch:
    strength_m = torch.tensor(list(strengths.values()))
    m = len(strengths)
    subtract = Subtract(
        torch.tensor(list(strengths)), strength_m, torch.zeros(4, m), *torch.zeros(2, m),
        torch.zeros(m, 4),
    )  # fmt: skip
    return Patch("last_hidden_state", subtract if m else None, about={"method": "gains", **about})


def test_a_card_says_what_the_patch_does_with_its_concept_and_why():
    some = patch({3: 0.25, 5: 1.0}, reason="learned from pairs")
    assert cards.why(0.25, some) == "strength 0.25: learned from pairs"
    assert cards.why(1.0, patch({3: 1.0}, reason="")) == "strength 1.00: gains"
    assert cards.why(0.0, some).startswith("not among the 2 concepts")
    assert cards.why(0.0, patch({})) == "the exported patch (gains) subtracts no concept"


def test_pieces_are_the_items_words_and_where_else_the_concept_fires():
    tokens = ["<|user|>", " a", "\n", "<image>", " say", "<|end|>"]
    roles = ["special", "text", "text", "image", "instruction", "special"]
    codes = [0.0, 1.0, 0.0, 9.0, 0.0, 4.0]
    heat = TokenHeat(
        tokens,
        torch.tensor([ROLES.index(role) for role in roles]),
        torch.ones(6),
        torch.tensor(codes)[:, None],
    )
    found = [(piece.text, piece.share, piece.own) for piece in cards._pieces(heat, 0, 4.0)]
    assert found == [("a", 0.25, True), ("⏎", 0.0, True), ("<|end|>", 1.0, False)]


def test_of_a_long_text_the_first_words_are_shown_and_the_template_all_the_same():
    n = 3 * cards.PIECES
    heat = TokenHeat(
        [f"w{i}" for i in range(n)] + ["<|end|>"],
        torch.tensor([ROLES.index("text")] * n + [ROLES.index("special")]),
        torch.ones(n + 1),
        torch.ones(n + 1, 1),
    )
    texts = [piece.text for piece in cards._pieces(heat, 0, 1.0)]
    assert texts == [*(f"w{i}" for i in range(cards.PIECES)), "…", "<|end|>"]


@pytest.fixture(scope="module")
def carded(finished_build):
    """Everything that cards are made of, of a small build: `make(table)` gives the cards."""
    config, data = wild.settings_and_data(finished_build)
    run = finished_build / "run"
    features = Features.load(run / "features/calibration.safetensors")
    collection = data.splits["calibration"]
    transformer = load_backbone(config.model)
    sae, readout = load_sae(run / "sae"), load_readout(run / "readout")

    def make(table, some_patch):
        return cards.concept_cards(table, some_patch, collection, transformer, readout, sae, 16)

    return make, pq.read_table(run / "score/concepts.parquet"), features, collection


def test_a_card_shows_different_items_the_most_active_first(carded):
    make, table, features, collection = carded
    codes_nc = features.codes.dense()
    found = make(table, patch({}))
    assert found and any(card.images for card in found) and any(card.texts for card in found)
    for card in found:
        for heated, kind in ((card.images, "image"), (card.texts, "text")):
            of_kind = [i for i, item in enumerate(collection.items) if item.kind == kind]
            values = [one.value for one in heated]
            assert values == sorted(values, reverse=True) and len(values) <= cards.TOP
            largest = max(float(codes_nc[i, card.concept]) for i in of_kind)
            assert values[:1] == ([largest] if largest > 0 else [])
            keys = {(one.shown.text, one.shown.picture) for one in heated}
            assert len(keys) == len(heated)
            for one in heated:
                assert all(0 <= piece.share <= 1 for piece in one.pieces)
                assert (one.overlay is None) == (one.strongest_patch == 0)


def test_a_card_takes_items_words_and_frequency_from_the_table(carded):
    make, table, _, collection = carded
    images, texts = (
        [i for i, item in enumerate(collection.items) if item.kind == kind]
        for kind in ("image", "text")
    )
    n = table.num_rows

    def column(of_row):
        return pa.array([of_row(row) for row in range(n)])

    columns = {
        "top_images": column(lambda _: [{"item": images[0], "value": 2.5}]),
        "top_texts": column(lambda _: [{"item": texts[1], "value": 0.5}] * 3),
        "tokens": column(lambda row: [f"word{row}", "other"]),
        "frequency": column(lambda row: row / n),
    }
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    for card in make(table, patch({3: 1.0})):
        assert card.tokens == (f"word{card.concept}", "other")
        assert card.scores["share of items"] == card.concept / n
        (image,), (text,) = card.images, card.texts
        assert (image.value, text.value) == (2.5, 0.5)
        assert image.shown.alt == collection.items[images[0]].picture.name
        assert text.shown.text == collection.items[texts[1]].text
        assert card.strength == (1.0 if card.concept == 3 else 0.0)


def test_subtracted_concepts_that_fire_get_cards(carded):
    make, table, *_ = carded
    energy_c = table["energy"].to_numpy()
    strongest = int(np.argmax(energy_c))
    found = {card.concept: card for card in make(table, patch({strongest: 0.5}, reason="chosen"))}
    assert found[strongest].strength == 0.5
    assert found[strongest].why == "strength 0.50: chosen"
    assert "energy taken out by the patch: number 1" in found[strongest].shown_for
