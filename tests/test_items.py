"""Items: what they hold, how a model takes them, and as words of a command."""

from __future__ import annotations

import pytest
from PIL import Image
from sentence_transformers.base.modality import infer_modality

from patch_retriever.errors import UserError
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


@pytest.mark.parametrize("said", ["a cat + a dog", "x" * 5000, "a\0b", "a red star.", " + "])
def test_all_else_is_a_text(said):
    assert Item.parse(said) == Item(said)


@pytest.mark.parametrize("said", ["", "  "])
def test_nothing_is_no_item(said):
    with pytest.raises(UserError, match="empty"):
        Item.parse(said)
