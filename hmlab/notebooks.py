"""Notebooks without a browser: what each one takes, and running one from top to bottom.

    notebook = read(find("00_tour"))
    notebook.parameters                      # name -> Parameter, from the cell tagged `parameters`
    run_notebook(notebook.path, notebook.form("smoke"), "reports/tour")

A notebook says in its metadata what it is called and in which forms it can be run, each a set of parameters:

    {"hmlab": {"title": "A tour", "forms": {"smoke": {"steps": 5}, "quick": {}, "full": {"steps": 2000}}}}

Parameters are checked by name and type before anything starts. The executed copy and its page are called
`NAME.ipynb` and `NAME.html` only when every cell went through; what failed is called `NAME.failed.*`, and
what is under way `NAME.partial.*`. A notebook with a parameter `out_dir` is given the output folder, and
leaves its results there as Datasets (`.zarr`, `.nc`).
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

from hmlab.assets import assets_root
from hmlab.registry import UnknownName

_ANNOTATIONS = {
    "Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union,
    **{t.__name__: t for t in (int, float, str, bool, list, dict, tuple)},
}  # fmt: skip


class ParameterError(ValueError):
    """A notebook cannot be run as asked; the message is one line that names what was wrong."""


class NotebookError(RuntimeError):
    """A cell failed. The message names the notebook, the cell and the exception, in one line."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """type: a type that pydantic can check. default: the literal in the cell, None if it is no literal."""

    name: str
    type: Any
    default: Any

    def check(self, value: Any, *, text: bool = False) -> Any:
        """`value` as this parameter's type. text: it comes from a command line, where "3" may be a number."""
        from pydantic import TypeAdapter, ValidationError

        adapter = TypeAdapter(self.type)
        try:
            if not text:
                return adapter.validate_python(value, strict=True)
            try:
                # A literal first (None, lists, numbers where anything goes); a string needs no quotes.
                literal = value if self.type is str else ast.literal_eval(value)
                return adapter.validate_python(literal, strict=True)
            except (ValueError, SyntaxError):
                return adapter.validate_strings(value)
        except ValidationError:
            raise ParameterError(f"{self.name}: expected {_type_name(self.type)}, got {value!r}") from None


