"""Index folders: what they find, grow by and lose; what is refused; what a stop leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.retrieval import embeddings
from patch_retriever.retrieval.index.indexing import IndexOptions, add_corpus, index_corpus
from patch_retriever.retrieval.index.manifest import MANIFEST, MadeBy, Manifest
from patch_retriever.retrieval.index.removing import remove_items
from patch_retriever.retrieval.index.search import SavedIndex
from toy_encoder import ToyEncoder, corpus, pictures

QUERIES = [Item(f"question {i}") for i in range(7)]
KINDS = ["flat", "ivf", "hnsw", "sq8", "rabitq", "IVF2,PQ2x4", "RR8,IVF2,PQ2x4", "IVF2,SQ8"]
CANNOT_REMOVE = ["hnsw"]


def make(folder, encoder=None, source=None, factory="flat", shard_items=None, **more):
    options = IndexOptions(factory, shard_items=shard_items)
    return index_corpus(
        source or corpus(*range(100)), encoder or ToyEncoder(), folder, options, **more
    )


def found(folder, k=5, encoder=None, queries=QUERIES):
    """Ids and scores of the items that are found."""
    encoder = encoder or ToyEncoder()
    index = SavedIndex(folder, encoder)
    scores, numbers = index.search(encoder.embed(queries, "query"), k)
    entries = index.items.entries(numbers[numbers >= 0].tolist())
    return [[entries[n].id for n in row if n >= 0] for row in numbers.tolist()], scores


def brute_force(source, k=5, encoder=None, queries=QUERIES):
    encoder = encoder or ToyEncoder()
    scores = encoder.embed(queries, "query") @ encoder.embed(source.items, "document").T
    best = np.argsort(-scores, axis=1)[:, :k]
    return [[source.ids[i] for i in row] for row in best], np.take_along_axis(scores, best, axis=1)


def assert_exact(folder, source, encoder=None):
    ids, scores = found(folder, encoder=encoder)
    expected_ids, expected = brute_force(source, encoder=encoder)
    assert ids == expected_ids
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".faiss", ".parquet"))


def share_found(folder, source):
    ids, _ = found(folder)
    expected, _ = brute_force(source)
    return np.mean([np.isin(e, i).mean() for e, i in zip(expected, ids, strict=True)])


@pytest.mark.parametrize("shard_items", [None, 1, 33, 50, 100, 1000])
def test_an_index_finds_what_brute_force_finds_in_any_number_of_files(tmp_path, shard_items):
    done = make(tmp_path / "ix", shard_items=shard_items)
    assert (done.count, done.added, done.encoded) == (100, 100, 100)
    assert_exact(tmp_path / "ix", corpus(*range(100)))
    shards = -(-100 // (shard_items or 100))
    assert len(files(tmp_path / "ix")) == 1 + 2 * shards


@pytest.mark.parametrize("factory", KINDS)
def test_every_kind_is_saved_mapped_and_added_to(tmp_path, factory):
    folder = tmp_path / "ix"
    first, both = corpus(*range(100)), corpus(*range(150))
    make(folder, factory=factory, source=first, shard_items=70)
    least = 0.25 if factory == "rabitq" or "PQ" in factory else 0.9
    assert share_found(folder, first) >= least
    assert add_corpus(both, ToyEncoder(), folder).added == 50
    assert share_found(folder, both) >= least
    # all are there: as many as asked for are found, none twice
    ids, _ = found(folder, k=150)
    if factory != "hnsw":
        assert [sorted(row) for row in ids] == [sorted(both.ids)] * len(QUERIES)


@pytest.mark.parametrize("factory", [f for f in KINDS if f not in CANNOT_REMOVE])
def test_what_is_removed_is_not_found_any_more(tmp_path, factory):
    folder = tmp_path / "ix"
    make(folder, factory=factory, shard_items=30)
    gone = [f"item-{i}" for i in (0, 5, 29, 30, 77, 99)]
    assert remove_items(folder, gone) == 94
    ids, _ = found(folder, k=100)
    left = sorted(set(corpus(*range(100)).ids) - set(gone))
    assert [sorted(row) for row in ids] == [left] * len(QUERIES)
    if factory == "flat":
        assert_exact(folder, corpus(*(i for i in range(100) if f"item-{i}" not in gone)))


@pytest.mark.parametrize("factory", CANNOT_REMOVE)
def test_a_kind_that_cannot_remove_says_so_and_stays_whole(tmp_path, factory):
    make(tmp_path / "ix", factory=factory)
    before = files(tmp_path / "ix")
    with pytest.raises(UserError, match="FAISS cannot remove from HNSW32; index what shall stay"):
        remove_items(tmp_path / "ix", ["item-1"])
    assert files(tmp_path / "ix") == before
    assert len(SavedIndex(tmp_path / "ix", ToyEncoder())) == 100


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 19))), min_size=1, max_size=6))
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_adding_and_removing_in_any_order_leaves_what_a_new_index_would_hold(
    tmp_path_factory, steps
):
    folder = tmp_path_factory.mktemp("steps") / "ix"
    held = {20, 21}
    make(folder, source=corpus(*held), shard_items=4)
    for adds, numbers in steps:
        if adds:
            add_corpus(corpus(*sorted(numbers)), ToyEncoder(), folder)
            held |= numbers
        else:
            remove_items(folder, [f"item-{n}" for n in numbers & held])
            held -= numbers
        assert len(SavedIndex(folder)) == len(held)
        if len(held) >= 5:
            ids, scores = found(folder)
            expected_ids, expected = brute_force(corpus(*sorted(held)))
            np.testing.assert_allclose(scores, expected, atol=1e-5)
            assert [set(row) for row in ids] == [set(row) for row in expected_ids]


def test_an_id_that_is_not_there_removes_nothing(tmp_path):
    make(tmp_path / "ix")
    with pytest.raises(UserError, match=r"no item 'no' and 1 more in it; nothing is removed"):
        remove_items(tmp_path / "ix", ["item-1", "no", "nor this"])
    assert len(SavedIndex(tmp_path / "ix")) == 100


def test_everything_can_be_removed_and_added_again(tmp_path):
    source = corpus(*range(10))
    make(tmp_path / "ix", source=source)
    assert remove_items(tmp_path / "ix", source.ids) == 0
    assert found(tmp_path / "ix")[0] == [[]] * len(QUERIES)
    encoder = ToyEncoder()
    assert add_corpus(source, encoder, tmp_path / "ix").encoded == 0  # vectors were kept
    assert_exact(tmp_path / "ix", source)


def test_an_item_keeps_its_text_and_the_place_of_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = pictures(Path(), 3)
    make(tmp_path / "ix", source=source)
    entries = SavedIndex(tmp_path / "ix").items.entries([0, 2])
    assert entries[2].picture == str(tmp_path / "2.png")
    assert entries[0].text is None
    assert entries[0].content == source.items[0].content_hash()[:32]


def test_the_same_item_under_two_ids_is_encoded_once(tmp_path):
    source = corpus(1, 2)
    source.ids.append("again")
    source.items.append(source.items[0])
    done = make(tmp_path / "ix", source=source)
    assert (done.count, done.encoded) == (3, 2)


def test_search_settings_are_kept_and_changed(tmp_path):
    make(tmp_path / "ix", source=corpus(*range(400)), factory="IVF8,Flat")
    assert Manifest.read(tmp_path / "ix" / MANIFEST).search == {"nprobe": 8}
    index, asked = SavedIndex(tmp_path / "ix"), ToyEncoder().embed(QUERIES, "query")
    wide, narrow = index.search(asked, 50)[1], index.search(asked, 50, {"nprobe": 1})[1]
    assert (wide >= 0).all()
    assert (narrow < 0).any()  # a single list holds fewer
    with pytest.raises(UserError, match="efSearch=4: not a search setting of this index"):
        index.search(asked, 5, {"efSearch": 4})


def test_queries_of_another_dimension_are_refused(tmp_path):
    make(tmp_path / "ix")
    with pytest.raises(UserError, match="holds vectors of 8 dimensions, the query has 3"):
        SavedIndex(tmp_path / "ix").search(np.ones((1, 3), np.float32), 5)


def test_no_query_finds_nothing(tmp_path):
    make(tmp_path / "ix")
    assert SavedIndex(tmp_path / "ix").search(np.ones((0, 8), np.float32), 5)[0].shape == (0, 5)


# What is refused


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (
            ToyEncoder("other", head=2),
            "with another patch, or other prompts, than other has, by toy",
        ),
        (ToyEncoder("other", trunk="another"), "by another model than other, by toy"),
    ],
)
def test_another_model_or_patch_is_refused_by_name(tmp_path, other, why):
    make(tmp_path / "ix")
    for act in (
        lambda: SavedIndex(tmp_path / "ix", other),
        lambda: add_corpus(corpus(1000), other, tmp_path / "ix"),
    ):
        with pytest.raises(UserError, match=why) as raised:
            act()
        assert f"index-migrate {tmp_path / 'ix'} -m other" in str(raised.value)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["index-00001.faiss", "items-00000.parquet", "trained.faiss"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    folder = tmp_path / "ix"
    make(folder, shard_items=50)
    SavedIndex(folder)  # it has been found whole before
    DAMAGES[damage](folder / name)
    for act in (
        lambda: SavedIndex(folder),
        lambda: remove_items(folder, ["item-1"]),
        lambda: add_corpus(corpus(1000), ToyEncoder(), folder),
    ):
        with pytest.raises(UserError, match=damage) as raised:
            act()
        assert str(raised.value).startswith(f"{folder / name}: ")


def test_a_change_is_seen_even_where_its_time_is_set_back(tmp_path):
    make(tmp_path / "ix")
    SavedIndex(tmp_path / "ix")
    path = tmp_path / "ix" / "index-00000.faiss"
    before = path.stat()
    DAMAGES["changed"](path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="changed since it was written"):
        SavedIndex(tmp_path / "ix")


def test_files_are_hashed_once_and_again_when_touched(tmp_path, monkeypatch):
    from patch_retriever.retrieval.index import manifest

    make(tmp_path / "ix")
    hashed: list[str] = []
    real = manifest.file_hash
    monkeypatch.setattr(
        manifest, "file_hash", lambda path: (hashed.append(path.name), real(path))[1]
    )
    SavedIndex(tmp_path / "ix")
    assert len(hashed) == 3
    SavedIndex(tmp_path / "ix")
    assert len(hashed) == 3
    (tmp_path / "ix" / "trained.faiss").touch()
    SavedIndex(tmp_path / "ix")
    assert hashed[3:] == ["trained.faiss"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "damaged; index the items again"),
        ("[]", "damaged; index the items again"),
        ('{"format": "patch-retriever index", "version": 99}', "an index of another version"),
        ('{"format": "patch-retriever index", "version": 1, "count": 1}', "damaged"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, content, why):
    make(tmp_path / "ix")
    (tmp_path / "ix" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=f"{MANIFEST}: {why}"):
        SavedIndex(tmp_path / "ix")


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match="no index"):
        SavedIndex(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and no index; name another folder"):
        make(tmp_path)
    (tmp_path / "lock").touch()
    (tmp_path / "embeddings").mkdir()
    for name in ("items-mine.parquet", "items-00000.parquet"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not empty and no index; name another folder"):
        make(tmp_path)
    assert (tmp_path / "items-00000.parquet").read_text() == "mine"
    with pytest.raises(UserError, match=r"notes\.txt: a file; name a folder"):
        make(tmp_path / "notes.txt")


def test_files_of_others_stay_where_an_index_is_made_and_grows(tmp_path):
    folder = tmp_path / "ix"
    make(folder)
    mine = ("items-mine.parquet", "index-old.faiss", "trained-by-hand.faiss")
    for name in mine:
        (folder / name).write_text("mine")
    add_corpus(corpus(1000, 1001), ToyEncoder(), folder)
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert found(folder)[0] == brute_force(corpus(*range(100), 1000, 1001))[0]


def test_the_same_again_is_done_already_and_other_items_are_refused(tmp_path):
    make(tmp_path / "ix")
    said: list[str] = []
    again = make(tmp_path / "ix", say=said.append)
    assert (again.encoded, said[-1]) == (0, f"{tmp_path / 'ix'}: done before")
    for other in ({"source": corpus(1, 2)}, {"factory": "sq8"}):
        with pytest.raises(UserError, match="holds an index of other items or settings"):
            make(tmp_path / "ix", **other)
    assert_exact(tmp_path / "ix", corpus(*range(100)))


def test_an_index_by_another_model_is_refused_before_anything_is_encoded(tmp_path):
    make(tmp_path / "ix")
    other = ToyEncoder("other", head=2)
    with pytest.raises(UserError, match="holds an index by toy; name another folder"):
        make(tmp_path / "ix", other)
    assert other.encoded == []


def test_what_changes_an_index_does_not_make_a_folder(tmp_path):
    for act in (
        lambda: remove_items(tmp_path / "ix", ["a"]),
        lambda: add_corpus(corpus(1), ToyEncoder(), tmp_path / "ix"),
        lambda: SavedIndex(tmp_path / "ix"),
    ):
        with pytest.raises(UserError, match=f"{tmp_path / 'ix'}: no index"):
            act()
    assert not (tmp_path / "ix").exists()


@pytest.mark.parametrize("ending", ["", "@base"])
def test_the_model_is_found_again_from_another_folder(tmp_path, monkeypatch, ending):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    made_by = MadeBy.of(ToyEncoder(f"model{ending}"), "document")
    assert made_by.model == f"{tmp_path / 'model'}{ending}"
    assert MadeBy.of(ToyEncoder("org/hub"), "document").model == "org/hub"


def test_adding_what_is_there_changes_nothing(tmp_path):
    make(tmp_path / "ix")
    before = (tmp_path / "ix" / MANIFEST).read_bytes()
    encoder = ToyEncoder()
    done = add_corpus(corpus(*range(50, 100)), encoder, tmp_path / "ix")
    assert (done.added, done.there_before, encoder.encoded) == (0, 50, [])
    assert (tmp_path / "ix" / MANIFEST).read_bytes() == before


def test_an_id_with_another_content_is_refused(tmp_path):
    make(tmp_path / "ix")
    with pytest.raises(UserError, match="'item-3': in the index with another content; remove it"):
        add_corpus(corpus(3, prefix="other"), ToyEncoder(), tmp_path / "ix")


def test_an_unreadable_picture_is_named_or_left_out(tmp_path):
    source = pictures(tmp_path, 5)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png: no such image file"):
        make(tmp_path / "ix", source=source)
    done = make(tmp_path / "ix", source=source, skip_bad=True)
    assert (done.count, done.skipped) == (4, (f"{tmp_path / '2.png'}: no such image file",))
    ids, _ = found(tmp_path / "ix")
    assert set(ids[0]) == {"0.png", "1.png", "3.png", "4.png"}


def test_with_no_usable_item_there_is_no_index(tmp_path):
    source = pictures(tmp_path, 2)
    for item in source.items:
        item.picture.path.unlink()
    with pytest.raises(UserError, match=r"no usable item among 2; .*0\.png: no such image file"):
        make(tmp_path / "ix", source=source, skip_bad=True)


def test_a_factory_that_does_not_fit_is_refused_before_anything_is_encoded(tmp_path):
    encoder = ToyEncoder()
    with pytest.raises(UserError, match="index 'IVF500,Flat': cannot be trained on 100 items"):
        make(tmp_path / "ix", encoder, factory="IVF500,Flat")
    assert not (tmp_path / "ix").exists()
    assert make(tmp_path / "ix", encoder, factory="flat").encoded == 100
    assert_exact(tmp_path / "ix", corpus(*range(100)))


# What a stop leaves


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from toy_encoder import ToyEncoder, corpus
from patch_retriever.retrieval import embeddings
from patch_retriever.retrieval import embeddings
from patch_retriever.retrieval.index.indexing import IndexOptions, add_corpus, index_corpus

embeddings.ROWS_PER_SHARD = 10

def said(line):
    print(line, flush=True)
    if line.startswith({stop!r}):
        time.sleep(60)

class Slow(ToyEncoder):
    def pooled(self, items, *more):
        said(f"encoding after {{len(self.encoded)}}")
        return super().pooled(items, *more)

folder, source = Path({folder!r}), corpus(*range(100))
if {add!r}:
    add_corpus(source, Slow(), folder, batch_size=10, say=said)
else:
    how = IndexOptions("IVF2,Flat", shard_items=20)
    index_corpus(source, Slow(), folder, how, batch_size=10, say=said)
"""


