"""Executing the cells of a notebook, through papermill and in a kernel of this Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

ENGINE = "hmlab"


class Client(PapermillNotebookClient):
    """Leaves widgets to the kernel: the usual client, which mirrors Output widgets, can wait for ever on them.

    What is printed inside such a widget becomes an output of the cell.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.widget_registry = {}  # the constructor takes it as an argument, and overwrites it


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        chosen = {name: options[name] for name in ("timeout", "on_cell_start")}
        # The kernel's own messages would come between ours; what concerns a cell is among its outputs.
        quiet = ["--IPKernelApp.log_level=CRITICAL"]
        return Client(nb_man, kernel_name=kernel_name, extra_arguments=quiet, **chosen).execute()


def execute(
    source: Path, target: Path, values: Mapping[str, Any], *, timeout: int, on_cell_start: Callable[..., None]
) -> None:
    """Run every cell of `source` with parameters, writing `target` as it goes; raises what papermill raises."""
    papermill_engines.register(ENGINE, Engine)
    logging.getLogger("papermill").addHandler(logging.NullHandler())  # it logs what it raises
    execute_notebook(
        source, target, dict(values), engine_name=ENGINE, kernel_name="python3", language="python",
        progress_bar=False, timeout=timeout, on_cell_start=on_cell_start,
    )  # fmt: skip
