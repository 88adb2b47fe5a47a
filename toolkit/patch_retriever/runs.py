"""The run folder: finished stages with hashed results, so that a stopped build goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from patch_retriever.errors import UserError
from patch_retriever.files import LOCK, file_hash, link_or_copy, lock, value_hash, write_json
from patch_retriever.progress import Say, silent

MARKER = "patch-retriever.json"
"""The file that says that a folder was made by `build`; it holds the resolved settings."""
DONE = "done.json"
PARTIAL = "partial.json"
"""What a stage that can go on keeps in its folder until it is finished: a JSON object with the
stage's `key` and whatever else it needs to know."""
_FORMAT = 4
"""Raised when a stage's files change meaning, so that old results are built again."""


def is_ours(folder: Path) -> bool:
    """Whether `build` made this folder."""
    return (folder / MARKER).is_file()


@dataclass(frozen=True)
class Done:
    """What a finished stage left about itself: its key, and the hash of each of its files."""

    key: str
    files: dict[str, str]


def read_done(folder: Path) -> Done | None:
    """What the stage in `folder` left about itself; None if it has not finished."""
    try:
        done = json.loads((folder / DONE).read_text())
        return Done(str(done["key"]), dict(done["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _can_go_on(folder: Path, key: str) -> bool:
    """Whether unfinished work for these inputs left a record to go on from."""
    try:
        return bool(json.loads((folder / PARTIAL).read_text())["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damaged(folder: Path, files: Mapping[str, str]) -> Path | None:
    """The first of `files` (names in `folder` and their hashes) that is missing or has changed."""
    paths = ((folder / name, sha256) for name, sha256 in files.items())
    changed = (path for path, sha256 in paths if not path.is_file() or file_hash(path) != sha256)
    return next(changed, None)


def check_finished(folder: Path) -> None:
    """Refuse a folder that does not hold a finished build.

    Raises:
        UserError: it is missing, `build` did not make it, or its build has not finished.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not is_ours(folder):
        raise UserError(f"{folder}: not made by patch-retriever ({MARKER} is missing)")
    if not (folder / "modules.json").is_file():
        raise UserError(f"{folder}: its build has not finished; run the same build again")


def check_out(folder: Path) -> None:
    """Refuse to write into a folder that holds something else.

    Raises:
        UserError: `folder` is a file, or a non-empty folder that `build` did not make.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; name a folder to write to")
    started = (folder / "run" / LOCK).is_file()  # stopped before it wrote its marker
    foreign = not is_ours(folder) and not started
    if folder.is_dir() and any(folder.iterdir()) and foreign:
        raise UserError(f"{folder}: not empty and not made by patch-retriever; name another folder")


def share_stages(source: Path, target: Path) -> None:
    """Give a new run the finished stages of another, as links where the disk allows: a stage is
    never changed in place.

    Raises:
        UserError: another build works in one of them, or the target cannot be written.
    """
    with Run(source, silent), Run(target, silent):
        for done in sorted(source.glob(f"*/{DONE}")):
            if (target / done.parent.name).exists():
                continue
            files = (p for p in done.parent.rglob("*") if p.is_file() and p != done)
            for path in (*files, done):  # what says that it is finished comes last
                link = target / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, link)


class Run:
    """Stages of one build under `folder`, one build at a time.

    A stage is done when its `done.json` is there, was written for the same inputs, and every file
    it lists still has its hash. Anything else is built again; a damaged file is named. The work of
    an unfinished stage that left a record of its own (`PARTIAL`) for the same inputs finds its
    folder as it left it; every other work begins in an empty one.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self._say = say
        self._keys: dict[str, str] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> Run:
        """Take the folder's lock.

        Raises:
            UserError: another build holds it, or the folder cannot be made.
        """
        self._lock = lock(
            self.folder,
            f"{self.folder.parent}: another build is writing here; wait for it or name another "
            "folder",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def stage(
        self, name: str, work: Callable[[Path], None], after: tuple[str, ...] = (), **inputs: Any
    ) -> Path:
        """The folder of a finished stage; `work(folder)` runs if it is not finished yet.

        Its inputs are `inputs` (JSON values) and the stages named in `after`.
        """
        key = value_hash([_FORMAT, name, inputs, [self._keys[stage] for stage in after]])
        self._keys[name] = key
        folder = self.folder / name
        if self._is_done(folder, key):
            self._say(f"{name}: done before")
            return folder
        if _can_go_on(folder, key):
            self._say(f"{name}: goes on where it stood")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
            self._say(f"{name}")
        work(folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        hashes = {str(p.relative_to(folder)): file_hash(p) for p in files}
        write_json(folder / DONE, {"key": key, "files": hashes})
        return folder

    def key(self, name: str) -> str:
        """The key of a stage that is finished or at work: another one for other inputs."""
        return self._keys[name]

    def _is_done(self, folder: Path, key: str) -> bool:
        done = read_done(folder)
        if done is None or done.key != key:
            return False
        path = damaged(folder, done.files)
        if path is not None:
            self._say(f"{path}: damaged or missing; its stage is built again")
        return path is None
