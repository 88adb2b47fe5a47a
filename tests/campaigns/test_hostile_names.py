"""Names in lists that would lead elsewhere: refused by the list's name; what lies there is neither
read nor deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from patch_retriever.activations.kept import KeptTokens
from patch_retriever.activations.store import Store
from patch_retriever.activations.writer import StoreWriter
from patch_retriever.backbones.readout import PLAIN, Readout
from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, inside
from patch_retriever.items import Item
from patch_retriever.publish import _remove_what_was_published
from patch_retriever.retrieval.index.manifest import MANIFEST, Part, check_parts

NAMES = (
    *("../victim", "a/../../victim", "./../victim", "link/victim", "link/../../victim", ".."),
    *("../folder-beside/victim", "sub/link/victim", "//victim", "/etc/hostname"),
)


@pytest.fixture
def place(tmp_path):
    """A folder beside a victim, with a link that leads to where the victim is."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "folder-beside").mkdir()
    for path in (tmp_path / "victim", tmp_path / "folder-beside" / "victim"):
        save_file({"tokens_td": torch.zeros(1, 2)}, path)
    (folder / "link").symlink_to(tmp_path)
    (folder / "sub" / "link").symlink_to(tmp_path)
    return folder


def hostile(folder: Path, name: str) -> str:
    return name.replace("//victim", str(folder.parent / "victim"))


def store(folder: Path, name: str) -> None:
    writer = StoreWriter(folder)
    values = [torch.zeros(3, 2), *(torch.zeros(3) for _ in range(3))]
    writer.add(*values)
    writer.close()
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"file": name, "sha256": file_hash(folder.parent / "victim")}
    (folder / "index.json").write_text(json.dumps(index))
    Store(folder).read(0)


def kept(folder: Path, name: str) -> None:
    item = Item("a text")
    index = {"readout": Readout(PLAIN).to_json()}
    index["shards"] = [{"items": [0], "lengths": [1], "file": name}]
    (folder / "index.json").write_text(json.dumps(index))
    list(KeptTokens(folder, [item]).batches([item], [0], 1, torch.device("cpu")))


def index(folder: Path, name: str) -> None:
    victim = folder.parent / "victim"
    check_parts(folder, (Part(name, victim.stat().st_size, file_hash(victim)),))
    assert MANIFEST


def published(folder: Path, name: str) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "published.json").write_text(json.dumps([name]))
    _remove_what_was_published(folder, keep={"modules.json"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reads", [store, kept, index, published])
def test_a_name_that_leads_elsewhere_is_refused(reads, name, place):
    name = hostile(place, name)
    with pytest.raises(UserError, match="which is not in") as caught:
        reads(place, name)
    line = str(caught.value)
    assert "\n" not in line
    assert ".json: lists" in line
    assert (place.parent / "victim").is_file()
    assert (place.parent / "folder-beside" / "victim").is_file()


@pytest.mark.parametrize("name", ["a", "sub/a", "sub/../a", "..a", "a..", "...", "ü [1]*?"])
def test_a_name_that_stays_is_taken(place, name):
    if name == "sub/../a":  # it would stay, but nothing of ours writes such
        with pytest.raises(UserError):
            inside(place, name, place / "list.json")
    else:
        assert inside(place, name, place / "list.json") == place / name


@pytest.mark.parametrize("content", ["{", "3", "null", "[[1]]"])
def test_a_damaged_list_of_what_was_published_is_named(place, content):
    (place / "run").mkdir()
    (place / "run" / "published.json").write_text(content)
    if content == "[[1]]":
        _remove_what_was_published(place, keep=set())
        return
    with pytest.raises(UserError, match=r"published\.json: damaged"):
        _remove_what_was_published(place, keep=set())
