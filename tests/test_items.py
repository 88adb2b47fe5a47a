"""Items: what they hold, how a model takes them, and as words of a command."""

from __future__ import annotations

import pytest
from PIL import Image
from sentence_transformers.base.modality import infer_modality

from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.items import KINDS, Item
from patch_retriever.pictures.picture import PictureFile

GREEN = Image.new("RGB", (40, 30), "green")


@pytest.fixture
def picture(tmp_path) -> PictureFile:
    GREEN.save(tmp_path / "a.png")
    return PictureFile(tmp_path / "a.png")


def test_a_text_is_loaded_as_a_chat_and_never_fetched():
    item = Item("https://example.org/a.png")
    assert item.kind == "text"
    assert item.load() == [
        {"role": "user", "content": [{"type": "text", "text": "https://example.org/a.png"}]}
    ]


def test_a_picture_is_loaded_as_a_chat(picture):
    item = Item(picture=picture)
    assert item.kind == "image"
    ((message,), content) = item.load(), item.load()[0]["content"]
    assert message["role"] == "user"
    assert [part["type"] for part in content] == ["image"]
    assert content[0]["image"].tobytes() == GREEN.tobytes()


def test_with_both_the_picture_comes_first(picture):
    item = Item("make it red", picture)
    assert item.kind == "both"
    first, second = item.load()[0]["content"]
    assert first["image"].size == (40, 30)
    assert second == {"type": "text", "text": "make it red"}


def test_for_a_model_without_chats_an_item_is_loaded_as_it_is(picture):
    assert infer_modality(Item("red").load_plain()) == "text"
    assert Item(picture=picture).load_plain().tobytes() == GREEN.tobytes()
    both = Item("red", picture).load_plain()
    assert (both["text"], both["image"].size) == ("red", (40, 30))


@pytest.mark.parametrize("text", ["https://example.org/a.png", "a.png", "data:image/png;base64,AA"])
def test_a_text_that_names_a_picture_is_never_fetched(tmp_path, monkeypatch, text):
    GREEN.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert infer_modality(Item(text).load_plain(), ["text", "image"]) == "text"


def test_an_empty_text_is_a_text():
    assert Item("").kind == "text"


def test_an_item_of_nothing_is_refused():
    with pytest.raises(ValueError, match="text, a picture or both"):
        Item()


def test_kinds_have_their_numbers():
    assert KINDS == ("text", "image", "both")


def test_a_picture_is_opened_only_when_it_is_loaded(tmp_path):
    item = Item(picture=PictureFile(tmp_path / "gone.png"))
    assert item.kind == "image"
    with pytest.raises(UserError, match=r"gone\.png: no such image file"):
        item.load()


# several pictures


@pytest.fixture
def three(tmp_path) -> tuple[PictureFile, ...]:
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        Image.new("RGB", (8, 6), path.stem).save(path)
    return tuple(map(PictureFile, paths))


def test_several_pictures_come_in_order_before_the_text(three):
    first, *more = three
    item = Item("which is green?", first, tuple(more))
    assert item == Item.of("which is green?", three)
    assert (item.kind, item.pictures) == ("both", three)
    *images, last = item.load()[0]["content"]
    assert [part["image"].tobytes() for part in images] == [p.open().tobytes() for p in three]
    assert last == {"type": "text", "text": "which is green?"}
    plain = item.load_plain()
    assert [p.getpixel((0, 0)) for p in plain["image"]] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert plain["text"] == "which is green?"


def test_several_pictures_without_a_text(three):
    item = Item.of(None, three)
    assert item.kind == "image"
    assert [part["type"] for part in item.load()[0]["content"]] == 3 * ["image"]
    assert len(item.load_plain()["image"]) == 3


def test_one_picture_or_none_is_the_item_it_always_was(picture):
    assert Item.of("a", [picture]) == Item("a", picture)
    assert Item.of("a", []) == Item("a")
    assert Item("a").pictures == ()


def test_more_pictures_need_a_first(picture):
    with pytest.raises(ValueError, match="needs a first"):
        Item("a", None, (picture,))


def test_the_content_hash_knows_every_picture_and_their_order(three):
    a, b, c = three
    items = [Item("x", a), Item("x", a, (b,)), Item("x", b, (a,)), Item("x", a, (b, c))]
    assert len({item.content_hash() for item in items}) == len(items)
    one = value_hash(["x", a.content_hash()])
    assert items[0].content_hash() == one  # as stores have it from before there were several


def test_every_picture_is_checked(three, tmp_path):
    item = Item(None, three[0], (PictureFile(tmp_path / "gone.png"),))
    with pytest.raises(UserError, match=r"gone\.png"):
        item.check_picture()


# items as words of a command


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a + b.png"  # a name that looks like a picture and a text
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_a_file_is_a_picture(photo):
    item = Item.parse(str(photo))
    assert (item.text, item.picture.path) == (None, photo)


def test_what_follows_the_plus_is_the_text(photo):
    for path in (photo, photo.with_name("gone.png")):
        item = Item.parse(f"{path} + and in blue + red.png")
        assert (item.text, item.picture.path) == ("and in blue + red.png", path)


@pytest.mark.parametrize("plus", ["+", " +", "+ ", " + "])
def test_spaces_around_the_plus_do_not_matter(photo, plus):
    assert Item.parse(f"{photo}{plus}in blue") == Item("in blue", PictureFile(photo))
    assert Item.parse(f"{photo}{plus}") == Item(None, PictureFile(photo))


def test_a_pictures_name_may_hold_a_plus(photo):
    strange = photo.with_name("a + b.png")
    strange.write_bytes(photo.read_bytes())
    assert Item.parse(f"{strange} + in blue") == Item("in blue", PictureFile(strange))


def test_a_picture_that_is_missing_is_still_a_picture(tmp_path):
    for said in ("gone.JPG", "gone.JPG + in blue"):
        item = Item.parse(f"{tmp_path}/{said}")
        assert item.picture.path == tmp_path / "gone.JPG"
        with pytest.raises(UserError, match="no such image file"):
            item.load()


def test_several_pictures_are_named_one_after_the_other(photo):
    other = photo.with_name("b.png")
    Image.new("RGB", (8, 8)).save(other)
    pictures = (PictureFile(other), PictureFile(photo))
    assert Item.parse(f"{other} + {photo}") == Item.of(None, pictures)
    assert Item.parse(f"{other}+{photo}  + in blue") == Item.of("in blue", pictures)
    gone = photo.with_name("gone.jpg")
    assert Item.parse(f"{other} + {gone} + x") == Item.of(
        "x", (PictureFile(other), PictureFile(gone))
    )


@pytest.mark.parametrize("text", ["as in this.png", "make it like logo.png + a frame"])
def test_a_text_after_a_picture_may_end_like_a_pictures_name(photo, text):
    assert Item.parse(f"{photo} + {text}") == Item(text, PictureFile(photo))


@pytest.mark.parametrize("said", ["a cat + a dog", "x" * 5000, "a red star.", " + "])
def test_all_else_is_a_text(said):
    assert Item.parse(said) == Item(said)


@pytest.mark.parametrize("said", ["", "  "])
def test_nothing_is_no_item(said):
    with pytest.raises(UserError, match="empty"):
        Item.parse(said)
