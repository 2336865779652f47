"""Starting JupyterLab with the dashboards behind it, and the dashboards alone."""

import ast
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hmlab.assets import assets_root
from hmlab.child import START_SECONDS, ChildFailed, attend

LOOPBACK = "127.0.0.1"


def print_at_once(line: str) -> None:
    """Print, also into a pipe or a file, without waiting for more."""
    print(line, flush=True)


class LabError(RuntimeError):
    """The lab or the dashboards cannot start; the message is one line that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A Panel app: its file, its name in addresses, and the title on its tile."""

    name: str
    title: str
    path: Path


def dashboard_at(path: Path) -> Dashboard:
    """The Panel app in that file; its docstring's first line is the title."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise LabError(f"dashboards: {path} has no docstring; its first line is the dashboard's title")
    return Dashboard(name=path.stem, title=docstring.splitlines()[0].rstrip("."), path=path)


def dashboards_in(folder: str | Path | None = None) -> tuple[Dashboard, ...]:
    """The Panel apps of a folder (default: hmlab's own), by name; files that begin with _ are none."""
    folder = _own_dashboards() if folder is None else Path(folder).resolve()
    if not folder.is_dir():
        raise LabError(f"dashboards: expected a folder of Panel apps, got {folder}")
    return tuple(dashboard_at(path) for path in sorted(folder.glob("[!_]*.py")))


def notebooks_folder() -> Path:
    """The checkout's notebooks, or, for an installed wheel, a writable copy in `./hmlab-notebooks`.

    The copy gains what it lacks; a file that is there is the reader's own and is never overwritten.
    """
    source = assets_root() / "notebooks"
    if source.parent.name != "_share":
        return source
    target = Path("hmlab-notebooks").resolve()
    for original in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / original.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(copy.name + ".partial")
            shutil.copyfile(original, partial)
            partial.replace(copy)
    return target

# The lab asks nobody for news, and does not ask whether to ask.
_SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


def start_lab(
    *,
    port: int = 8888,
    browser: bool = True,
    dashboards: str | Path | None = None,
    notebooks: str | Path | None = None,
    say: Callable[[str], None] = print_at_once,
) -> None:
    """Run JupyterLab on the notebooks, with every dashboard behind its port and token, until told to stop.

    Listens on 127.0.0.1 only. `JUPYTER_TOKEN` sets the token; without it each start draws a new one.
    Raises `LabError` where the port is taken, a package is missing or the lab does not come up.
    """
    _require("jupyterlab", "jupyter_server_proxy", "panel")
    _check_port(LOOPBACK, port)
    apps = dashboards_in(dashboards)
    root = notebooks_folder() if notebooks is None else Path(notebooks).resolve()
    if not root.is_dir():
        raise LabError(f"notebooks: expected a folder, got {root}")
    token = os.environ.get("JUPYTER_TOKEN") or secrets.token_hex(24)
    browser = browser and _has_browser(say)
    address = f"http://{LOOPBACK}:{port}"

    with tempfile.TemporaryDirectory(prefix="hmlab-") as private:
        config = Path(private) / "jupyter_config.json"
        labconfig = Path(private) / "labconfig"
        labconfig.mkdir()
        (labconfig / "default_setting_overrides.json").write_text(json.dumps(_SETTINGS))
        config.write_text(json.dumps(_jupyter_config(port, root, apps, Path(private), browser)))
        command = [sys.executable, "-m", "jupyterlab", f"--config={config}"]

        def ready() -> None:
            say(f"JupyterLab  {address}/lab?token={token}")
            for app in apps:
                say(f"{app.title}  {address}/dashboards/{app.name}/?token={token}")
            say("Stop with Ctrl-C.")

        try:
            # Notebooks run in their own folder, dashboards in this one; both mean the same runs.
            runs = os.environ.get("HMLAB_RUNS") or str(Path("runs").resolve())
            config_path = os.pathsep.join(filter(None, [private, os.environ.get("JUPYTER_CONFIG_PATH")]))
            env = {"JUPYTER_TOKEN": token, "HMLAB_RUNS": runs, "JUPYTER_CONFIG_PATH": config_path}
            attend(command, env=env, address=LOOPBACK, port=port, ready=ready)
        except ChildFailed as error:
            raise LabError(f"JupyterLab {error}") from None


def start_serve(
    *,
    name: str | None = None,
    port: int = 5006,
    address: str = LOOPBACK,
    dashboards: str | Path | None = None,
    origins: Sequence[str] = (),
    browser: bool = False,
    say: Callable[[str], None] = print_at_once,
) -> None:
    """Run the dashboards, or the one called `name`, without JupyterLab, until told to stop.

    `HMLAB_PASSWORD` asks visitors for that password; an address other than 127.0.0.1 needs it. `origins` are
    further HOST:PORT names under which browsers may reach the pages, such as a proxy's.
    Raises `LabError` as `start_lab` does, and for an unknown name or a missing password.
    """
    _require("panel")
    apps = dashboards_in(dashboards)
    if name is not None:
        known = [app.name for app in apps]
        apps = tuple(app for app in apps if app.name == name)
        if not apps:
            raise LabError(f"name: expected one of {', '.join(known)}, got {name}")
    password = os.environ.get("HMLAB_PASSWORD")
    if address != LOOPBACK and not password:
        raise LabError(f"address: {address} can be reached by others; set HMLAB_PASSWORD, or use {LOOPBACK}")
    _check_port(address, port)
    browser = browser and _has_browser(say)
    secret = {"PANEL_BASIC_AUTH": password, "PANEL_COOKIE_SECRET": secrets.token_hex(32)} if password else {}

    hosts = _names_of(address)
    command = [sys.executable, "-m", "hmlab_widgets.serve", "--address", address, "--port", str(port)]
    for origin in (*(f"{host}:{port}" for host in hosts), *origins):
        command += ["--origin", origin]
    command += [str(app.path) for app in apps]

    def ready() -> None:
        for app in apps:
            say(f"{app.title}  http://{hosts[0]}:{port}/{app.name}")
        say("Stop with Ctrl-C.")
        if browser:
            webbrowser.open(f"http://{hosts[0]}:{port}/")

    try:
        attend(command, env=secret, address=hosts[0], port=port, ready=ready)
    except ChildFailed as error:
        raise LabError(f"the dashboards' server {error}") from None


def _jupyter_config(port: int, root: Path, apps: Sequence[Dashboard], private: Path, browser: bool) -> dict:
    origins = [f"{host}:{port}" for host in (LOOPBACK, "localhost")]
    servers = {}
    for app in apps:
        # jupyter-server-proxy fills {base_url} in with str.format, so braces in paths are doubled.
        path, interpreter = (str(p).replace("{", "{{").replace("}", "}}") for p in (app.path, sys.executable))
        command = [interpreter, "-m", "hmlab_widgets.serve", "--unix-socket", "{unix_socket}"]
        command += ["--prefix", "{base_url}dashboards/" + app.name]
        for origin in origins:
            command += ["--origin", origin]
        servers[f"dashboards/{app.name}"] = {
            "command": [*command, path],
            # A TCP port would be open to every user of the machine; this folder is open to its owner alone.
            "unix_socket": str(private / f"{app.name}.sock"),
            "absolute_url": True,
            "timeout": START_SECONDS,
            "new_browser_tab": False,
            "launcher_entry": {
                "title": app.title,
                "category": "Notebook",  # only the launcher's own categories draw icons
                "icon_path": str(_widgets() / "pages" / "dashboard.svg"),
            },
        }
    return {
        "ServerApp": {
            "ip": LOOPBACK,
            "port": port,
            "port_retries": 0,
            "root_dir": str(root),
            "open_browser": browser,
            "allow_root": True,
            "log_level": "WARN",
            "jpserver_extensions": {"hmlab_widgets.lab_extension": True},
        },
        "LabApp": {
            "news_url": None,
            "check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
            "extension_manager": "readonly",
            "log_level": "WARN",
        },
        "ServerProxy": {"servers": servers},
    }


def _widgets() -> Path:
    spec = find_spec("hmlab_widgets")
    if spec is None or not spec.submodule_search_locations:
        raise LabError("hmlab_widgets is not installed; install hmlab again")
    return Path(spec.submodule_search_locations[0])


def _own_dashboards() -> Path:
    return _widgets() / "dashboards"


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise LabError(f"{', '.join(missing)} not installed: pip install 'hmlab[lab]'")


def _check_port(address: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise LabError(f"port: expected 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        # As the servers do: a port in TIME_WAIT is free, one that somebody listens on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            reason = error.strerror.lower()
            raise LabError(f"port {port} on {address}: {reason}; choose another with --port") from None


def _names_of(address: str) -> list[str]:
    """The hosts that reach a server bound to `address`, the one to show first."""
    if address == LOOPBACK:
        return [LOOPBACK, "localhost"]
    if address not in ("0.0.0.0", "::"):
        return [address]
    name = socket.gethostname()
    found = {LOOPBACK: None, "localhost": None, name: None}
    with suppress(OSError):
        found |= {info[4][0]: None for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    return list(found)


def _has_browser(say: Callable[[str], None]) -> bool:
    try:
        webbrowser.get()
    except webbrowser.Error:
        say("No browser found on this machine: open the address below in one.")
        return False
    return True
