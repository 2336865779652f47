"""What every test has: checked shapes, a fixed seed, and a browser where one is asked for."""

import os
from importlib.util import find_spec
from pathlib import Path

# Tensors in tests are small: threads would only wait for one another, here and in every process started.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["browser"]

_unchecked = False

# The checks cannot be traced by torch.compile, so they step aside while it traces.
type(jaxtyping.config).jaxtyping_disable = property(lambda _: _unchecked or torch.compiler.is_compiling())

# Triton reads its kernels' source, so fused.py stays as it is.
_kernels = [
    f"hmlab_kernels.{path.parent.name}.{path.stem}"
    for path in Path(find_spec("hmlab_kernels").origin).parent.glob("*/*.py")
    if path.stem in ("reference", "eager")
]
jaxtyping.install_import_hook(["hmlab", *_kernels], "beartype.beartype")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the library's own argument errors are marked `unchecked`: annotations would speak first."""
    monkeypatch.setitem(globals(), "_unchecked", request.node.get_closest_marker("unchecked") is not None)
