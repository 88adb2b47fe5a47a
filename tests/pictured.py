"""Small pictures, and items of every kind with them."""

from __future__ import annotations

from PIL import Image

from patch_retriever.items import Item


class Plain:
    """A picture of one colour."""

    name = "plain"

    def open(self):
        return Image.new("RGB", (72, 72), (200, 30, 30))


class Striped:
    """A picture of two colours."""

    def __init__(self, width: int, height: int, colour: str) -> None:
        self.name = f"{width} x {height} {colour}"
        self.size, self.colour = (width, height), colour

    def open(self):
        picture = Image.new("RGB", self.size, self.colour)
        picture.paste("white", (0, 0, self.size[0] // 3, self.size[1]))
        return picture


SQUARE, TALL, WIDE = Striped(60, 60, "red"), Striped(40, 120, "blue"), Striped(90, 60, "green")

SHORT, LONG = "a cat", "two small cats on a large grey mat, one of them asleep"
ITEMS = {
    "text": Item(SHORT),
    "long text": Item(LONG),
    "image": Item(picture=Plain()),
    "both": Item(SHORT, Plain()),
    "long both": Item(LONG, Plain()),
}
MIXED = (
    Item("a cat"),
    Item("two small dogs on a mat, asleep"),
    Item(picture=TALL),
    Item("a cat", SQUARE),
)
"""A batch of texts and pictures of unlike lengths and sizes."""
