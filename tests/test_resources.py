"""The fused kernels compile for a GPU that is not there: the interpreter lets through what the compiler refuses."""

import os
import re
import subprocess
import sys

import hmlab_kernels
import pytest
from hmlab_kernels import parity
from hmlab_kernels.resources import resources

_SHARED = 227 * 1024  # bytes that a program can have on Hopper


def _elements(case):
    return sum(x.numel() for x in case.make(parity.Draw()).values() if hasattr(x, "numel"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", [op for op in hmlab_kernels.OPS if "fused" in hmlab_kernels.implementations(op)])
def test_compiles_for_hopper(op, tmp_path):
    case = max(parity.cases(op).values(), key=_elements).name
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "hmlab_kernels.resources", op, "--case", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"(\d+) registers +(\d+) B spilled +(\d+) B shared", done.stdout)
    assert kernels, done.stdout
    for registers, _, shared in kernels:
        assert 0 < int(registers) <= 255 and int(shared) <= _SHARED, done.stdout


def test_what_cannot_be_compiled_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected unset"):
        resources("tree_attention", "two banks")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="case: tree_attention has"):
        resources("tree_attention", "no such case")