@dataclass(frozen=True, kw_only=True)
class Notebook:
    path: Path
    title: str
    parameters: dict[str, Parameter]
    forms: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.stem

    def form(self, name: str) -> dict[str, Any]:
        """The parameters of a form."""
        if name not in self.forms:
            raise UnknownName(f"form of {self.name}", name, self.forms)
        return dict(self.forms[name])

    def check(self, values: Mapping[str, Any], *, text: bool = False) -> dict[str, Any]:
        """`values` with every name and type checked; `UnknownName` or `ParameterError` otherwise.

        text: the values are strings from a command line, to be read by each parameter's type.
        """
        for name in values:
            if name not in self.parameters:
                raise UnknownName(f"parameter of {self.name}", name, self.parameters)
        return {name: self.parameters[name].check(value, text=text) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """notebook, html: the executed copy and its page. datasets: results written. seconds: the whole run."""

    notebook: Path
    html: Path
    parameters: dict[str, Any]
    datasets: tuple[Path, ...]
    seconds: float


def available(folder: str | Path | None = None) -> list[Notebook]:
    """The notebooks in a folder, by default those that come with the package, in the order of their paths."""
    folder = assets_root() / "notebooks" if folder is None else Path(folder)
    return [read(path) for path in sorted(folder.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def find(name: str | Path) -> Path:
    """A notebook by its path, or by the name of one that comes with the package (`00_tour`, or `tour`)."""
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    paths = {notebook.name: notebook.path for notebook in available()}
    short = {stem.split("_", 1)[-1]: path for stem, path in paths.items() if stem[:1].isdigit()}
    stem = Path(name).name.removesuffix(".ipynb")
    if found := paths.get(stem) or short.get(stem):
        return found
    raise UnknownName("notebook", str(name), [*paths, *short])


def read(path: str | Path) -> Notebook:
    """Title, parameters and forms of a notebook file; nothing is executed."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [(cell, "".join(cell["source"])) for cell in content["cells"]]
    except (ValueError, KeyError, TypeError):
        raise ParameterError(f"notebook: expected a Jupyter notebook, {path} is none") from None
    about = content.get("metadata", {}).get("hmlab", {})
    prose = "\n".join(source for cell, source in cells if cell["cell_type"] == "markdown")
    headings = [line.lstrip("# ") for line in prose.splitlines() if line.startswith("#")]
    title = about.get("title") or next(iter(headings), path.stem)
    tagged = [source for cell, source in cells if "parameters" in cell.get("metadata", {}).get("tags", ())]
    parameters = _parameters(tagged[0], path) if tagged else {}
    return Notebook(path=path, title=title, parameters=parameters, forms=about.get("forms", {}))


def run_notebook(
    path: str | Path,
    parameters: Mapping[str, Any],
    out: str | Path,
    *,
    timeout: int = 3600,
    on_cell: Callable[[int, int], None] | None = None,
) -> Execution:
    """Run a notebook headless in a kernel of this Python and keep the executed copy and its page in `out`.

    parameters: checked against the notebook's own before the kernel starts (as `Notebook.check`).
    timeout: seconds that one cell may take. on_cell: called before each cell with its index and their number.
    Raises `NotebookError` when a cell fails; `out` then holds `NAME.failed.ipynb` and `NAME.failed.html`.
    """
    from hmlab import atomic, headless
    from hmlab.report import notebook_html

    notebook, out = read(path), Path(out)
    values = notebook.check(parameters)
    if "out_dir" in notebook.parameters and "out_dir" not in values:
        values["out_dir"] = str(out)
    final, partial = out / f"{notebook.name}.ipynb", out / f"{notebook.name}.partial.ipynb"
    if final.resolve() == notebook.path.resolve():
        raise ParameterError(f"out: expected another folder than the notebook's own, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(f"{notebook.name}*"):
        if stale.suffix in (".ipynb", ".html"):
            stale.unlink()
    before, started, under_way = _datasets(out), time.monotonic(), []

    def cell_starts(cell, cell_index: int) -> None:
        under_way.append(cell)
        if on_cell is not None:
            on_cell(cell_index, len(json.loads(partial.read_text(encoding="utf-8"))["cells"]))

    def page(name: str) -> Path:
        path = out / f"{name}.html"
        atomic.write_bytes(path, notebook_html(partial, title=notebook.title).encode())
        return path

    try:
        headless.execute(notebook.path, partial, values, timeout=timeout, on_cell_start=cell_starts)
    except BaseException as error:
        if partial.exists():
            page(f"{notebook.name}.failed")
            partial.rename(out / f"{notebook.name}.failed.ipynb")
        if not isinstance(error, Exception):
            raise
        raise NotebookError(f"{notebook.path.name}, {_place(under_way)}: {_what(error, timeout)}") from error
    html = page(notebook.name)
    partial.rename(final)
    datasets = tuple(path for path, written in _datasets(out).items() if before.get(path) != written)
    seconds = time.monotonic() - started
    return Execution(notebook=final, html=html, parameters=values, datasets=datasets, seconds=seconds)


def _parameters(source: str, path: Path) -> dict[str, Parameter]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"{path.name}: the cell tagged parameters is no Python: {error.msg}") from None
    found = {}
    for statement in statements:
        if isinstance(statement, ast.AnnAssign):
            target, annotation = statement.target, statement.annotation
        elif isinstance(statement, ast.Assign):
            target, annotation = statement.targets[0], None
        else:
            continue
        if not isinstance(target, ast.Name):
            continue
        try:
            default = ast.literal_eval(statement.value) if statement.value is not None else None
        except ValueError:
            default = None
        declared = type(default) if default is not None else Any
        if annotation is not None:
            declared = eval(ast.unparse(annotation), {"__builtins__": {}}, _ANNOTATIONS)
        found[target.id] = Parameter(name=target.id, type=declared, default=default)
    return found


def _place(cells: list) -> str:
    """The last cell that began, by its number in the notebook's file and its first line."""
    if not cells:
        return "before the first cell"
    given = [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", ())]
    line = next(iter(cells[-1].source.strip().splitlines()), "")
    return f"cell {len(cells) - len(given)} ({line})"


def _what(error: Exception, timeout: int) -> str:
    kind = type(error).__name__
    if kind == "PapermillExecutionError":
        text = f"{error.ename}: {error.evalue}"
    elif kind == "CellTimeoutError":
        text = f"it took longer than {timeout} s"
    else:
        text = f"{kind}: {error}"
    return text.strip().splitlines()[0]


def _datasets(out: Path) -> dict[Path, int]:
    """Datasets in a folder, each with the time of the newest file in it."""
    found = [path for pattern in ("*.zarr", "*.nc") for path in sorted(out.rglob(pattern))]
    return {path: max(p.stat().st_mtime_ns for p in [path, *path.rglob("*")]) for path in found}


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