def kill_when(folder, stop, add=False):
    """Index in another process and kill it as soon as it says `stop`."""
    tests = str(Path(__file__).parents[2])
    code = KILLED.format(tests=tests, stop=stop, folder=str(folder), add=add)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(stop):
                break
        else:
            pytest.fail(f"it never said {stop!r}")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_while_it_encodes_it_encodes_the_rest(tmp_path):
    folder = tmp_path / "ix"
    kill_when(folder, "encoding after 40")
    with pytest.raises(UserError, match="no index"):
        SavedIndex(folder)
    encoder = ToyEncoder()
    assert make(folder, encoder, factory="IVF2,Flat", shard_items=20).encoded == 60
    assert_exact(folder, corpus(*range(100)))


def test_killed_while_it_builds_it_keeps_the_finished_files(tmp_path):
    folder = tmp_path / "ix"
    kill_when(folder, "index-00002.faiss")
    with pytest.raises(UserError, match="its index is not finished; run the same command again"):
        SavedIndex(folder)
    finished = {n: (folder / n).stat().st_ino for n in files(folder)}
    assert len(finished) == 7
    said: list[str] = []
    done = make(folder, factory="IVF2,Flat", shard_items=20, say=said.append)
    assert done.encoded == 0
    assert f"{folder}: goes on after 60 items" in said
    assert {n: (folder / n).stat().st_ino for n in finished} == finished
    assert_exact(folder, corpus(*range(100)))
    whole = tmp_path / "whole"
    make(whole, factory="IVF2,Flat", shard_items=20)
    for name in files(whole):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_file_that_was_damaged_since_is_named_and_built_again(tmp_path):
    folder = tmp_path / "ix"
    kill_when(folder, "index-00002.faiss")
    DAMAGES["truncated"](folder / "index-00001.faiss")
    said: list[str] = []
    make(folder, factory="IVF2,Flat", shard_items=20, say=said.append)
    (line,) = (line for line in said if "truncated" in line)
    assert line.startswith(f"{folder / 'index-00001.faiss'}: ")
    assert line.endswith("begun again")
    assert_exact(folder, corpus(*range(100)))


