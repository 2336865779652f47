"""A real Chromium, and a running lab to point it at.

`python tests/browser.py` says which Chromium the tests will use and, where there is none and apt-get can be
used without a password, installs Debian's.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pytest

from hmlab.doctor import find_chromium

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",
]
NO_CHROMIUM = "no Chromium found: install one (apt-get install chromium) or name it in HMLAB_CHROMIUM"


@pytest.fixture(scope="session")
def chromium():
    """A Playwright browser. Without one tests are skipped, and fail where CI is set."""
    path = find_chromium()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_CHROMIUM)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page with a fresh profile; at the end, asserts that nothing was asked of any other host."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("websocket", lambda websocket: asked.append(websocket.url))
    yield page
    context.close()
    assert [url for url in asked if urlparse(url).hostname not in (None, "127.0.0.1", "localhost")] == []


@dataclass(frozen=True, kw_only=True)
class Server:
    """A started `start_lab` or `start_serve`: its process and the addresses that it printed, by title."""

    process: subprocess.Popen
    port: int
    addresses: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return self.addresses["JupyterLab"].partition("token=")[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(function: str, home: Path, env: dict[str, str] | None = None, **arguments) -> Iterator[Server]:
    """Run `hmlab.lab.<function>(**arguments)` in a process of its own, with nobody's Jupyter settings."""
    port = arguments.setdefault("port", free_port())
    program = f"import json, sys; from hmlab.lab import {function} as start; start(**json.loads(sys.argv[1]))"
    settings = {"HOME": home, "JUPYTER_CONFIG_DIR": home / "jupyter", "JUPYTER_DATA_DIR": home / "jupyter"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(arguments, default=str)],
        env={**os.environ, **{name: str(path) for name, path in settings.items()}, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        addresses = {}
        for line in process.stdout:
            if line.startswith("Stop with"):
                break
            if found := re.fullmatch(r"(.+?)  (http\S+)\n", line):
                addresses[found[1]] = found[2]
        else:
            pytest.fail(f"{function} ended with exit code {process.wait()} before it was ready")
        yield Server(process=process, port=port, addresses=addresses)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`start_server("start_lab", dashboards=folder, ...)`: a server that runs until the session's end."""
    with ExitStack() as servers:
        yield lambda function, **arguments: servers.enter_context(
            started(function, tmp_path_factory.mktemp("home"), **arguments)
        )


@pytest.fixture(scope="session")
def lab(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """JupyterLab on a copy of the notebooks, with the real dashboards."""
    from hmlab.lab import notebooks_folder

    notebooks = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(notebooks_folder(), notebooks)
    return start_server("start_lab", notebooks=notebooks, browser=False)


def _install() -> None:
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if find_chromium() or not shutil.which("apt-get") or (sudo and not shutil.which("sudo")):
        return
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-q", "-y", "chromium"]):
        if subprocess.run([*sudo, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            return


if __name__ == "__main__":
    _install()
    print(f"browser tests: {find_chromium() or NO_CHROMIUM}")
    sys.exit(1 if os.environ.get("CI") and not find_chromium() else 0)
