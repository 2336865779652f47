"""The lab with its dashboards behind one port and one token, and the dashboards alone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest
from browser import free_port, started
from playwright.sync_api import Page, expect

from hmlab.lab import LabError, start_lab, start_serve

APP = '''"""A small one.

More about it."""
import panel as pn
button = pn.widgets.Button(name="Count")
text = pn.pane.Str("0")
button.on_click(lambda _: setattr(text, "object", str(int(text.object) + 1)))
pn.Column(button, text).servable()
'''


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with one dashboard, and one with a notebook's folder."""
    folder = tmp_path_factory.mktemp("apps")
    (folder / "count.py").write_text(APP)
    return folder


@pytest.fixture(scope="module")
def small_lab(small, start_server, tmp_path_factory):
    return start_server("start_lab", dashboards=small, notebooks=tmp_path_factory.mktemp("empty"), browser=False)


def status(url: str) -> int:
    try:
        return urllib.request.urlopen(url, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def test_token_opens_lab_and_dashboards_and_nothing_opens_without(small_lab):
    assert set(small_lab.addresses) == {"JupyterLab", "A small one"}
    assert status(f"{small_lab.url}/api/contents?token={small_lab.token}") == 200
    assert status(f"{small_lab.url}/api/contents") == 403
    assert status(small_lab.addresses["A small one"]) == 200
    without = urllib.request.urlopen(f"{small_lab.url}/dashboards/count/", timeout=60)
    assert "login" in without.url
    assert status(f"{small_lab.url}/api/contents?token=guess") == 403


def test_dashboard_behind_the_lab_answers_clicks(page: Page, small_lab):
    page.goto(small_lab.addresses["A small one"])
    page.get_by_role("button", name="Count").click()
    expect(page.get_by_text("1", exact=True)).to_be_visible(timeout=60_000)


def test_launcher_has_a_tile_for_each_dashboard(page: Page, small_lab):
    page.goto(small_lab.addresses["JupyterLab"])
    tile = page.locator(".jp-LauncherCard", has_text="A small one")
    expect(tile).to_be_visible(timeout=60_000)
    icon = tile.locator("img")
    assert icon.evaluate("image => image.complete && image.naturalWidth > 0")


def test_dashboards_alone(page: Page, small, start_server):
    served = start_server("start_serve", dashboards=small)
    page.goto(served.addresses["A small one"])
    page.get_by_role("button", name="Count").click()
    expect(page.get_by_text("1", exact=True)).to_be_visible(timeout=60_000)


def test_stop_leaves_no_process_behind(small, tmp_path):
    with started("start_lab", tmp_path, dashboards=small, notebooks=tmp_path, browser=False) as server:
        assert status(server.addresses["A small one"]) == 200  # its own process is up
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) >= 2
        server.process.send_signal(signal.SIGINT)
        server.process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("start", [start_lab, start_serve])
def test_busy_port_is_one_clear_line(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LabError, match=rf"port.*{taken.getsockname()[1]}") as error:
            start(port=taken.getsockname()[1], browser=False)
    assert "\n" not in str(error.value)


def test_other_addresses_need_a_password(monkeypatch):
    monkeypatch.delenv("HMLAB_PASSWORD", raising=False)
    with pytest.raises(LabError, match="set HMLAB_PASSWORD"):
        start_serve(address="0.0.0.0", port=free_port())


def test_unknown_dashboard_is_named(small):
    with pytest.raises(LabError, match="name: expected one of count, got cuont"):
        start_serve(name="cuont", dashboards=small, port=free_port())


def test_a_missing_browser_is_said_and_is_no_failure(small, tmp_path):
    program = "import json, sys; from hmlab.lab import start_lab; start_lab(**json.loads(sys.argv[1]))"
    arguments = {"dashboards": str(small), "notebooks": str(tmp_path), "port": free_port(), "browser": True}
    # Nothing on this PATH opens pages.
    env = {**os.environ, "HOME": str(tmp_path), "PATH": str(tmp_path), "BROWSER": "", "DISPLAY": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(arguments)], env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Stop with"):
                break
        assert any(re.search(r"browser", line) for line in lines), lines
        assert any(line.startswith("JupyterLab  http") for line in lines), lines
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
