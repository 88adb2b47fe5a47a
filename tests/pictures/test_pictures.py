"""Pictures of every kind that a user has are opened as RGB, bad ones are named."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import PictureBytes, PictureFile


def opened(path: Path) -> np.ndarray:
    picture = PictureFile(path).open()
    assert picture.mode == "RGB"
    return np.asarray(picture)


def noise(size=(40, 30)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_rgb_is_opened_as_it_is(tmp_path):
    noise().save(tmp_path / "a.png")
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), np.asarray(noise()))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_black_and_white_get_three_equal_channels(tmp_path, mode):
    grey = noise().convert(mode)
    grey.save(tmp_path / "a.png")
    found = opened(tmp_path / "a.png")
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], np.asarray(grey.convert("L")))


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    Image.new("RGB", (32, 32), (200, 60, 30)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    np.testing.assert_allclose(opened(tmp_path / "a.jpg").mean((0, 1)), (200, 60, 30), atol=6)


def test_what_is_transparent_in_a_palette_is_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=1)
    assert opened(tmp_path / "a.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("transparency", [b"\xff\x00", (0, 0, 0)])
def test_every_way_to_say_what_is_transparent_is_understood(tmp_path, transparency):
    if isinstance(transparency, bytes):
        picture = Image.new("P", (2, 1))
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.putpixel((1, 0), 1)
    else:
        picture = Image.new("RGB", (2, 1), (255, 0, 0))
        picture.putpixel((1, 0), (0, 0, 0))
    picture.save(tmp_path / "a.png", transparency=transparency)
    assert opened(tmp_path / "a.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 0), (128, 127)])
def test_alpha_is_put_on_white(tmp_path, alpha, expected):
    Image.new("RGBA", (2, 2), (0, 0, 0, alpha)).save(tmp_path / "a.png")
    Image.new("LA", (2, 2), (0, alpha)).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        np.testing.assert_allclose(opened(tmp_path / name), expected, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
    upright = noise((6, 4))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # how the camera was held: the inverse of what is shown
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), np.asarray(upright))


def ramp_16_bit() -> np.ndarray:
    """A grey ramp from black to white, in 16 bits."""
    return np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (8, 1))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_become_eight_and_keep_their_greys(tmp_path, name):
    Image.fromarray(ramp_16_bit()).save(tmp_path / name)
    expected = (ramp_16_bit() / 257)[..., None].repeat(3, axis=2)
    np.testing.assert_allclose(opened(tmp_path / name), expected, atol=2)


@pytest.mark.parametrize(("name", "options"), [("a.gif", {}), ("a.webp", {"lossless": True})])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (opened(tmp_path / name) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.bmp", "a.tif", "a.webp", "a.ppm", "a.gif", "a.jpg"])
def test_other_formats_are_read(tmp_path, name):
    Image.new("RGB", (16, 8), (0, 255, 0)).save(tmp_path / name)
    found = opened(tmp_path / name)
    assert found.shape == (8, 16, 3)
    np.testing.assert_allclose(found.mean((0, 1)), (0, 255, 0), atol=4)


def test_the_name_says_nothing_about_the_format(tmp_path):
    noise().save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(opened(tmp_path / "a.jpg"), np.asarray(noise()))


def test_a_large_picture_is_read(tmp_path):
    Image.new("L", (6000, 5000), 77).save(tmp_path / "a.png", compress_level=1)
    picture = PictureFile(tmp_path / "a.png").open()
    assert (picture.size, picture.getpixel((5999, 4999))) == ((6000, 5000), (77, 77, 77))


def test_one_pixel_is_a_picture(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").tolist() == [[[255, 0, 0]]]


def says(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        PictureFile(path).open()
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_an_absurdly_large_picture_is_named(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    says(tmp_path / "a.png", "not a readable image", "pixels")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.tif", "a.webp", "a.bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_picture_is_named(tmp_path, name, share):
    path = tmp_path / name
    noise((128, 128)).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    says(path, "not a readable image")


def test_a_text_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    says(tmp_path / "a.jpg", "not a readable image")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.jpg").touch()
    says(tmp_path / "a.jpg", "not a readable image")


def test_a_folder_is_named(tmp_path):
    says(tmp_path, "not a readable image")


def test_a_missing_file_is_named(tmp_path):
    says(tmp_path / "a.jpg", "no such image file")


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of the damage
def test_whatever_bytes_are_damaged_it_opens_or_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    rng = random.Random(name)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    noise().save(buffer, name, **({} if name in ("GIF", "BMP") else {"exif": exif}))
    sound, path = buffer.getvalue(), tmp_path / "damaged"
    named = 0
    for _ in range(150):
        damaged = bytearray(sound)
        for _ in range(3):
            damaged[rng.randrange(rng.choice((40, 200, len(sound))))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert PictureFile(path).open().mode == "RGB"
        except UserError as error:
            named += str(error).startswith(f"{path}: ")
    assert named > 0


def test_a_picture_is_named_by_its_path(tmp_path):
    assert PictureFile(tmp_path / "a.png").name == str(tmp_path / "a.png")


def test_bytes_are_a_picture_under_the_name_they_are_given(tmp_path):
    buffer = BytesIO()
    noise().save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    picture, file = PictureBytes("a photo", buffer.getvalue()), PictureFile(tmp_path / "a.png")
    assert picture.open().tobytes() == noise().tobytes()
    assert picture.content_hash() == file.content_hash()
    assert "data" not in repr(picture)
    with pytest.raises(UserError, match=r"^a photo: not a readable image"):
        PictureBytes("a photo", b"no picture").open()


@pytest.mark.parametrize(
    ("values", "shade"),
    [
        (np.full((4, 4), 30_000, np.int32), 30_000 / 257),  # 16 bits in 32
        (np.full((4, 4), 200, np.int32), 200),
        (np.full((4, 4), 0.5, np.float32), 127.5),
        (np.full((4, 4), 99.0, np.float32), 99),
        (np.full((4, 4), 40_000.0, np.float32), 40_000 / 257),
        (np.full((4, 4), 40_000, ">u2"), 40_000 / 257),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_values_of_other_depths_are_scaled_and_never_all_black_or_white(tmp_path, values, shade):
    path = tmp_path / "a.tif"
    if values.dtype == np.dtype(">u2"):
        picture = Image.frombytes("I;16B", (4, 4), values.tobytes())
    else:
        picture = Image.fromarray(values)
    picture.save(path)
    np.testing.assert_allclose(opened(path), shade, atol=1.5)


@pytest.mark.parametrize("value", [-1.0, 1e9, float("nan"), float("inf")])
def test_values_that_fit_no_range_are_named(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "a.tif")
    says(tmp_path / "a.tif", "not a readable image", "8 or 16 bits")


def test_no_format_is_read_that_starts_a_program(tmp_path, monkeypatch):
    """An EPS under a picture's name: Pillow would run the first `gs` in PATH."""
    ran, programs = tmp_path / "ran", tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    noise().save(tmp_path / "a.eps")
    path = (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    says(path, "no known format")
    assert PictureFile(path).size() is None
    assert not ran.exists()


def test_pixels_are_sound_where_an_exif_value_is_not(tmp_path):
    """A rotated JPEG whose software entry (text) holds a number of a wrong type."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "some software"
    noise((40, 20)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index((0x0131).to_bytes(2, "little" if b"II*" in data[:40] else "big"))
    (tmp_path / "a.jpg").write_bytes(data[: at + 2] + b"\x0c\x00" + data[at + 4 :])
    assert opened(tmp_path / "a.jpg").shape == (40, 20, 3)


def test_a_null_byte_in_a_name_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not a readable image") as caught:
        PictureFile(tmp_path / "a\0.jpg").open()
    assert "\n" not in str(caught.value)
