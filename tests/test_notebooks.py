"""Notebooks without a browser: those that come with hmlab in their smoke form, and how running one can fail."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import typer.testing

from hmlab.assets import assets_root
from hmlab.cli import app
from hmlab.notebooks import NotebookError, ParameterError, available, find, read, run_notebook
from hmlab.registry import UnknownName

OURS = sorted((assets_root() / "notebooks").rglob("*.ipynb"))
PARAMETERS = """
steps = 3  # how many
rate = 1e-3
wide: bool = False
label: str | None = None
levels = [1, 2]
out_dir = ""
"""
FIGURE = "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=list(range(steps)), name='the-curve'))"
RESULT = """
import xarray as xr
from ipywidgets import interact
_ = interact(lambda x: print('inside', x), x=3)
if out_dir:
    xr.Dataset({"loss": ("step", [rate] * steps)}).to_zarr(out_dir + "/loss.zarr", mode="w", consolidated=False)
"""
CHECK = "assert steps < 10, 'too many\\nsteps'"
PROSE = "# A small one\\n\\nWith $x_t$ and\\n$$\\frac{a}{b} < c$$\\nand ```python\\ncode\\n```".replace("\\n", "\n")


def notebook(path: Path, *code: str, parameters: str = PARAMETERS, **about) -> Path:
    cells = [nbformat.v4.new_markdown_cell(PROSE), *(nbformat.v4.new_code_cell(c.strip()) for c in (parameters, *code))]
    cells[1].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"hmlab": about}), path)
    return path


def hmlab(*arguments: object, status: int = 0):
    result = typer.testing.CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == status, (result.exit_code, result.stderr, result.exception)
    return result


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_ours_go_through_in_their_smoke_form(path, tmp_path):
    described = read(path)
    assert {"smoke", "quick", "full"} <= set(described.forms)
    for form in described.forms:
        described.check(described.form(form))
    done = run_notebook(path, described.form("smoke"), tmp_path, timeout=240)
    assert done.html.is_file()


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_ours_carry_no_outputs(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_a_notebook_says_what_it_takes(tmp_path):
    found = read(notebook(tmp_path / "n.ipynb", forms={"smoke": {"steps": 2}}))
    assert found.title == "A small one"
    assert found.form("smoke") == {"steps": 2}
    assert {name: p.default for name, p in found.parameters.items()} == {
        "steps": 3, "rate": 1e-3, "wide": False, "label": None, "levels": [1, 2], "out_dir": "",
    }  # fmt: skip
    assert read(notebook(tmp_path / "n.ipynb", title="Its name")).title == "Its name"
    typed = {"steps": "5", "rate": "2", "wide": "true", "label": "None", "levels": "[3]", "out_dir": "3"}
    assert found.check(typed, text=True) == {
        "steps": 5, "rate": 2.0, "wide": True, "label": None, "levels": [3], "out_dir": "3",
    }  # fmt: skip
    assert found.check({"label": "x"}, text=True) == {"label": "x"}


@pytest.mark.parametrize(
    ("values", "text", "message"),
    [
        ({"step": 3}, False, "did you mean steps"),
        ({"steps": 3.0}, False, "steps: expected int, got 3.0"),
        ({"steps": "3"}, False, "steps: expected int, got '3'"),
        ({"steps": True}, False, "steps: expected int, got True"),
        ({"steps": "3.5"}, True, "steps: expected int, got '3.5'"),
        ({"rate": "fast"}, True, "rate: expected float, got 'fast'"),
        ({"wide": "perhaps"}, True, "wide: expected bool"),
        ({"levels": "3"}, True, "levels: expected list"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(values, text, message, tmp_path):
    path = notebook(tmp_path / "n.ipynb")
    with pytest.raises((ParameterError, UnknownName), match=re.escape(message)):
        read(path).check(values, text=text)
    if not text:
        with pytest.raises((ParameterError, UnknownName), match=re.escape(message)):
            run_notebook(path, values, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "text.ipynb").write_text("{}")
    with pytest.raises(ParameterError, match=r"text\.ipynb is none"):
        read(tmp_path / "text.ipynb")
    with pytest.raises(UnknownName, match="nosuch"):
        find(tmp_path / "nosuch.ipynb")
    path = notebook(tmp_path / "n.ipynb")
    with pytest.raises(UnknownName, match="form of n"):
        read(path).form("smok")
    with pytest.raises(ParameterError, match="own"):
        run_notebook(path, {}, tmp_path)
    with pytest.raises(ParameterError, match="no Python"):
        read(notebook(tmp_path / "n.ipynb", parameters="steps = ="))


def test_a_run_leaves_the_executed_copy_a_page_and_the_results(tmp_path):
    out, seen = tmp_path / "out", []
    path = notebook(tmp_path / "n.ipynb", FIGURE, RESULT, CHECK)
    before = path.read_bytes()
    done = run_notebook(path, {"steps": 4}, out, on_cell=lambda *place: seen.append(place))
    assert path.read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ["loss.zarr", "n.html", "n.ipynb"]
    assert done.datasets == (out / "loss.zarr",)
    assert done.parameters == {"steps": 4, "out_dir": str(out)}
    assert seen == [(i, 6) for i in range(6)]
    assert "steps = 4" in done.notebook.read_text()
    cells = nbformat.read(done.notebook, as_version=4).cells
    assert "inside 3\n" in [output.get("text") for cell in cells for output in cell.get("outputs", ())]

    page = done.html.read_text()
    assert "the-curve" in page
    assert page.count("Plotly.newPlot(") == 1
    assert "<mfrac>" in page
    assert "$$" not in re.sub(r"(?s)<(script|style).*?</\1>", "", page)
    # What a browser would fetch on its own; links that a person may click are no matter.
    assert re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//[^"'\s>]*""", page) == []

    again = run_notebook(path, {"steps": 4, "out_dir": ""}, out)
    assert again.datasets == ()


