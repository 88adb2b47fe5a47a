"""The run folder: what is finished is not done again, what is damaged or changed is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patch_retriever.errors import UserError
from patch_retriever.runs import DONE, MARKER, PARTIAL, Run, check_out, is_ours


class Kitchen:
    """Two stages, the second after the first, and what was done and said in the last run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worked: list[str] = []
        self.said: list[str] = []

    def run(self, flour: int = 1, sugar: int = 1, stop_at: str = "") -> tuple[Path, Path]:
        self.worked, self.said = [], []

        def work(name: str, text: str):
            def write(folder: Path) -> None:
                self.worked.append(name)
                assert list(folder.iterdir()) == []
                (folder / "sub").mkdir()
                (folder / "sub" / "first.txt").write_text(text)
                if stop_at == name:
                    raise KeyboardInterrupt
                (folder / "last.txt").write_text(text)

            return write

        with Run(self.folder / "run", self.said.append) as run:
            dough = run.stage("dough", work("dough", f"flour {flour}"), flour=flour)
            cake = run.stage("cake", work("cake", f"sugar {sugar}"), ("dough",), sugar=sugar)
            run.stage("wash", work("wash", "clean"), water=1)
        return dough, cake


@pytest.fixture
def kitchen(tmp_path) -> Kitchen:
    return Kitchen(tmp_path)


@pytest.fixture
def finished(kitchen) -> Kitchen:
    kitchen.run()
    assert kitchen.worked == ["dough", "cake", "wash"]
    return kitchen


def test_a_stage_leaves_its_files_in_its_folder(kitchen):
    dough, cake = kitchen.run()
    assert dough == kitchen.folder / "run" / "dough"
    assert (dough / "sub" / "first.txt").read_text() == "flour 1"
    assert (cake / "last.txt").read_text() == "sugar 1"


