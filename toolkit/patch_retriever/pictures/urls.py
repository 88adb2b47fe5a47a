"""Pictures that are named by an address; downloaded once, then kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from patch_retriever.errors import UserError, first_line
from patch_retriever.files import write
from patch_retriever.pictures.picture import _Stored, decode

LIMIT = 32 * 2**20
"""Bytes of the largest picture that is downloaded."""
TIMEOUT = 20.0
"""Seconds that a server may be silent."""


def is_url(said: str) -> bool:
    """Whether this is an address of the web."""
    return re.match(r"https?://", said, re.IGNORECASE) is not None


def cache_folder() -> Path:
    """Where downloaded pictures lie: `patch-retriever/pictures` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "patch-retriever", "pictures")


@dataclass(frozen=True)
class PictureUrl(_Stored):
    """A picture at an address; without `download`, only one that was downloaded before."""

    url: str
    download: bool = True

    @property
    def name(self) -> str:
        """The address."""
        return self.url

    def read(self) -> bytes:
        """The bytes, from the cache or the web.

        Raises:
            UserError: it cannot or may not be downloaded, is larger than `LIMIT`, or no image.
        """
        kept = cache_folder() / hashlib.sha256(self.url.encode()).hexdigest()
        try:
            return kept.read_bytes()
        except OSError:
            pass
        if not self.download:
            raise UserError(f"{self.url}: not downloaded before, and it is not allowed now")
        try:
            request = Request(self.url, headers={"User-Agent": "patch-retriever"})
            with urlopen(request, timeout=TIMEOUT) as answer:
                data: bytes = answer.read(LIMIT + 1)
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f"{self.url}: cannot be downloaded ({first_line(error)})") from None
        if len(data) > LIMIT:
            raise UserError(f"{self.url}: more than {LIMIT // 2**20} MiB; not downloaded")
        decode(data, self.name)  # half a picture or an error page is not kept
        write(kept, lambda path: path.write_bytes(data))
        return data
