"""The layers hold, and what is heavy is loaded where it is used."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_layers():
    """The contracts in pyproject.toml: who may import whom."""
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


HEAVY = ("zarr", "dask", "plotly", "pydantic", "panel", "ipywidgets", "tokenizers", "xarray", "transformers", "scipy")


def test_a_model_needs_only_torch():
    """Kernels and models run where the rest of the workbench is not installed."""
    code = (f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
            "import torch, hmlab\nfrom hmlab.registry import model_config\n"
            "model_config('logmem', dim=16, vocab=5).build()(torch.zeros(1, 9, dtype=torch.int64))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_answers_without_torch():
    code = "import sys; sys.modules['torch'] = None\nfrom hmlab.cli import app"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
