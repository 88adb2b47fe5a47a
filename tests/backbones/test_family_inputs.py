"""Items as every model family reads them, live and in a plain export: the order of keys, several
pictures, prompts given at encoding, pictures of any mode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from families import FAMILIES, parameter
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import (
    PAPER,
    PAPER_PROMPTS,
    PAPER_READOUT,
    PLAIN,
    Prompt,
    Readout,
)
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import to_rgb
from patch_retriever.retrieval.encoder import Encoder


def striped(colour: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, colour)
    picture.paste("white", (0, 0, size[0] // 3, size[1]))
    return picture


RED, BLUE, GREEN = striped("red", (60, 60)), striped("blue", (40, 90)), striped("green", (90, 60))


@pytest.fixture(scope="module", params=map(parameter, FAMILIES))
def transformer(request, stand_in):
    return load_backbone(str(stand_in(request.param)))


@pytest.fixture(scope="module")
def exported(transformer, tmp_path_factory):
    """The paper's readout, reloaded without our package's help."""
    folder = tmp_path_factory.mktemp("exported")
    with_readout(transformer, PAPER_READOUT).save(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def live(transformer):
    return with_readout(transformer, PAPER_READOUT)


def differ(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def test_the_order_of_keys_does_not_matter(live, exported):
    for model in (live, exported):
        first, second = model.encode(
            [{"image": RED, "text": "a cat"}, {"text": "a cat", "image": RED}]
        )
        assert differ(first, second) < 1e-5
    image, text = {"type": "image", "image": RED}, {"type": "text", "text": "a cat"}
    for content in ([image, text], [text, image]):
        chat = [{"role": "user", "content": content}]
        assert differ(exported.encode([chat])[0], first) < 1e-5


def test_items_of_several_pictures_in_a_mixed_batch(live, exported):
    items = [
        {"image": [RED, BLUE], "text": "a cat"},
        {"image": [BLUE, RED], "text": "a cat"},
        {"image": [RED, BLUE, GREEN]},
        {"image": [RED, BLUE]},
        RED,
        {"image": RED, "text": "a cat"},
        "a cat",
    ]
    live_nd = live.encode(items)
    assert differ(exported.encode(items), live_nd) < 1e-5
    assert differ([exported.encode([item])[0] for item in items], live_nd) < 1e-5
    for i, a in enumerate(live_nd):
        for b in live_nd[:i]:
            assert differ(a, b) > 1e-4, "two items with one embedding"


@pytest.mark.parametrize("name", ["it->i query", "t->it document", "t->i query"])
def test_a_prompt_by_name_is_said_after_the_item(transformer, exported, name):
    items = [("a cat", None), (None, RED), ("a cat", RED), ("two small dogs", BLUE)]
    said = PAPER_PROMPTS[name]

    def dicts(end=""):
        for text, image in items:
            parts = {"image": image} if image else {}
            yield {**parts, "text": f"{text or ''}{end}"} if text or end else parts

    found_nd = exported.encode(list(dicts()), prompt_name=name)
    expected_nd = with_readout(transformer, Readout(PLAIN)).encode(list(dicts(said)))
    assert differ(found_nd, expected_nd) < 1e-5
    alone = exported.encode([{"image": RED, "text": "a cat"}], prompt_name=name)[0]
    assert differ(alone, found_nd[2]) < 1e-5


def test_without_a_name_the_readouts_prompt_is_said(live, exported):
    items = ["a cat", RED, {"image": RED, "text": "a cat"}]
    plain_nd = exported.encode(items)
    assert differ(exported.encode_query(items), plain_nd) == 0
    assert differ(exported.encode_document(items), plain_nd) == 0
    assert differ(exported.encode(items[:1], prompt=PAPER.text)[0], plain_nd[0]) < 1e-5
    assert differ(exported.encode(items[1:2], prompt=PAPER.image)[0], plain_nd[1]) < 1e-5
    assert differ(exported.encode(items, prompt="which cat is it"), plain_nd) > 1e-3
    assert differ(live.encode(items), plain_nd) < 1e-5


def test_a_prompt_may_stay_a_system_message(transformer, tmp_path):
    prompt = Prompt("own", both=" is it?", text=" what is it?", instruction="system")
    model = with_readout(transformer, Readout(prompt))
    items = ["a cat", {"image": RED, "text": "a cat"}]
    chats = [
        [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *turn]
        for turn in (
            [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}],
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": RED}, {"type": "text", "text": "a cat"}],
                }
            ],
        )
    ]
    live_nd = model.encode(items, prompt="be brief")
    assert differ(live_nd, model.encode(items)) > 1e-4
    assert differ(live_nd, model.encode(chats)) < 1e-5
    model.save(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert differ(loaded.encode(items, prompt="be brief"), live_nd) < 1e-5


# pictures of any mode


def drawn() -> Image.Image:
    rng = np.random.default_rng(0)
    blocks_hwc = np.kron(rng.integers(0, 255, (6, 9, 3)), np.ones((10, 10, 1)))
    return Image.fromarray(blocks_hwc.astype("uint8"))


def as_jpeg(picture: Image.Image, **options) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=95, **options)
    return Image.open(buffer)


def see_through(picture: Image.Image) -> Image.Image:
    alpha_hw = np.kron(np.random.default_rng(1).integers(0, 255, (6, 9)), np.ones((10, 10)))
    clear = picture.copy()
    clear.putalpha(Image.fromarray(alpha_hw.astype("uint8")))
    return clear


def lying(picture: Image.Image) -> Image.Image:
    turned = Image.Exif()
    turned[0x0112] = 6
    return as_jpeg(picture, exif=turned)


def deep(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype("uint16") * 257)


SAME = {
    "RGB": lambda p: p,
    "grey": lambda p: p.convert("L"),
    "two colours": lambda p: p.convert("1"),
    "palette": lambda p: p.convert("P"),
    "CMYK": lambda p: as_jpeg(p.convert("CMYK")),
    "alpha": see_through,
    "grey with alpha": lambda p: see_through(p).convert("LA"),
}
OTHER = {"16 bits": deep, "turned by EXIF": lying}


@pytest.mark.parametrize("mode", SAME)
def test_a_plain_export_reads_pictures_as_the_toolkit_does(exported, mode):
    picture = SAME[mode](drawn())
    found, expected = exported.encode([picture, to_rgb(picture)])
    assert differ(found, expected) < 1e-5


@pytest.mark.parametrize("mode", OTHER)
def test_of_these_modes_a_plain_export_wants_them_prepared(exported, mode):
    """docs/inputs.md tells users so; when it passes one day, tell them otherwise."""
    picture = OTHER[mode](drawn())
    found, expected = exported.encode([picture, to_rgb(picture)])
    assert differ(found, expected) > 1e-3
    assert differ(exported.encode([to_rgb(picture)])[0], expected) < 1e-5


def test_a_template_that_takes_no_system_message_says_so_in_one_line(stand_in):
    transformer = load_backbone(str(stand_in("llava")))
    refusing = "{{ raise_exception('System role not supported') }}"
    own = transformer.processor.chat_template
    transformer.processor.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}" + refusing + "{%- endif -%}" + own
    )
    prompt = Prompt("own", both=" is it?", instruction="system")
    encoder = Encoder(with_readout(transformer, Readout(prompt)), "llava")
    with pytest.raises(UserError, match=r"^llava: cannot encode .*System role not supported"):
        encoder.embed([Item("a cat")], "query", prompt="be brief")
    assert encoder.embed([Item("a cat")], "query").shape == (1, 32)