def test_killed_while_it_adds_the_old_index_stands_and_it_goes_on(tmp_path):
    folder, old = tmp_path / "ix", corpus(*range(30))
    make(folder, source=old, shard_items=20)
    kill_when(folder, "index-00003.faiss", add=True)
    assert_exact(folder, old)
    said: list[str] = []
    done = add_corpus(corpus(*range(100)), ToyEncoder(), folder, say=said.append)
    assert (done.count, done.encoded) == (100, 0)
    assert any("goes on after" in line for line in said)
    assert_exact(folder, corpus(*range(100)))
    assert len(files(folder)) == 1 + 2 * 5  # nothing is left of the old last file


def test_a_draft_of_other_items_is_thrown_away(tmp_path):
    folder = tmp_path / "ix"
    kill_when(folder, "index-00002.faiss")
    make(folder, source=corpus(*range(50)))
    assert files(folder) == ["index-00000.faiss", "items-00000.parquet", "trained.faiss"]
    assert_exact(folder, corpus(*range(50)))


def test_a_full_disk_is_one_line_and_what_is_finished_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "ROWS_PER_SHARD", 100)  # so that the index is too large first
    folder, encoder = tmp_path / "ix", ToyEncoder()
    make(folder, encoder, source=corpus(*range(10)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(UserError, match=r"index-0000\d\.faiss: cannot be written") as raised:
            add_corpus(corpus(*range(1000)), encoder, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert_exact(folder, corpus(*range(10)))
    before = len(encoder.encoded)
    add_corpus(corpus(*range(1000)), encoder, folder)
    assert len(encoder.encoded) == before
    assert_exact(folder, corpus(*range(1000)))


def test_one_process_at_a_time_changes_an_index(tmp_path):
    import fcntl

    make(tmp_path / "ix")
    with (tmp_path / "ix" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is changing this index"):
            remove_items(tmp_path / "ix", ["item-1"])


def test_dropped_embeddings_are_gone_and_stay_gone(tmp_path):
    folder = tmp_path / "ix"
    index_corpus(corpus(*range(10)), ToyEncoder(), folder, IndexOptions(keep_embeddings=False))
    assert not (folder / "embeddings").exists()
    encoder = ToyEncoder()
    done = add_corpus(corpus(*range(15)), encoder, folder)
    assert (done.added, len(encoder.encoded)) == (5, 5)  # what is there is not encoded again
    assert not (folder / "embeddings").exists()
    assert_exact(folder, corpus(*range(15)))


def test_the_manifest_says_what_made_the_index(tmp_path):
    make(tmp_path / "ix")
    values = json.loads((tmp_path / "ix" / MANIFEST).read_text())
    assert (values["format"], values["count"], values["factory"], values["dimension"]) == (
        "patch-retriever index",
        100,
        "Flat",
        8,
    )
    made_by = values["made_by"]
    assert (made_by["model"], made_by["role"], made_by["fingerprint"]) == (
        "toy",
        "document",
        ToyEncoder().fingerprint,
    )
    assert made_by["prompts"] == {"query": "query", "document": "document"}
