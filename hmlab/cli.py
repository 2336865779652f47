"""The `hmlab` command.

Results go to stdout (with `--json`, nothing but JSON), everything else to stderr. Exit status: 0 done, 1 failed,
2 asked for something that cannot be, 130 interrupted. Errors are one line; HMLAB_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.core import TyperGroup

from hmlab import __version__
from hmlab.commands import bench, catalogue, claims, corpora, lab, memories, notebooks, runs, training
from hmlab.commands.settings import Refusal

# What the library raises on purpose, its message made for the user, and the exit status. By name, because
# importing the classes would load torch for every error.
EXPECTED = {
    "hmlab.registry.UnknownName": 2,
    "hmlab.notebooks.ParameterError": 2,
    "hmlab.encodings.EncodingError": 2,
    "hmlab.corpora.entries.CorpusError": 1,
    "hmlab.notebooks.NotebookError": 1,
    "hmlab.lab.LabError": 1,
    "hmlab.diagnosis.Instability": 1,
    "hmlab.runs.UnknownRun": 2,
    "hmlab.runs.StoreError": 1,
    "hmlab.claims.measure.ClaimError": 1,
    "hmlab.claims.history.HistoryError": 1,
    "builtins.OSError": 1,
}
_UsageError = typer.BadParameter.__base__


class Commands(TyperGroup):
    """Turns every error into one line on stderr."""

    def make_context(self, *args, **kwargs):
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        with one_line_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        path = error.ctx.command_path if error.ctx else "hmlab"
        _stop(f"{error.format_message().rstrip('.')} (see {path} --help)", 2, error)
    except Refusal as error:
        _stop(str(error), error.status, error)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        _stop("interrupted", 130, error)
    except Exception as error:
        status = _expected(error)
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("hmlab"):
            _stop(f"{error.name} is not installed: pip install 'hmlab[all]'", 1, error)
        if status is None and not _is_typers(error):
            _stop(f"{type(error).__name__}: {error} (unexpected; HMLAB_DEBUG=1 shows where)", 1, error)
        if status is None:
            raise
        _stop(str(error), status, error)


def _expected(error: Exception) -> int | None:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    return next((EXPECTED[name] for name in names if name in EXPECTED), None)


def _is_typers(error: Exception) -> bool:
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code")


def _stop(message: str, status: int, error: BaseException):
    if os.environ.get("HMLAB_DEBUG") == "1":
        raise error
    print(f"hmlab: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(status) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A workbench for hierarchical memories in language models.",
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"hmlab {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


LOOK, TRAIN, NOTEBOOKS, MACHINE, OWN = "Look", "Train", "Notebooks", "This machine", "Your own memory"
app.command("list", rich_help_panel=LOOK)(catalogue.list_all)
app.command("show", cls=catalogue.ShowCommand, rich_help_panel=LOOK)(catalogue.show)
app.command("claims", rich_help_panel=LOOK)(claims.claims)
app.command("train", rich_help_panel=TRAIN)(training.train)
app.command("sample", rich_help_panel=TRAIN)(training.sample)
app.add_typer(runs.app, name="runs", rich_help_panel=TRAIN)
app.add_typer(corpora.app, name="corpora", rich_help_panel=TRAIN)
app.command("run", cls=notebooks.NotebookCommand, rich_help_panel=NOTEBOOKS)(notebooks.run)
app.command("reproduce", rich_help_panel=NOTEBOOKS)(notebooks.reproduce)
app.command("lab", rich_help_panel=NOTEBOOKS)(lab.lab)
app.command("serve", rich_help_panel=NOTEBOOKS)(lab.serve)
app.command("doctor", rich_help_panel=MACHINE)(lab.doctor)
app.command("bench", rich_help_panel=MACHINE)(bench.bench)
app.command("new-memory", rich_help_panel=OWN)(memories.new_memory)
app.command("check", rich_help_panel=OWN)(memories.check)
