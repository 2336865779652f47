"""`hmlab lab`, `hmlab serve` and `hmlab doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hmlab.commands.output import Json, print_json, print_table

Port = Annotated[int, typer.Option(help="Port on this machine.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")]
Dashboards = Annotated[Path | None, typer.Option(help="A folder of Panel apps instead of hmlab's own.")]


def lab(
    port: Port = 8888,
    browser: Browser = True,
    dashboards: Dashboards = None,
    notebooks: Annotated[Path | None, typer.Option(help="A folder of notebooks instead of hmlab's own.")] = None,
) -> None:
    """JupyterLab on the notebooks, with the dashboards behind the same port and token."""
    from hmlab.lab import start_lab

    start_lab(port=port, browser=browser, dashboards=dashboards, notebooks=notebooks)


def serve(
    name: Annotated[str | None, typer.Argument(help="One dashboard; all of them without it.")] = None,
    port: Port = 5006,
    address: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own it needs HMLAB_PASSWORD.")
    ] = "127.0.0.1",
    origin: Annotated[
        list[str], typer.Option(metavar="HOST:PORT", help="Further names of the pages; repeatable.")
    ] = [],  # noqa: B006
    browser: Browser = False,
    dashboards: Dashboards = None,
) -> None:
    """The dashboards alone, without JupyterLab."""
    from hmlab.lab import start_serve

    start_serve(name=name, port=port, address=address, origins=origin, browser=browser, dashboards=dashboards)


def doctor(port: Port = 8888, json: Json = False) -> None:
    """Whether this machine has what hmlab needs."""
    from dataclasses import asdict

    from hmlab.doctor import failed, report

    checks = report(port=port)
    if json:
        print_json([asdict(check) for check in checks])
    else:
        print_table(["", "status", "found"], [(check.name, check.status, check.detail) for check in checks])
    if failed(checks):
        raise typer.Exit(1)
