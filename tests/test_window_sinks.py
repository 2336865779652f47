"""The sinks' gradient of the fused window attention: in few parts, and the same however many there are."""

import pytest
import torch
from hmlab_kernels import parity

if torch.cuda.is_available():
    pytest.skip("parts are counted under the interpreter", allow_module_level=True)

from hmlab_kernels.window_attention import cases, fused

_NAMES = ("several blocks, sinks", "segments, sinks, grouped heads", "many sinks", "packed, more keys",
          "stream, packed", "window over everything")  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", _NAMES)
def test_a_part_may_take_many_queries(monkeypatch, name, parts):
    monkeypatch.setattr(fused, "_PARTS", parts)
    case = parity.cases("window_attention")[name]
    assert not [d for d in parity.compare("window_attention", case, "fused") if d.first is not None]


@pytest.mark.parametrize("documents", [(), (700,), (300, 0, 333, 67), (10,) * 70])
def test_parts_are_few_whatever_the_length(monkeypatch, documents):
    monkeypatch.setattr(fused, "_PARTS", 4)
    seen, plain = [], fused._blocks

    def counted(batch, time, bounds, size):
        blocks = plain(batch, time, bounds, size)
        seen.append((size, blocks.programs))
        return blocks

    monkeypatch.setattr(fused, "_blocks", counted)
    inputs = cases.inputs(parity.Draw(), 1, 700, 2, 16, kv_heads=1, documents=documents, window=20, sinks=5)
    inputs |= {name: inputs[name].requires_grad_() for name in ("q", "k", "v")}
    grads = []
    for _ in range(2):
        seen.clear()
        out = cases.window_attention(**inputs, impl="fused")[0]
        grads.append(torch.autograd.grad(out.square().sum(), [inputs[name] for name in ("q", "k", "v")]))
        assert min(size for size, _ in seen) < 128 and seen[-1][0] >= 700 / 4
        assert seen[-1][1] <= 4 + len(documents)
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
