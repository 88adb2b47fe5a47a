"""Pictures at addresses: downloaded once and whole, or refused in one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from patch_retriever.errors import UserError
from patch_retriever.pictures import urls as picture_urls
from patch_retriever.pictures.stores import locator, picture_at
from patch_retriever.pictures.urls import PictureUrl, cache_folder, is_url
from stored import SOUND


class Server(ThreadingHTTPServer):
    daemon_threads = True
    asked: list[str]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.removeprefix("/")
        if name == "slow":
            time.sleep(1)
            return
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if name == "half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(SOUND["rgb.png"])))
            self.end_headers()
            self.wfile.write(SOUND["rgb.png"][:2000])
            return
        if name not in SOUND:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SOUND[name])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def test_a_picture_is_downloaded_once_and_then_opens_by_its_name(server):
    url = server.url("rgb.png")
    for _ in range(2):
        assert PictureUrl(url).open().size == (40, 30)
    assert server.asked == ["/rgb.png"]
    assert locator(PictureUrl(url)) == url
    assert picture_at(url).read() == SOUND["rgb.png"]
    assert len(list(cache_folder().iterdir())) == 1


def test_without_leave_nothing_is_asked_for(server):
    with pytest.raises(UserError, match="not downloaded before"):
        picture_at(server.url("rgb.png")).open()
    assert server.asked == []


def says(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        PictureUrl(url).open()
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)
    assert not cache_folder().exists() or not list(cache_folder().iterdir())


def test_what_is_not_there_is_named(server):
    says(server.url("gone.png"), "cannot be downloaded .*404")


def test_a_redirection_to_a_file_is_not_followed(server):
    says(server.url("moved"), "cannot be downloaded")


def test_a_server_that_does_not_answer_is_named(server, monkeypatch):
    monkeypatch.setattr(picture_urls, "TIMEOUT", 0.2)
    says(server.url("slow"), "cannot be downloaded .*timed out")


def test_too_large_a_picture_is_not_kept(server, monkeypatch):
    monkeypatch.setattr(picture_urls, "LIMIT", len(SOUND["rgb.png"]) - 1)
    says(server.url("rgb.png"), "not downloaded")
    monkeypatch.setattr(picture_urls, "LIMIT", len(SOUND["rgb.png"]))
    assert PictureUrl(server.url("rgb.png")).read() == SOUND["rgb.png"]


def test_half_a_picture_is_not_kept(server):
    says(server.url("half"), "not a readable image")


def test_no_such_server_is_named(server):
    url = server.url("rgb.png")
    server.shutdown()
    server.server_close()
    says(url, "cannot be downloaded")


@pytest.mark.parametrize("url", ["http://[bad/a.png", "http://exa mple.org/a.png", "http://"])
def test_what_is_no_address_is_named(url, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    says(url, "cannot be downloaded")


def test_only_the_web_has_addresses():
    assert is_url("https://a.org/b.png")
    assert is_url("HTTP://a.org")
    assert not any(map(is_url, ["file:///a.png", "ftp://a/b.png", "a/http://b.png", "http:a"]))
