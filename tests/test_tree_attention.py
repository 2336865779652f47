"""Tree attention: what the demands on every operator leave out, and its form for one step."""

import pytest
import torch
from hmlab_kernels import parity
from hmlab_kernels.tree_attention import Level, attention_weights, tree_attention, tree_attention_step
from hmlab_kernels.tree_attention.cases import inputs, tiles
from hmlab_kernels.tree_attention.levels import visible_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["fused"] if DEVICE == "cuda" else ["native", "fused"]
STEPS = ["reference", "eager", "fused"]


def _gradients(made, impl, **changed):
    leaves = {name: made[name].detach().requires_grad_() for name in ("own", "nodes")}
    out, lse = tree_attention(**made | leaves | changed, impl=impl)
    seen = lse.isfinite()
    loss = (out * torch.linspace(-1, 1, out.shape[-1], device=out.device)).square().sum() + lse[seen].sin().sum()
    return out, lse, *torch.autograd.grad(loss, list(leaves.values()))


@pytest.fixture
def poisoned():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"own": torch.zeros(1, 4, 2, 1, 16)}, r"own: expected \[batch, time, 3, heads, dim\], got \[1, 4, 2, 1, 16\]"),
        ({"own": torch.zeros(1, 4, 3, 1, 1040)}, r"nodes: expected \[rows, 2, 1, 1040\], got"),
        ({"nodes": torch.zeros(3, 2, 2, 16)}, r"nodes: expected \[rows, 2, 1, 16\], got \[3, 2, 2, 16\]"),
        ({"nodes": torch.zeros(3, 2, 1, 16).double()}, r"nodes: expected own's dtype torch.float32, got torch.float64"),
        ({"position": torch.ones(1, 5).long()}, r"position: expected \[1, 4\], got \[1, 5\]"),
        ({"arity": 1}, "arity: expected at least 2, got 1"),
        ({"impl": "none"}, r"impl: tree_attention expected one of \['native', 'fused', 'eager', 'reference'\]"),
    ],
)
def test_errors_name_the_argument(changed, message):
    made = inputs(parity.Draw(), 1, 4, 1, 16)
    with pytest.raises(ValueError, match=message):
        tree_attention(**made | changed)


@pytest.mark.unchecked
def test_heads_too_wide_are_refused():
    made = inputs(parity.Draw(), 1, 4, 1, 1025)
    with pytest.raises(ValueError, match="own: expected a head dim of at most 1024, got 1025"):
        tree_attention(**made)
    made = inputs(parity.Draw(), 1, 4, 1, 1024)
    with pytest.raises(ValueError, match=r"expected one of \['native', 'eager', 'reference'\], got 'fused'"):
        tree_attention(**made, impl="fused")


