"""Tree building beyond what every operator is asked: its stages, its layout, its errors."""

import hmlab_kernels
import pytest
import torch
from hmlab_kernels import parity
from hmlab_kernels.tree_build import STAGED, cases, tree_build, tree_levels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases.STAGED, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", [impl for impl in STAGED if impl != "reference"])
def test_stages_equal_the_reference(impl, case, dtype):
    outside = [d for d in parity.compare("tree_build", case, impl, dtype, DEVICE) if d.first is not None]
    assert not outside, outside