def test_a_page_is_drawn_in_a_browser_without_any_other_host(tmp_path, page):
    done = run_notebook(notebook(tmp_path / "n.ipynb", FIGURE), {}, tmp_path / "out")
    page.goto(done.html.as_uri())
    page.get_by_text("the-curve").or_(page.locator(".js-plotly-plot .scatterlayer path.js-line")).first.wait_for()
    fraction = page.locator("math mfrac").bounding_box()
    letter = page.locator("math mfrac mi").first.bounding_box()
    assert fraction["height"] > 1.5 * letter["height"]


def test_a_failing_cell_is_named_and_leaves_nothing_that_looks_finished(tmp_path):
    out = tmp_path / "out"
    path = notebook(tmp_path / "n.ipynb", FIGURE, CHECK)
    run_notebook(path, {}, out)
    with pytest.raises(NotebookError) as caught:
        run_notebook(path, {"steps": 20}, out)
    assert str(caught.value) == "n.ipynb, cell 4 (assert steps < 10, 'too many\\nsteps'): AssertionError: too many"
    assert sorted(p.name for p in out.iterdir()) == ["n.failed.html", "n.failed.ipynb"]
    assert "AssertionError" in (out / "n.failed.html").read_text()
    run_notebook(path, {}, out)
    assert sorted(p.name for p in out.iterdir()) == ["n.html", "n.ipynb"]


def test_a_cell_that_takes_too_long_and_a_kernel_that_dies_are_named(tmp_path):
    slow = notebook(tmp_path / "slow.ipynb", "import time\ntime.sleep(600)")
    with pytest.raises(NotebookError, match=r"slow\.ipynb, cell 3 \(import time\): it took longer than 1 s"):
        run_notebook(slow, {}, tmp_path / "out", timeout=1)
    dead = notebook(tmp_path / "dead.ipynb", "import os\nos._exit(3)")
    with pytest.raises(NotebookError, match=r"dead\.ipynb, cell 3 \(import os\): DeadKernelError"):
        run_notebook(dead, {}, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.ipynb")} == {"slow.failed.ipynb", "dead.failed.ipynb"}


def test_the_command_runs_a_notebook_and_says_what_it_left(tmp_path):
    path = notebook(tmp_path / "n.ipynb", RESULT, CHECK, forms={"smoke": {"steps": 2}})
    result = hmlab(
        "run", path, "-p", "rate", "0.5", "-p", "wide=true", "--form", "smoke", "--out", tmp_path / "o", "--json"
    )
    said = json.loads(result.stdout)
    assert said["parameters"] == {"steps": 2, "rate": 0.5, "wide": True, "out_dir": str(tmp_path / "o")}
    assert [Path(p).name for p in (said["notebook"], said["html"], *said["datasets"])] == [
        "n.ipynb",
        "n.html",
        "loss.zarr",
    ]
    failed = hmlab("run", path, "-p", "steps", "20", "--out", tmp_path / "p", status=1)
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith("hmlab: n.ipynb, cell 4 ")
    for wrong, hint in (["-p", "step", "3"], "steps"), (["-p", "steps", "x"], "int"), (["--form", "smok"], "smoke"):
        refused = hmlab("run", path, *wrong, "--out", tmp_path / "q", status=2)
        (line,) = refused.stderr.splitlines()
        assert hint in line
    assert not (tmp_path / "q").exists()


def test_one_failing_reproduction_does_not_stop_the_others(tmp_path):
    forms = {"quick": {"steps": 2}}
    notebook(tmp_path / "in" / "reproductions" / "a_broken.ipynb", "1 / 0", forms=forms, title="A <broken> one")
    notebook(tmp_path / "in" / "reproductions" / "b_formless.ipynb")
    notebook(tmp_path / "in" / "reproductions" / "c_good.ipynb", RESULT, forms=forms)
    notebook(tmp_path / "in" / "20_not_reproduced.ipynb", forms=forms)
    out = tmp_path / "out"
    result = hmlab("reproduce", "--notebooks", tmp_path / "in", "--out", out, "--json", status=1)
    said = json.loads(result.stdout)
    assert said["failed"] == ["a_broken", "b_formless"]
    assert "2 of 3" in result.stderr
    index = (out / "index.html").read_text()
    assert "2 of 3 failed" in index
    assert "A &lt;broken&gt; one" in index
    assert "ZeroDivisionError" in index
    assert "c_good/loss.zarr" in index
    assert "20_not_reproduced" not in index
    assert "torch" in index
    links = re.findall(r'href="([^"]+)"', index)
    assert links == ["a_broken/a_broken.failed.html", "c_good/c_good.html"]
    assert all((out / link).is_file() for link in links)
    assert "http" not in index


def test_the_package_finds_its_own_notebooks_by_name():
    for described in available():
        assert find(described.name) == described.path
