"""One list of what is needed, the same pins everywhere, and a wheel that works on its own."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def wanted() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return [requirement for requirement in found if requirement.name != "hmlab"]


def test_every_requirement_is_pinned_within_its_range():
    assert wanted()
    for requirement in wanted():
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        [version] = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{requirement} against the pin {pin}"


def test_every_pin_is_exact():
    for pin in PINS.values():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], str(pin)


def test_everything_imported_is_required():
    """No package is used that pyproject.toml does not name."""
    import ast
    from importlib.metadata import packages_distributions

    known = {canonicalize_name(requirement.name) for requirement in wanted()}
    # What comes with another that is named: Jupyter's server with the lab, traitlets with ipywidgets, ...
    known |= {"hmlab", "hmlab-kernels", "hmlab-widgets", "jupyter-server", "traitlets", "ipython", "nbformat",
              "nbclient", "simpervisor", "param",
              "click", "annotated-types"}  # fmt: skip
    distributions = packages_distributions()
    for folder in ("hmlab", "kernels", "widgets"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                    owners = {canonicalize_name(owner) for owner in distributions.get(top, [top])}
                    assert owners & known, f"{path.relative_to(ROOT)} imports {top}"


def test_conda_gives_the_package_itself_with_the_same_pins():
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    pip = lines[lines.index("- pip:") + 1 :]
    assert pip == ["- -e .[all]", "- -c constraints.txt"]
    assert any(line.startswith("- python=3.1") for line in lines)


def test_wheel_installs_alone_and_finds_what_it_brings(tmp_path):
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / made.stdout.split()[-1]
    assert wheel.stat().st_size < 6_000_000
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, cwd=tmp_path)
    # The packages from the wheel hide the checkout's; everything else comes from this environment.
    env = {**os.environ, "PYTHONPATH": str(site), "HMLAB_RUNS": str(tmp_path / "runs")}
    check = (
        "import hmlab, hmlab_kernels, hmlab_widgets, torch\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (hmlab, hmlab_kernels, hmlab_widgets))\n"
        "from hmlab import corpora, notebooks, pretrained, results\n"
        "from hmlab.lab import dashboards_in\n"
        "assert {n.path.stem for n in notebooks.available()} >= {'00_tour', '10_lmn'}\n"
        "assert 'tinyshakespeare' in corpora.catalogue() and 'logmem-32' in pretrained.names()\n"
        "assert results.published('lmn_table1').sizes['dim'] == 2 and len(dashboards_in(None)) == 2\n"
        "pretrained.load('logmem-32').model(torch.zeros(1, 9, dtype=torch.int64))\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=env, check=True)
    tour = [sys.executable, "-m", "hmlab", "run", "10_lmn", "--form", "smoke", "--out", str(tmp_path / "out")]
    subprocess.run(tour, cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "out" / "10_lmn.html").is_file()


@pytest.mark.parametrize(("python", "told"), [("python9.99", "expected Python 3.11 to 3.13, found none")])
def test_make_names_a_python_that_does_not_serve(python, told, tmp_path):
    done = subprocess.run(
        ["make", "-C", str(ROOT), "env", f"PYTHON={python}", f"VENV={tmp_path}/venv"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert told in done.stderr and python in done.stderr
    assert not (tmp_path / "venv").exists()


def test_notebooks_carry_no_outputs():
    import nbformat

    paths = sorted((ROOT / "notebooks").rglob("*.ipynb"))
    assert paths
    for path in paths:
        for cell in nbformat.read(path, 4).cells:
            assert not cell.get("outputs") and not cell.get("execution_count"), path.name
