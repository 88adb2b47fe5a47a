"""Writing files so that half-written is not written: a temporary name, then a rename."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL = ".partial"
_HOST = re.sub("[^A-Za-z0-9]", "", platform.node())[:20] or "host"
_LONGEST_NAME = 50
"""Letters of a file's name in that of its temporary folder."""
LOCK = "lock"
"""The file by which a process has a folder for itself."""


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` write a file elsewhere, flush it to disk, then move it to `path`.

    Elsewhere is a folder beside `path` that this call makes under a random name: no other writer
    shares it, and no link that lies there is followed. What killed processes left of `path` is
    deleted.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    name = path.name[:_LONGEST_NAME]
    folder: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_partial(path.parent, name)
        folder = tempfile.mkdtemp(_PARTIAL, f".{name}.{_HOST}-{os.getpid()}-", path.parent)
        temporary = Path(folder) / path.name
        writer(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose "
            "another folder and run the same command again, it goes on where it stood"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def clear_partial(folder: Path, name: str = "*") -> None:
    """Delete what writers of this machine that are no more left of a file, or of all."""
    pattern = "*" if name == "*" else glob.escape(name)
    for path in folder.glob(f".{pattern}.{glob.escape(_HOST)}-*{_PARTIAL}"):
        process = path.name.removesuffix(_PARTIAL).split("-")[-2]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8."""
    write(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON."""
    write_text(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors (the same tensors always give the same bytes)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(p: Path) -> None:
        try:
            save_file(contiguous, p, metadata)
            allow_reading(p)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error

    write(path, save)


def link_or_copy(source: Path, target: Path) -> None:
    """The same bytes at `target`, without room of their own where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lock(folder: Path, busy: str) -> IO[str]:
    """The lock of a folder, which is made if need be; closing it lets others have it.

    Raises:
        UserError: another process has it (`busy` says so), or the folder cannot be written.
    """
    import fcntl

    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise UserError(f"{path}: a link; delete it")
        held = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise UserError(busy) from None
    return held


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """The path of a file that a list in `said_by` calls by its `name` in a folder.

    Raises:
        UserError: it would lie elsewhere.
    """
    path = folder / name
    if ".." in Path(name).parts or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{said_by}: lists {name!r}, which is not in {folder}")
    return path


def allow_reading(path: Path) -> None:
    """Permissions as a plain `open` gives them; safetensors makes files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_hash(values: Any) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
