"""Every operator, implementation and case through the same demands; what is special to one has a test file of its own.

On a machine with CUDA the same file checks there; without one, Triton's interpreter runs the fused forms.
"""

import hmlab_kernels
import pytest
import torch
from hmlab_kernels import parity
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _forms(op):
    """The implementations to compare with the reference on this machine."""
    without = {"reference", "native"} if DEVICE == "cuda" else {"reference"}
    return [impl for impl in hmlab_kernels.implementations(op) if impl not in without]


ALL = [(op, impl, case) for op in hmlab_kernels.OPS for impl in _forms(op) for case in parity.cases(op)]
FIRST = [(op, impl) for op in hmlab_kernels.OPS for impl in _forms(op)]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that an operator allocates and does not write holds NaN, and is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, impl, case", ALL)
def test_equals_the_reference(op, impl, case, dtype):
    differences = parity.compare(op, parity.cases(op)[case], impl, DTYPES[dtype], DEVICE)
    assert differences
    outside = [d for d in differences if d.first is not None]
    assert not outside, outside


@pytest.mark.parametrize("op", [op for op in hmlab_kernels.OPS if any(c.gradients for c in parity.cases(op).values())])
def test_gradients_of_the_reference_are_right(op):
    case = min((c for c in parity.cases(op).values() if c.gradients), key=_size)
    inputs = parity._exact(case.make(parity.Draw(torch.float64)))
    wanted = {name: inputs[name].clone().requires_grad_() for name in case.gradients}

    def call(*tensors):
        result = hmlab_kernels.OPS[op](**inputs | dict(zip(wanted, tensors, strict=True)), impl="reference")
        return tuple(
            torch.where(out.isfinite(), out, 0) for out in parity._named(op, result).values() if out.is_floating_point()
        )

    assert torch.autograd.gradcheck(call, tuple(wanted.values()), fast_mode=True)


@pytest.mark.parametrize("op, impl", FIRST)
def test_is_registered_as_torch_expects(op, impl):
    """torch.library.opcheck on the very calls that the public function makes."""
    case = _largest(op)
    inputs = case.make(parity.Draw(torch.float32, DEVICE))
    with _Calls() as seen:
        parity.evaluate(op, case, inputs, impl)
    assert seen.calls, "no operator of the namespace hmlab was called"
    for call, arguments, keywords in seen.calls:
        differentiable = bool(case.gradients) and not call._schema.name.endswith("_backward")
        given = [_input(x, differentiable) for x in arguments]
        torch.library.opcheck(call, tuple(given), keywords)


@pytest.mark.parametrize("op, impl", FIRST)
def test_compiles_without_a_break(op, impl):
    case = _largest(op)
    inputs = case.make(parity.Draw(torch.float32, DEVICE))
    expected = parity.evaluate(op, case, inputs, impl)
    torch._dynamo.reset()
    plain = hmlab_kernels.OPS[op]
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager_decomp_partition")
    hmlab_kernels.OPS[op] = compiled
    try:
        got = parity.evaluate(op, case, inputs, impl)
    finally:
        hmlab_kernels.OPS[op] = plain
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, equal_nan=True)


@pytest.mark.parametrize("op, impl", [(op, impl) for op, impl in FIRST if impl == "fused"])
def test_strides_beyond_32_bits_are_followed(op, impl):
    """Neighbours that lie almost 2^31 elements apart: the stride fits 32 bits, places behind it do not. The memory in
    between is reserved and never touched."""
    case = _largest(op)
    inputs = case.make(parity.Draw(torch.float16, DEVICE))
    name = next(n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.dtype == torch.float16 and x.ndim > 1)
    near = inputs[name]
    axis = next(a for a in range(near.ndim - 2, -1, -1) if near.shape[a] > 1)
    far = _spread(near, axis)
    expected = parity.evaluate(op, case, inputs, impl)
    got = parity.evaluate(op, case, inputs | {name: far}, impl)
    for output, value in expected.items():
        torch.testing.assert_close(got[output], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.unchecked
@pytest.mark.parametrize("op", hmlab_kernels.OPS)
def test_a_tensor_that_lies_elsewhere_is_refused(op):
    """A C++ or Triton form would read whatever lies at a foreign address."""
    inputs = _largest(op).make(parity.Draw(torch.float32, DEVICE))
    tensors = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and not n.startswith("cu_")]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match=f"{name}: expected .* on {DEVICE}"):
            hmlab_kernels.OPS[op](**inputs | {name: inputs[name].to("meta")})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op: expected one of"):
        hmlab_kernels.diverge("no_such_operator", "x", "eager", "reference")
    with pytest.raises(ValueError, match="case: tree_attention has"):
        hmlab_kernels.diverge("tree_attention", "no such case", "eager", "reference")


def test_divergence_names_the_first_place(monkeypatch):
    from hmlab_kernels.tree_attention import eager

    right = eager.forward

    def wrong(*arguments):
        out, lse = right(*arguments)
        out[1, 70:, 1, 3] += 0.5
        return out, lse

    case = "odd length, odd dim"
    assert hmlab_kernels.diverge("tree_attention", case, "eager", "reference").index is None
    monkeypatch.setattr(eager, "forward", wrong)
    found = hmlab_kernels.diverge("tree_attention", case, "eager", "reference")
    assert (found.output, found.index, found.differing) == ("out", (1, 70, 1, 3), 7)
    assert abs(found.a - found.reference - 0.5) < 1e-5 and abs(found.b - found.reference) < 1e-5
    assert "first part in 'out' at [1, 70, 1, 3]" in str(found)


class _Calls(TorchDispatchMode):
    """Notes which operators of ours are called, with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hmlab":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})


def _input(x, differentiable):
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().requires_grad_(differentiable and x.is_floating_point())


def _size(case):
    values = case.make(parity.Draw()).values()
    elements = sum(x.numel() for x in values if isinstance(x, torch.Tensor))
    return elements or 10**9


def _largest(op):
    return max(parity.cases(op).values(), key=_size)


def _spread(x, axis):
    """x with 2^31 - 64 elements between neighbours of an axis."""
    gap = 2**31 - 64
    rest = [size for a, size in enumerate(x.shape) if a != axis]
    inner = torch.empty(rest).stride()
    strides = [*inner[:axis], gap, *inner[axis:]]
    storage = torch.UntypedStorage((gap * (x.shape[axis] - 1) + gap) * x.element_size(), device=x.device)
    far = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, 0, x.shape, strides)
    return far.copy_(x)
