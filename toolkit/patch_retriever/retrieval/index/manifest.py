"""What an index folder says about itself: who made it, its files with their hashes.

manifest.json          this; written last, so that a half-made index is none
index-00000.faiss      a FAISS index of up to `shard_items` vectors, labelled with numbers
items-00000.parquet    its items: number, id, text, picture, content
trained.faiss          the same index, trained and empty, for what is added later
embeddings/            pooled vectors by content (`retrieval.embeddings`), unless dropped
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, inside, lock, value_hash, write_json
from patch_retriever.retrieval.load import BASE

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Encoder, Role

MANIFEST = "manifest.json"
DRAFT = "building.json"
"""The manifest so far, while an index is built or added to."""
EMBEDDINGS = "embeddings"
_CHECKED = "checked.json"
_SHARD = re.compile(r"index-\d{5,}\.faiss|items-\d{5,}\.parquet|trained\.faiss")
_KIND, _VERSION = "patch-retriever index", 1


@dataclass(frozen=True)
class Part:
    """A file of the index."""

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Part:
        """What is to be said about a file that was written."""
        return cls(path.name, path.stat().st_size, file_hash(path))


@dataclass(frozen=True)
class Shard:
    """Items with numbers from `first` to `last`, some of which may have been removed."""

    first: int
    last: int
    count: int
    index: Part
    items: Part

    @property
    def parts(self) -> tuple[Part, Part]:
        """Its files."""
        return self.index, self.items


@dataclass(frozen=True)
class MadeBy:
    """The model whose vectors an index holds, and how it was asked for them.

    `stored` is the key of the pooled vectors (`Encoder.store_key`), `patch` the hash of the patch
    where the model is ours; `normalised` says that pooled vectors were only brought to length 1.
    """

    model: str
    fingerprint: str
    trunk: str
    stored: str
    patch: str | None
    patched_tokens: bool
    normalised: bool
    prompts: dict[str, str]
    role: str

    @classmethod
    def of(cls, encoder: Encoder, role: Role) -> MadeBy:
        """Of a loaded model."""
        from patch_retriever.retrieval.load import BASE

        path = Path(encoder.name.removesuffix(BASE))
        name = encoder.name.replace(str(path), str(path.absolute()), 1)
        folder = path / "patch"
        patch, tokens = None, False
        if folder.is_dir() and not encoder.name.endswith(BASE):
            from patch_retriever.patch.artefact import Patch

            patch = value_hash({p.name: file_hash(p) for p in sorted(folder.iterdir())})
            tokens = bool(Patch.load(folder).subtractions)
        return cls(
            name if path.exists() else encoder.name,
            encoder.fingerprint,
            encoder.trunk_fingerprint,
            encoder.store_key(role),
            patch,
            tokens,
            encoder.only_normalises,
            {r: encoder.prompt(r) for r in ("query", "document")},
            role,
        )

    def check(self, folder: Path, encoder: Encoder) -> None:
        """Refuse another model than the one that made the index in `folder`.

        Raises:
            UserError: `encoder` is another, or the same with another patch or prompt.
        """
        if encoder.fingerprint == self.fingerprint:
            return
        if encoder.trunk_fingerprint == self.trunk:
            other = f"made with another patch, or other prompts, than {encoder.name} has"
        else:
            other = f"made by another model than {encoder.name}"
        raise UserError(
            f"{folder}: {other}, by {self.model}; name that with -m, or bring the index over: "
            f"patch-retriever index-migrate {folder} -m {encoder.name} -o NEW"
        )


@dataclass(frozen=True)
class Manifest:
    """An index folder's `manifest.json`.

    `key` is a hash of all that it was made from; `search` its search settings; `next` the number
    of the next item.
    """

    key: str
    made_by: MadeBy
    factory: str
    dimension: int
    shard_items: int
    search: dict[str, int]
    trained: Part
    next: int
    shards: tuple[Shard, ...] = ()

    @property
    def count(self) -> int:
        """Items."""
        return sum(shard.count for shard in self.shards)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All files."""
        return (self.trained, *(part for shard in self.shards for part in shard.parts))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(
            path, {"format": _KIND, "version": _VERSION, "count": self.count, **asdict(self)}
        )

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read it.

        Raises:
            UserError: it is missing or damaged, or of another format.
        """
        folder = path.parent
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if (values.pop("format"), values.pop("version")) != (_KIND, _VERSION):
                raise UserError(f"{path}: an index of another version; index the items again")
            values.pop("count")
            values["made_by"] = MadeBy(**values["made_by"])
            values["trained"] = Part(**values["trained"])
            values["shards"] = tuple(
                Shard(**{**s, "index": Part(**s["index"]), "items": Part(**s["items"])})
                for s in values["shards"]
            )
            return cls(**values)
        except FileNotFoundError:
            half = (folder / DRAFT).is_file()
            why = "its index is not finished; run the same command again" if half else "no index"
            raise UserError(f"{folder}: {why} ({MANIFEST} is missing)") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: damaged; index the items again") from None


def maker(folder: Path) -> str:
    """The model that made the index in `folder`, to be loaded.

    Raises:
        UserError: there is no index, or its model's folder is not there any more.
    """
    model = Manifest.read(folder / MANIFEST).made_by.model
    path = Path(model.removesuffix(BASE))
    if path.is_absolute() and not path.exists():
        raise UserError(
            f"{path}: no such model folder, and it made {folder}; name it where it is now with -m"
        )
    return model


def check_parts(folder: Path, parts: tuple[Part, ...]) -> None:
    """Refuse files that are not what was written.

    Every file is hashed once; as long as the file system says that nobody touched it since, that
    stands (`checked.json`).

    Raises:
        UserError: one is missing, truncated or changed.
    """
    try:
        before = json.loads((folder / _CHECKED).read_text())
        before = before if isinstance(before, dict) else {}
    except (OSError, ValueError):
        before = {}
    now = {}
    for part in parts:
        path = inside(folder, part.file, folder / MANIFEST)
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, part.sha256]
            if stat.st_size != part.bytes:
                raise UserError(
                    f"{path}: truncated or changed ({stat.st_size} bytes, {part.bytes} were "
                    "written); copy it again or index the items again"
                )
            if before.get(part.file) != stamp and file_hash(path) != part.sha256:
                raise UserError(
                    f"{path}: changed since it was written; copy it again or index the items again"
                )
        except OSError as error:
            raise UserError(
                f"{path}: missing or unreadable ({error.strerror}); copy it again or index the "
                "items again"
            ) from None
        now[part.file] = stamp
    if now != before:
        with suppress(UserError):  # where nothing can be written, files are hashed every time
            write_json(folder / _CHECKED, now)


@contextmanager
def changing(folder: Path, new: bool = False) -> Iterator[None]:
    """The folder for this process alone while it is changed; a `new` one is made.

    Raises:
        UserError: there is none, another process has it, or it cannot be written.
    """
    if not new and not folder.is_dir():
        raise UserError(f"{folder}: no index (no such folder)")
    with lock(folder, f"{folder}: another process is changing this index; wait for it"):
        yield


def clear(folder: Path, keep: tuple[Part, ...]) -> None:
    """Delete shards that no manifest lists any more, of names that only shards have."""
    kept = {part.file for part in keep}
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in kept:
            path.unlink()
