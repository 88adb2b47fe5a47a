"""A collection that was stopped goes on at its last finished shard and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from patch_retriever.activations import collect, writer
from patch_retriever.activations.store import Store
from patch_retriever.backbones.inputs import WINDOW
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.backbones.roles import ROLES
from patch_retriever.items import Item
from patch_retriever.progress import silent
from patch_retriever.runs import PARTIAL, Run

BATCH = 2
N = 5 * WINDOW * BATCH + 5
READOUTS = (Readout(ONE_WORD, LAST, "lasttoken"), Readout(ONE_WORD, "layers.0", "mean"))


class Opened:
    """A picture that tells when it is opened."""

    def __init__(self, number: int, opened: list[int]) -> None:
        self.name, self.number, self.opened = str(number), number, opened

    def open(self):
        self.opened.append(self.number)
        return Image.new("RGB", (72, 72), (self.number % 256, 90, 30))


def some_items(opened):
    """Texts of many lengths, pictures, and both."""
    words = ["a", "small", "red", "bird", "behind", "the", "blue", "fence"]
    items = []
    for n in range(N):
        text = " ".join(words[: 1 + n % 8]) + f" {n}"
        items.append(
            (Item(text), Item(None, Opened(n, opened)), Item(text, Opened(n, opened)))[n % 3]
        )
    return items


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(collect, "StoreWriter", partial(writer.StoreWriter, tokens_per_shard=300))


class Stop(Exception):
    pass


class Collecting:
    """Collects in a stage, as `build` does, and may be stopped at any file."""

    def __init__(self, transformer, folder, readout, monkeypatch, **settings):
        self.transformer, self.folder, self.readout = transformer, folder, readout
        self.monkeypatch, self.settings = monkeypatch, settings
        self.opened: list[int] = []
        self.items = some_items(self.opened)

    def __call__(self, stop_at: int | None = None, **changed) -> Path:
        """`stop_at` is the number of files that are written before it stops."""
        written, real = [], writer.write_tensors

        def write(path, tensors):
            if len(written) == stop_at:
                raise Stop
            written.append(path)
            real(path, tensors)

        self.opened.clear()
        settings = {"batch_size": BATCH, "pairs": [[0, 1]], **self.settings, **changed}
        with self.monkeypatch.context() as patching, Run(self.folder, silent) as run:
            patching.setattr(writer, "write_tensors", write)
            return run.stage(
                "collect",
                lambda folder: collect.collect_tokens(
                    self.transformer,
                    self.items,
                    self.readout,
                    folder,
                    key=run.key("collect"),
                    **settings,
                ),
            )


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def collecting(transformer, tmp_path, monkeypatch):
    def make(name, readout=READOUTS[0], **settings):
        return Collecting(transformer, tmp_path / name, readout, monkeypatch, **settings)

    return make


@pytest.mark.parametrize("wanted", [None, 900])
@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.name)
def test_stopped_at_any_shard_it_ends_with_the_same_bytes(readout, wanted, collecting):
    whole = collecting("whole", readout, tokens_wanted=wanted)()
    expected = content(whole)
    n_files = sum(name.endswith(".safetensors") for name in expected)
    assert n_files >= 4
    assert any(name.startswith("sums") for name in expected) == bool(
        wanted and readout.pooling == "mean"
    )
    for stop_at in range(n_files):
        stopped = collecting(f"stopped-{stop_at}", readout, tokens_wanted=wanted)
        with pytest.raises(Stop):
            stopped(stop_at)
        assert content(stopped()) == expected, stop_at


def test_stopped_again_and_again_it_ends_with_the_same_bytes(collecting):
    expected = content(collecting("whole")())
    stopped, runs = collecting("stopped"), 0
    while True:
        try:
            folder = stopped(1)  # one more shard every time
            break
        except Stop:
            runs += 1
    assert runs >= 4
    assert content(folder) == expected


def test_what_is_in_finished_windows_is_not_opened_again(collecting):
    stopped = collecting("stopped")
    with pytest.raises(Stop):
        stopped(10**6, progress=stop_after(4 * WINDOW))
    shards = len(list((stopped.folder / "collect").glob("shard-*")))
    assert shards >= 2
    before = set(stopped.opened)
    folder = stopped()
    again = before & set(stopped.opened)
    assert again < before
    assert before | set(stopped.opened) == {n for n in range(N) if n % 3}
    # those of the windows that no finished shard has, or that were read ahead of the stop
    assert len(before - again) >= WINDOW * BATCH // 3
    assert Store(folder).n_items == N


def stop_after(batches):
    def progress(steps, _total):
        for number, step in enumerate(steps):
            if number == batches:
                raise Stop
            yield step

    return progress


@pytest.mark.parametrize("changed", [{"batch_size": 3}, {"tokens_wanted": 800}, {"seed": 5}])
def test_a_collection_of_other_settings_begins_anew(changed, collecting):
    expected = content(collecting("whole", **changed)())
    stopped = collecting("stopped")
    with pytest.raises(Stop):
        stopped(3)
    found = content(stopped(**changed))
    assert found == expected


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"other")])
def test_a_shard_that_was_damaged_meanwhile_is_made_again(damage, collecting):
    expected = content(collecting("whole")())
    stopped = collecting("stopped")
    with pytest.raises(Stop):
        stopped(3)
    damage(stopped.folder / "collect" / "shard-00001.safetensors")
    assert content(stopped()) == expected


def test_a_record_that_names_other_files_touches_none(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("words")
    folder = tmp_path / "store"
    folder.mkdir()
    shard = {"file": "../precious", "sha256": "", "tokens": 1}
    record = {"key": "other", "done": {"shards": [shard]}, "mark": {}}
    writer.write_json(folder / PARTIAL, record)
    writer.StoreWriter(folder, identity={"key": "mine"})
    assert precious.read_text() == "words"


def test_without_a_key_nothing_is_left_to_go_on_from(transformer, tmp_path):
    collect.collect_tokens(transformer, some_items([])[:40], READOUTS[0], tmp_path, BATCH)
    assert not (tmp_path / PARTIAL).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from patch_retriever import files
from test_collect_resumes import *
collect.StoreWriter = partial(writer.StoreWriter, tokens_per_shard=300)
real = writer.write_tensors
def write(path, tensors):
    if path.name == "shard-00002.safetensors":
        files.write(path, lambda p: (p.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL)))
    real(path, tensors)
writer.write_tensors = write
collect_sampled(load_backbone(sys.argv[1]), Path(sys.argv[2]))
"""


