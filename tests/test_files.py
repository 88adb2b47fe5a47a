"""Half-written is not written: whatever stops a writer, the old file stays and nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from patch_retriever.errors import UserError
from patch_retriever.files import (
    LOCK,
    file_hash,
    lock,
    value_hash,
    write,
    write_json,
    write_tensors,
    write_text,
)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_file_is_written_in_a_folder_that_is_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "grün")
    assert content(tmp_path / "a" / "b") == {"c.txt": "grün".encode()}


def test_a_new_file_takes_the_place_of_the_old(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new")
    assert content(tmp_path) == {"a.txt": b"new"}


def test_while_it_is_written_the_old_file_is_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def writer(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent.parent == path.parent

    write(path, writer)
    assert content(tmp_path) == {"a.txt": b"new"}


@pytest.mark.parametrize(
    "reason",
    [
        OSError(errno.EIO, "I/O error"),
        UserError("a bad row"),
        ValueError("a bug"),
        KeyboardInterrupt(),
    ],
    ids=lambda reason: type(reason).__name__,
)
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, reason):
    (tmp_path / "a.txt").write_text("old")

    def writer(temporary: Path) -> None:
        temporary.write_text("ne")
        raise reason

    with pytest.raises(UserError if isinstance(reason, OSError) else type(reason)):
        write(tmp_path / "a.txt", writer)
    assert content(tmp_path) == {"a.txt": b"old"}


def test_a_writer_that_writes_nothing_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(UserError, match=r"a\.txt: cannot be written"):
        write(tmp_path / "a.txt", lambda _: None)
    assert content(tmp_path) == {"a.txt": b"old"}


def no_space(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "write_text", "replace"])
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, call):
    (tmp_path / "a.txt").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os if call == "fsync" else Path, call, no_space)
        with pytest.raises(UserError) as caught:
            write_text(tmp_path / "a.txt", "new")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'a.txt'}: cannot be written (No space left on device)")
    assert "free space" in line
    assert "\n" not in line
    assert content(tmp_path) == {"a.txt": b"old"}


def test_a_full_disk_while_tensors_are_written_is_told(tmp_path, monkeypatch):
    def save_file(_tensors, path: Path, _metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be written .*No space left"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert content(tmp_path) == {}


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"a\.txt: cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "new")


def test_a_folder_in_the_place_of_the_file_is_told(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match=r"a\.txt: cannot be written"):
        write_text(tmp_path / "a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from patch_retriever.files import write
def half(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write(Path(sys.argv[1]), half)
"""


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    path = tmp_path / "a.txt"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "a.txt").read_text() == "half"
    write_text(tmp_path / "other.txt", "another file")
    assert left.is_dir()
    write_text(path, "new")
    assert content(tmp_path) == {"a.txt": b"new", "other.txt": b"another file"}


def test_writers_at_the_same_time_share_nothing_and_the_last_one_is_there(tmp_path):
    path = tmp_path / "a.txt"

    def slow(temporary: Path) -> None:
        temporary.write_text("first")
        write_text(path, "second")  # as another process would
        assert path.read_text() == "second"
        assert temporary.read_text() == "first"

    write(path, slow)
    assert content(tmp_path) == {"a.txt": b"first"}


def test_no_link_that_was_laid_there_is_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (".a.txt.partial", "a.txt"):
        (folder / name).symlink_to(victim)
    write_text(folder / "a.txt", "new")
    assert victim.read_text() == "precious"
    assert (folder / "a.txt").read_text() == "new"
    assert not (folder / "a.txt").is_symlink()


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / LOCK).symlink_to(victim)
    with pytest.raises(UserError, match=f"{LOCK}: a link"):
        lock(tmp_path, "busy")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 250, "[a]*?.txt", "ü" * 100])
def test_any_name_that_a_folder_takes_is_written(tmp_path, name):
    write_text(tmp_path / name, "new")
    write_text(tmp_path / name, "again")
    assert content(tmp_path) == {name: b"again"}


def test_an_empty_text_is_written(tmp_path):
    write_text(tmp_path / "a.txt", "")
    assert content(tmp_path) == {"a.txt": b""}


def test_json_is_read_back_and_does_not_depend_on_the_order_of_keys(tmp_path):
    values = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_json(tmp_path / "a.json", values)
    write_json(tmp_path / "b.json", dict(reversed(values.items())))
    assert json.loads((tmp_path / "a.json").read_text()) == values
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_tensors_are_read_back_whatever_their_layout(tmp_path):
    rows = torch.arange(6.0).reshape(2, 3)
    tensors = {"t": rows.T, "slice": rows[:, 1], "grad": rows.clone().requires_grad_()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert {name: t.tolist() for name, t in found.items()} == {
        name: t.tolist() for name, t in tensors.items()
    }


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64)}
    write_tensors(tmp_path / "1", tensors)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_files_hash_is_the_sha256_of_its_bytes(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    assert file_hash(tmp_path / "a") == hashlib.sha256(data).hexdigest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True)
@given(JSON, JSON)
def test_values_have_equal_hashes_exactly_when_they_are_the_same_json(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (value_hash(one) == value_hash(other)) == same


def test_the_order_of_keys_does_not_change_a_hash_and_the_order_of_a_list_does():
    assert value_hash({"a": 1, "b": 2}) == value_hash({"b": 2, "a": 1})
    assert value_hash([1, 2]) != value_hash([2, 1])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_tensors_have_the_permissions_of_any_other_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(2)})
        write_text(tmp_path / "t.txt", "x")
    finally:
        os.umask(before)
    for name in ("t.safetensors", "t.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