@pytest.mark.parametrize("impl", FAST)
def test_two_runs_give_the_same_bits(impl):
    made = inputs(parity.Draw(torch.float32, DEVICE), 2, 100, 1, 16, documents=(40, 60))
    first, second = _gradients(made, impl), _gradients(made, impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", [*FAST, "eager"])
def test_nodes_that_nobody_reads_have_no_gradient(impl, poisoned):
    """Under packing and padding: of the carried nodes only the youngest is read, and some rows stay empty."""
    made = inputs(parity.Draw(torch.float32, DEVICE), 2, 90, 1, 16, carry=3, starts=(13, 300), documents=(20, 50),
                  padding=20)  # fmt: skip
    read = torch.zeros(len(made["nodes"]), dtype=torch.bool, device=DEVICE)
    for i, level in enumerate(made["levels"]):
        rows, sees = visible_rows(made["position"], level, 2 ** (i + 1))
        read[rows[sees].flatten()] = True
    assert 0 < read.sum() < len(read)
    if impl in FAST:  # and what they hold reaches nothing
        made["nodes"][~read] = torch.nan
    out, *_, grad = _gradients(made, impl)
    assert torch.equal(grad.flatten(1).any(1), read) and grad.isfinite().all() and out.isfinite().all()


def test_runs_longer_than_a_group_are_added_in_stages(monkeypatch, poisoned):
    """Six tiles in groups of two: nodes that begin and end inside a tile, a group, a group of groups, or outlast."""
    from hmlab_kernels.tree_attention import fused

    made = inputs(parity.Draw(torch.float32, DEVICE), 1, 360, 1, 16, slots=2, carry=1, starts=(50,),
                  documents=(80, 2, 278))  # fmt: skip
    expected = _gradients(made, "eager")
    monkeypatch.setattr(fused, "GROUP", 2)
    for got, wanted in zip(_gradients(made, "fused"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_positions_may_be_any_numbers(poisoned):
    """A tile may complete a node at every position; nothing counts on fewer."""
    draw = parity.Draw(torch.float32, DEVICE)
    position = draw.integers(0, 9, 2, 70) * 4
    levels = [Level(0, 80, 1, 160, 1, 1), Level(160, 80, 1, 160, 1, 1)]
    made = {"own": draw.normal(2, 70, 3, 1, 16), "nodes": draw.normal(320, 2, 1, 16), "position": position,
            "levels": levels}  # fmt: skip
    for got, wanted in zip(_gradients(made, "fused"), _gradients(made, "eager"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_weights_are_those_of_the_output():
    made = inputs(parity.Draw(torch.float64), 1, 21, 2, 16, slots=2)
    out, _ = tree_attention(**made, impl="reference")
    weight = attention_weights(**made).double()
    values = [made["own"][:, :, None, 2]]
    for i, level in enumerate(made["levels"]):
        values.append(made["nodes"][visible_rows(made["position"], level, 2 ** (i + 1))[0], 1])
    read = torch.einsum("bthn,btnhd->bthd", weight, torch.cat(values, 2))
    torch.testing.assert_close(read, out, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_half():
    made = inputs(parity.Draw(torch.bfloat16, DEVICE), 1, 20, 1, 16)
    for impl in [*FAST, "eager", "reference"]:
        out, lse, grad_own, grad_nodes = _gradients(made, impl)
        assert {x.dtype for x in (out, grad_own, grad_nodes)} == {torch.bfloat16} and lse.dtype == torch.float32
    assert set(tiles(made)) == {"out", "lse", "grad own"}


def _state(draw, batch=3, slots=2, dim=16):
    """A sequence, and the token, nodes and visibility that a step has at its last position."""
    made = inputs(draw, batch, 90, 2, dim, slots=slots, carry=1, starts=[(0, 7, 300)[b % 3] for b in range(batch)])
    made["position"][1] = made["position"][1].sub(80).clamp(min=0)  # a row that has seen little
    nodes, sees = [], []
    for i, level in enumerate(made["levels"]):
        rows, seen = visible_rows(made["position"], level, 2 ** (i + 1))
        nodes.append(made["nodes"][rows[:, -1]])
        sees.append(seen[:, -1:].expand(-1, slots))
    return made, made["own"][:, -1], torch.cat(nodes, 1), torch.cat(sees, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", STEPS)
def test_a_step_is_the_last_position(impl, dtype):
    made, own, nodes, sees = _state(parity.Draw(dtype, DEVICE))
    assert 0 < sees.sum() < sees.numel()
    whole, _ = tree_attention(**made | {k: made[k].double() for k in ("own", "nodes")}, impl="reference")
    got = tree_attention_step(own, nodes, sees, impl=impl)
    assert got.dtype == dtype and got.is_contiguous()
    assert (parity.relative_error(got, whole[:, -1], dtype) <= 1).all()


@pytest.mark.parametrize("impl", ["eager", "fused"])
@pytest.mark.parametrize("batch, count, heads, dim", [(0, 3, 1, 16), (2, 0, 1, 16), (2, 1, 3, 8), (1, 300, 1, 80)])
def test_a_step_of_any_size_and_its_gradients(impl, batch, count, heads, dim):
    draw = parity.Draw(torch.float32, DEVICE)
    own = draw.normal(batch, heads, 3, dim).transpose(1, 2).requires_grad_()
    nodes = draw.normal(batch, count, 2, heads, dim).requires_grad_()
    sees = draw.integers(0, 2, batch, count).bool()
    cotangent = draw.normal(batch, heads, dim)
    found = []
    for form, dtype in (("reference", torch.float64), (impl, torch.float32)):
        out = tree_attention_step(own.to(dtype), nodes.to(dtype), sees, scale=0.3, impl=form)
        loss = (out * cotangent).sum() + 0 * (own.sum() + nodes.sum())  # the reference reads only what is seen
        found.append([out, *torch.autograd.grad(loss, (own, nodes))])
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_a_step_is_registered_as_torch_expects():
    _, own, nodes, sees = _state(parity.Draw(torch.float32, DEVICE))
    leaves = own.detach().clone().requires_grad_(), nodes.detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.hmlab.tree_attention_step, (*leaves, sees, 0.25))
    for impl in ("eager", "fused"):
        torch._dynamo.reset()
        compiled = torch.compile(tree_attention_step, fullgraph=True, backend="aot_eager_decomp_partition")
        expected = tree_attention_step(own, nodes, sees, impl=impl)
        torch.testing.assert_close(compiled(own, nodes, sees, impl=impl), expected)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"own": torch.zeros(1, 2, 1, 16)}, r"own: expected \[batch, 3, heads, dim\], got \[1, 2, 1, 16\]"),
        ({"nodes": torch.zeros(1, 5, 2, 1, 8)}, r"nodes: expected \[1, count, 2, 1, 16\], got \[1, 5, 2, 1, 8\]"),
        ({"nodes": torch.zeros(1, 5, 2, 1, 16).half()}, "nodes: expected own's dtype torch.float32, got torch.float16"),
        ({"sees": torch.ones(1, 4).bool()}, r"sees: expected bool \[1, 5\], got torch.bool \[1, 4\]"),
        ({"sees": torch.ones(1, 5)}, r"sees: expected bool \[1, 5\], got torch.float32 \[1, 5\]"),
        ({"impl": "native"}, r"impl: tree_attention_step expected one of \['fused', 'eager', 'reference'\]"),
    ],
)
def test_errors_of_a_step_name_the_argument(changed, message):
    made = {"own": torch.zeros(1, 3, 1, 16), "nodes": torch.zeros(1, 5, 2, 1, 16), "sees": torch.ones(1, 5).bool()}
    with pytest.raises(ValueError, match=message):
        tree_attention_step(**made | changed)
