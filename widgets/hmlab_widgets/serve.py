"""One Panel server for one or more dashboards: `python -m hmlab_widgets.serve [options] app.py ...`.

On a TCP port it serves each app under its file's name and a page that lists them. On a unix socket, behind
JupyterLab, it serves one app at the root. Passwords come through `PANEL_BASIC_AUTH`, never the command line.
"""

import argparse
import logging
import sys
from pathlib import Path

from hmlab.child import end_with_parent
from hmlab.lab import dashboard_at

PAGES = Path(__file__).parent / "pages"


def panel_arguments(argv: list[str]) -> list[str]:
    """The arguments for `panel serve` that these options stand for."""
    parser = argparse.ArgumentParser(prog="python -m hmlab_widgets.serve", description=__doc__)
    parser.add_argument("apps", nargs="+", type=Path)
    parser.add_argument("--unix-socket", help="listen here instead of on a port; takes one app")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5006)
    parser.add_argument("--prefix", default="", help="the path under which a proxy shows this server")
    parser.add_argument("--origin", action="append", default=[], help="HOST:PORT whose pages may connect")
    options = parser.parse_args(argv)

    arguments = ["serve", *map(str, options.apps), "--log-level", "warning"]
    for origin in options.origin:
        arguments += ["--allow-websocket-origin", origin]
    if options.prefix:
        arguments += ["--prefix", options.prefix]
    if options.unix_socket:
        [app] = options.apps
        return [*arguments, "--unix-socket", options.unix_socket, "--index", app.name]
    arguments += ["--address", options.address, "--port", str(options.port)]
    arguments += ["--index", str(PAGES / "index.html"), "--basic-login-template", str(PAGES / "login.html")]
    titles = [f"/{app.name}={app.title}" for app in map(dashboard_at, options.apps)]
    return [*arguments, "--index-titles", *titles]


def main() -> None:
    """Serve until told to stop, or until the process that started this one is gone."""
    end_with_parent()
    # Jupyter's proxy asks for / until the server is up, which would be reported as 404s.
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    sys.argv = ["panel", *panel_arguments(sys.argv[1:])]
    from panel.command import main as panel

    panel()


if __name__ == "__main__":
    main()
