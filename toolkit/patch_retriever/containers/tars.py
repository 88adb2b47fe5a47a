"""Members of tar files by where their bytes lie, so that reading one is a seek."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from patch_retriever.errors import UserError, first_line


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar: its name, and where its bytes begin and how many they are."""

    name: str
    offset: int
    size: int


def tar_members(path: Path) -> Iterator[TarMember]:
    """Every file of a tar that is not compressed as a whole; only headers are read.

    Raises:
        UserError: it is no such tar, or ends too early (after the members before that).
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                if member.isreg():
                    yield TarMember(member.name, member.offset_data, member.size)
        with path.open("rb") as file:  # tarfile takes any bad header but the first for the end
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("cut off or damaged: no end mark where one is due")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as a tar to its end ({first_line(error)}); "
            "a compressed one must be unpacked to .tar first"
        ) from None


def tar_read(path: Path, member: TarMember) -> bytes:
    """The bytes of a member.

    Raises:
        UserError: the file is missing, cannot be read or ends before them.
    """
    try:
        with path.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) != member.size:
        raise UserError(f"{path}#{member.name}: the tar ends before its end; fetch the tar again")
    return data
