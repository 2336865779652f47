"""Tree attention: what the demands on every operator leave out, and its form for one step."""

import pytest
import torch
from hmlab_kernels import parity
from hmlab_kernels.tree_attention import Level, attention_weights, tree_attention, tree_attention_step
from hmlab_kernels.tree_attention.cases import inputs, tiles
from hmlab_kernels.tree_attention.levels import visible_rows
from torch import Tensor

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
        ({"position": torch.ones(1, 4)}, r"position: expected integers, one of .*, got torch.float32"),
        ({"position": torch.ones(1, 4).bool()}, r"position: expected integers, one of .*, got torch.bool"),
        ({"position": torch.ones(1, 4, device="meta").long()}, "position: expected a tensor on cpu, got one on meta"),
        ({"own": torch.zeros(1, 4, 3, 1, 16).long()}, r"own: expected one of .*, got torch.int64"),
        ({"own": torch.zeros(1, 4, 3, 1, 16).to(torch.float8_e4m3fn)}, r"own: expected one of .*, got torch.float8"),
        ({"own": torch.zeros(1, 4, 3, 1, 0), "nodes": torch.zeros(3, 2, 1, 0)}, "own: expected a head dim of at least"),
        ({"arity": 1}, "arity: expected at least 2 and at most .*, got 1"),
        ({"arity": 2**64}, "arity: expected at least 2 and at most"),
        ({"levels": [Level(0, 2, 1, 2, 1, 0)] * 70}, "levels: expected spans of less than 2.63 tokens, got 70 levels"),
        ({"levels": [(0, 2, 1)]}, "levels: expected the 6 whole numbers of a Level"),
        ({"levels": [Level(0, 2, 0.5, 2, 1, 0)]}, "levels: expected the 6 whole numbers of a Level"),
        ({"levels": [Level(10**9, 2, 1, 2, 1, 0)]}, "levels: expected an offset within the 3 rows of nodes, got 10000"),
        ({"levels": [Level(-1, 2, 1, 2, 1, 0)]}, "levels: expected fields from 0 to"),
        ({"levels": [Level(0, 2, -1, 2, 1, 0)]}, "levels: expected fields from 0 to"),
        ({"levels": [Level(0, 2, 1, 2, 1, -1)]}, "levels: expected fields from 0 to"),
        ({"levels": [Level(0, 2**62, 1, 2, 1, 0)]}, "levels: expected fields from 0 to"),
        ({"levels": [Level(0, 2, 1, 2, 0, 0)]}, "levels: expected 1 to 65536 slots, got 0 in level 1"),
        ({"impl": "none"}, r"impl: tree_attention expected one of \['native', 'fused', 'eager', 'reference'\]"),
    ],
)
def test_errors_name_the_argument(changed, message):
    made = inputs(parity.Draw(), 1, 4, 1, 16)
    with pytest.raises(ValueError, match=message):
        tree_attention(**made | changed)


OUTSIDE = {
    "more nodes than there are": (torch.full((1, 600), 2), 8, [Level(0, 4, 1, 4, 1, 0)]),
    "a later slot": (torch.full((1, 4), 2), 4, [Level(0, 4, 1, 2, 2, 0)]),
    "a later row of the batch": (torch.full((2, 3), 2), 4, [Level(0, 4, 1, 4, 1, 0)]),
    "not carried": (torch.arange(9, 17)[None], 7, [Level(0, 4, 1, 4, 1, 0), Level(4, 2, 1, 2, 1, 0)]),
    "no rows": (torch.arange(1, 9)[None], 0, [Level(0, 0, 1, 0, 1, 0)]),
}  # fmt: skip


def _outside(form):
    position, rows, levels = OUTSIDE[form]
    draw = parity.Draw(torch.float32, DEVICE)
    return {"own": draw.normal(*position.shape, 3, 2, 16), "nodes": draw.normal(rows, 2, 2, 16),
            "position": position.to(DEVICE), "levels": levels}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA nothing waits for what positions say")
