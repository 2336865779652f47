"""A corpus made for tests, the catalogue that describes it, and a server on this machine that serves it."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TEXT = b"".join(b"line %d of the made corpus\n" % i for i in range(30_000))


class Server(ThreadingHTTPServer):
    """Serves `body` at /text. It may announce more than there is, or stop in the middle until `release`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body: bytes | None = TEXT
        self.announced: int | None = None
        self.stop: int | None = None
        self.release = threading.Event()
        self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/text"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        if server.body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(server.announced or len(server.body)))
        self.end_headers()
        self.wfile.write(server.body[: server.stop])
        if server.stop is not None:
            server.release.wait(60)
            self.wfile.write(server.body[server.stop :])

    def log_message(self, *_) -> None:
        pass


class Made:
    """The corpus `made` of one file with the content `text`; `folder` is where downloads go."""

    text = TEXT

    def __init__(self, assets: Path, folder: Path, server: Server) -> None:
        self.assets, self.folder, self.server = assets, folder, server

    def describe(self, *, url: str | None = None, content: bytes = TEXT, more: str = "") -> None:
        """Write the catalogue."""
        (self.assets / "data").mkdir(parents=True, exist_ok=True)
        (self.assets / "data" / "catalogue.toml").write_text(
            f"""[made]
description = "a corpus made for a test"
licence = "none"
homepage = "http://127.0.0.1/"
shares = [90, 5, 5]

[[made.files]]
path = "made/text"
bytes = {len(content)}
sha256 = "{hashlib.sha256(content).hexdigest()}"
url = "{url or self.server.url}"
{more}
"""
        )

    def put(self, folder: Path, content: bytes, name: str = "text") -> Path:
        """Lay the corpus's file into a folder of corpora, and return the folder."""
        (folder / "made").mkdir(parents=True, exist_ok=True)
        (folder / "made" / name).write_bytes(content)
        return folder

    def files(self, folder: Path | None = None) -> dict[str, bytes]:
        """What lies in a folder of corpora, by path."""
        folder = folder or self.folder
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without corpora; the value is the folder that downloads go to."""
    monkeypatch.delenv("HMLAB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache" / "hmlab" / "corpora"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_data: Path) -> Iterator[Made]:
    """A catalogue of one corpus, `made`, and a server that serves it."""
    monkeypatch.setattr("hmlab.corpora.entries.assets_root", lambda: tmp_path / "assets")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        corpus = Made(tmp_path / "assets", no_data, server)
        corpus.describe()
        yield corpus
        server.release.set()
        server.shutdown()
        thread.join()
