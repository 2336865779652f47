"""Which implementation serves: named or by device, on record, and never another one in silence."""

import os
import re
import subprocess
import sys

import hmlab_kernels
import pytest
import torch

from hmlab.memories import lmn


def test_what_ran_is_on_record():
    for impl in ("reference", "eager", "native"):
        hmlab_kernels.reset_used()
        lmn.Config(dim=8, heads=2, impl=impl).build()(torch.randn(1, 5, 8))
        assert hmlab_kernels.used() == {"tree_build": impl, "tree_attention": impl}


def test_unknown_implementation_is_refused():
    known = re.escape(str(list(hmlab_kernels.implementations("tree_attention"))))
    with pytest.raises(ValueError, match=f"impl: tree_attention expected one of {known}, got 'nativ'"):
        lmn.Config(dim=8, heads=2, impl="nativ").build()(torch.randn(1, 5, 8))


def test_without_a_compiler_the_default_is_eager_with_a_warning_and_native_raises(tmp_path):
    code = (
        "import warnings, torch, hmlab_kernels\nfrom hmlab.memories import lmn\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    lmn.Config(dim=8, heads=2).build()(torch.randn(1, 5, 8))\n"
        "assert any('no C++ compiler' in str(w.message) for w in told), told\n"
        "assert hmlab_kernels.used() == {'tree_build': 'eager', 'tree_attention': 'eager'}\n"
        "try:\n    lmn.Config(dim=8, heads=2, impl='native').build()(torch.randn(1, 5, 8))\n"
        "except RuntimeError as error:\n    assert 'needs a C++ compiler' in str(error)\n"
        "else:\n    raise SystemExit('native ran without a compiler')\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