def test_what_is_finished_is_not_done_again(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*.txt")}
    assert finished.run() == (finished.folder / "run/dough", finished.folder / "run/cake")
    assert finished.worked == []
    assert {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*.txt")} == before


def test_it_is_said_what_is_done_and_what_was_done_before(finished):
    finished.run(sugar=2)
    assert finished.said == ["dough: done before", "cake", "wash: done before"]


def test_changed_inputs_are_worked_on_again_with_all_that_comes_after(finished):
    dough, cake = finished.run(flour=2)
    assert finished.worked == ["dough", "cake"]
    assert (dough / "last.txt").read_text() == "flour 2"
    assert (cake / "last.txt").read_text() == "sugar 1"


def test_a_change_of_a_later_stage_leaves_the_earlier_alone(finished):
    finished.run(sugar=2)
    assert finished.worked == ["cake"]


def test_going_back_to_the_old_inputs_does_not_find_the_new_files(finished):
    finished.run(flour=2)
    dough, _ = finished.run(flour=1)
    assert finished.worked == ["dough", "cake"]
    assert (dough / "last.txt").read_text() == "flour 1"


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("name", ["last.txt", "sub/first.txt"])
def test_a_damaged_file_is_named_and_its_stage_alone_is_built_again(finished, name):
    path = finished.folder / "run" / "dough" / name
    damage(path)
    finished.run()
    assert finished.worked == ["dough"]
    assert path.read_text() == "flour 1"
    assert finished.said[0].startswith(f"{path}: damaged")


def test_a_missing_file_is_named_and_its_stage_is_built_again(finished):
    path = finished.folder / "run" / "cake" / "last.txt"
    path.unlink()
    finished.run()
    assert finished.worked == ["cake"]
    assert any(line.startswith(f"{path}: ") for line in finished.said)


def test_a_truncated_file_is_built_again(finished):
    path = finished.folder / "run" / "cake" / "last.txt"
    path.write_text("")
    finished.run()
    assert finished.worked == ["cake"]


@pytest.mark.parametrize("record", ["", "{", "[]", "null", "{}", '{"key": "other", "files": {}}'])
def test_a_damaged_record_is_built_again(finished, record):
    (finished.folder / "run" / "cake" / "done.json").write_text(record)
    finished.run()
    assert finished.worked == ["cake"]


def test_a_record_that_lost_its_files_is_built_again(finished):
    path = finished.folder / "run" / "cake" / "done.json"
    path.write_text(json.dumps({"key": json.loads(path.read_text())["key"]}))
    finished.run()
    assert finished.worked == ["cake"]


@pytest.mark.parametrize(
    ("stopped", "left"), [("dough", ["dough", "cake", "wash"]), ("cake", ["cake", "wash"])]
)
def test_a_stopped_run_goes_on_where_it_stood(kitchen, stopped, left):
    with pytest.raises(KeyboardInterrupt):
        kitchen.run(stop_at=stopped)
    assert not (kitchen.folder / "run" / stopped / "done.json").exists()
    kitchen.run()
    assert kitchen.worked == left


def test_a_stopped_run_ends_with_the_same_files_as_an_unbroken_one(kitchen, tmp_path_factory):
    with pytest.raises(KeyboardInterrupt):
        kitchen.run(stop_at="cake")
    kitchen.run()
    unbroken = Kitchen(tmp_path_factory.mktemp("unbroken"))
    unbroken.run()
    found = [
        {str(p.relative_to(k.folder)): p.read_bytes() for p in k.folder.rglob("*") if p.is_file()}
        for k in (kitchen, unbroken)
    ]
    assert found[0] == found[1]


def test_what_a_killed_run_left_of_a_stage_is_gone(kitchen):
    folder = kitchen.folder / "run" / "dough"
    folder.mkdir(parents=True)
    (folder / "half").write_text("of an older run")
    kitchen.run()
    assert not (folder / "half").exists()


class Halves:
    """A stage that can go on: it keeps its key and writes one file after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []
        self.said: list[str] = []

    def run(self, flour: int = 1, stop: bool = False) -> Path:
        with Run(self.folder / "run", self.said.append) as run:

            def work(folder: Path) -> None:
                self.found = sorted(path.name for path in folder.iterdir())
                (folder / PARTIAL).write_text(json.dumps({"key": run.key("dough"), "done": 1}))
                (folder / "first.txt").write_text("first")
                if stop:
                    raise KeyboardInterrupt
                (folder / "last.txt").write_text("last")
                (folder / PARTIAL).unlink()

            return run.stage("dough", work, flour=flour)


def test_work_that_keeps_its_key_finds_its_folder_as_it_left_it(tmp_path):
    halves = Halves(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        halves.run(stop=True)
    folder = halves.run()
    assert halves.found == ["first.txt", PARTIAL]
    assert halves.said[-1] == "dough: goes on where it stood"
    assert sorted(json.loads((folder / DONE).read_text())["files"]) == ["first.txt", "last.txt"]
    halves.run()
    assert halves.said[-1] == "dough: done before"


def test_work_for_other_inputs_begins_in_an_empty_folder(tmp_path):
    halves = Halves(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        halves.run(stop=True)
    halves.run(flour=2)
    assert halves.found == []


@pytest.mark.parametrize("record", ["", "{", "[]", "null", "{}", '{"key": null}'])
def test_a_damaged_record_of_unfinished_work_is_nothing_to_go_on_from(tmp_path, record):
    halves = Halves(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        halves.run(stop=True)
    (tmp_path / "run" / "dough" / PARTIAL).write_text(record)
    halves.run()
    assert halves.found == []


def silent(_line: str) -> None:
    pass


def test_one_run_at_a_time(tmp_path):
    with Run(tmp_path / "run", silent):
        with pytest.raises(UserError, match="another build is writing here") as caught:
            Run(tmp_path / "run", silent).__enter__()
        assert str(caught.value).startswith(f"{tmp_path}: ")


def test_after_a_run_the_next_may_come_even_if_it_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path / "run", silent):
        _ = 1 / 0
    with Run(tmp_path / "run", silent) as run:
        assert run.folder.is_dir()


def test_other_folders_are_free(tmp_path):
    with Run(tmp_path / "one" / "run", silent), Run(tmp_path / "two" / "run", silent):
        assert (tmp_path / "two" / "run").is_dir()


HOLD = """
import sys
from pathlib import Path
from patch_retriever.runs import Run
with Run(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_another_process_holds_the_folder_until_it_ends_however_it_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another build is writing here"):
            Run(tmp_path / "run", silent).__enter__()
        holder.kill()
    with Run(tmp_path / "run", silent) as run:
        assert run.folder == tmp_path / "run"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        Run(tmp_path / "file" / "run", silent).__enter__()


# where to write


def test_a_new_and_an_empty_folder_may_be_written(tmp_path):
    check_out(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    assert not (tmp_path / "new").exists()


def test_our_own_folder_may_be_written_again(tmp_path):
    (tmp_path / MARKER).write_text("{}")
    (tmp_path / "run").mkdir()
    check_out(tmp_path)
    assert is_ours(tmp_path)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert not is_ours(tmp_path)
    with pytest.raises(UserError) as caught:
        check_out(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: not empty and not made by patch-retriever")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex: a file"):
        check_out(tmp_path / "thesis.tex")