def collect_sampled(transformer, folder):
    items, readout = some_items([]), READOUTS[1]
    collect.collect_tokens(transformer, items, readout, folder, BATCH, tokens_wanted=900, key="key")
    return content(folder)


def test_killed_it_goes_on_in_another_process_and_ends_with_the_same_bytes(
    transformer, random_model, tmp_path
):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    command = [sys.executable, "-c", KILLED, str(random_model), str(tmp_path / "killed")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / PARTIAL).is_file()
    assert list((tmp_path / "killed").glob(".shard-00002*/shard-00002.safetensors"))
    expected = collect_sampled(transformer, tmp_path / "whole")
    assert collect_sampled(transformer, tmp_path / "killed") == expected


# what is stored


def test_a_sampled_collection_does_not_depend_on_batches_and_keeps_every_role(
    transformer, tmp_path
):
    """Positions are recovered by comparing with all tokens; means are of all of them."""
    items, readout = some_items([]), READOUTS[1]
    stores = []
    for name, batch_size, wanted in (("all", 4, None), ("a", 4, 8 * N), ("b", 7, 8 * N)):
        collect.collect_tokens(
            transformer, items, readout, tmp_path / name, batch_size, tokens_wanted=wanted
        )
        stores.append(Store(tmp_path / name))
    everything, *sampled = (all_of(store) for store in stores)
    chosen = []
    for columns in sampled:
        found = []
        for item in range(N):
            own, of_all = (c["activations_td"][c["items_t"] == item] for c in (columns, everything))
            distances = torch.cdist(own.float(), of_all.float())
            assert float(distances.min(1).values.max()) < 0.1  # other batches, other roundings
            found.append(sorted(distances.argmin(1).tolist()))
        chosen.append(found)
    same = sum(a == b for a, b in zip(*chosen, strict=True))
    assert same >= 0.9 * N  # alike image tokens cannot be told apart
    counts = torch.bincount(sampled[0]["items_t"], minlength=N)
    assert counts.max() == 8
    for item in range(N):
        roles = [
            {ROLES[r] for r in c["roles_t"][c["items_t"] == item].tolist()}
            for c in (sampled[0], everything)
        ]
        assert roles[0] == roles[1]
    for store in stores[1:]:
        assert torch.allclose(store.pooled_vectors(), stores[0].pooled_vectors(), atol=0.02)
    assert stores[0].sinks.tokens == stores[1].sinks.tokens == stores[0].n_tokens


def all_of(store):
    shards = [store.read(number) for number in range(len(store.shards))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