@pytest.mark.unchecked
@pytest.mark.parametrize("form", OUTSIDE)
@pytest.mark.parametrize("impl", ["native", "eager", "reference"])
def test_nodes_outside_the_table_are_an_error(impl, form):
    made = _outside(form)
    with pytest.raises(ValueError, match="position: reads a node that `nodes` does not hold"):
        tree_attention(**made, impl=impl)
    if impl != "reference":
        own, nodes, position, levels = made.values()
        out, lse = own[:, :, 0].contiguous(), own[:, :, 0, :, 0].contiguous()
        with pytest.raises(ValueError, match="position: reads a node that `nodes` does not hold"):
            torch.ops.hmlab.tree_attention_backward(own, nodes, position, list(sum(levels, ())), 2, 0.25, impl, out,
                                                    lse, out.clone(), lse.clone())  # fmt: skip
    with pytest.raises(ValueError, match="position: reads a node that `nodes` does not hold"):
        attention_weights(**made)


@pytest.mark.parametrize("form", OUTSIDE)
def test_fused_does_not_see_nodes_outside_the_table(form, monkeypatch):
    """As if each such position saw only the others; and what lies around the table is neither read nor written."""
    from hmlab_kernels.tree_attention import fused

    made = _outside(form)
    rows = len(made["nodes"])
    around = torch.full((rows + 2000, 2, 2, 16), torch.nan, device=DEVICE)
    around[1000 : 1000 + rows] = made["nodes"]
    made["nodes"] = around[1000 : 1000 + rows]
    monkeypatch.setattr(fused, "GROUP", 2)
    monkeypatch.setattr(Tensor, "new_zeros", _walled(Tensor.new_zeros, made["nodes"].shape))
    out, lse, *grads = _gradients(made, "fused")
    wall = _walled.last
    assert not wall[:1000].any() and not wall[1000 + rows :].any()
    query, key, value = made["own"].unbind(2)
    scores, values = [(query * key).sum(-1)[:, :, None] / 4], [value[:, :, None]]
    for i, level in enumerate(made["levels"]):
        at, sees = visible_rows(made["position"], level, 2 ** (i + 1))
        held = sees[..., None] & (at >= 0) & (at < rows)
        read = around[1000 + torch.where(held, at, -1000)]
        score = torch.einsum("bthd,btshd->btsh", key, read[:, :, :, 0]) / 4
        scores.append(score.where(held[..., None], -torch.inf))
        values.append(read[:, :, :, 1].nan_to_num())
    score = torch.cat(scores, 2)
    torch.testing.assert_close(out, torch.einsum("btsh,btshd->bthd", score.softmax(2), torch.cat(values, 2)))
    torch.testing.assert_close(lse, score.logsumexp(2))
    assert all(grad.isfinite().all() for grad in grads)


def _walled(new_zeros, shape):
    """`new_zeros` that lays a tensor of that shape into the middle of a larger one, kept as `_walled.last`."""

    def call(tensor, *size, **options):
        if tuple(size) == (shape,):
            _walled.last = new_zeros(tensor, shape[0] + 2000, *shape[1:])
            return _walled.last[1000 : 1000 + shape[0]]
        return new_zeros(tensor, *size, **options)

    return call


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA nothing waits for what positions say")
@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", [-1, 2**31, 2**32 + 2])
@pytest.mark.parametrize("impl", ["native", "eager", "reference"])
def test_positions_out_of_range_are_an_error(impl, wrong):
    made = inputs(parity.Draw(), 1, 4, 1, 16)
    made["position"][0, 2] = wrong
    with pytest.raises(ValueError, match=r"position: expected 0 to 2\^31 - 1, got"):
        tree_attention(**made, impl=impl)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("impl", [*FAST, "eager", "reference"])
def test_positions_of_any_integer_type(impl, dtype):
    """With a span, 256, that a byte does not hold."""
    made = inputs(parity.Draw(torch.float32, DEVICE), 1, 20, 1, 16)
    made["levels"] = [*made["levels"], *[Level(len(made["nodes"]), 0, 1, 0, 1, 0)] * 36]
    expected = tree_attention(**made, impl=impl)
    made["position"] = made["position"].to(dtype)
    for got, wanted in zip(tree_attention(**made, impl=impl), expected, strict=True):
        assert torch.equal(got, wanted)


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
