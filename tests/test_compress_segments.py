"""What is special to compressed segments: mass is kept, slots nest, the identity is one, documents do not mix."""

import pytest
import torch
from hmlab_kernels import parity
from hmlab_kernels.compress_segments import IMPLEMENTATIONS, cases, compress_segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_form = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def _inputs(time=24, segment=8, most=4, heads=2, dim=16, batch=1, **options):
    return cases.inputs(parity.Draw(device=DEVICE), batch, time, heads, dim, segment=segment, most=most) | options


def test_shares_worked_out_by_hand():
    k = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]], device=DEVICE).view(1, 2, 1, 2)
    v = torch.tensor([4.0, 8.0], device=DEVICE).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    queries = torch.eye(2, device=DEVICE)[None]
    count = torch.tensor([[[1]]], device=DEVICE)
    mean = compress_segments(k, v, queries, count, segment=2, scale=1.0)
    assert mean.mass[0, 0, :, 0].tolist() == [2, 0] and mean.position[0, 0, :, 0].tolist() == [0.5, 0]
    assert mean.v[0, 0, :, 0].tolist() == [[6, 6], [0, 0]]
    # three tokens, so that two slots are no identity: shares of slot 0 are 1/2, 3/4 and 1/2
    k, v = (torch.cat([x, x[:, :1]], 1) for x in (k, v))
    slots = compress_segments(k, v, queries, count + 1, segment=3, scale=1.0)
    torch.testing.assert_close(slots.mass[0, 0, :, 0], torch.tensor([1.75, 1.25], device=DEVICE))
    torch.testing.assert_close(slots.position[0, 0, :, 0], torch.tensor([1.75 / 1.75, 1.25 / 1.25], device=DEVICE))
    torch.testing.assert_close(slots.v[0, 0, :, 0, 0], torch.tensor([10 / 1.75, 6 / 1.25], device=DEVICE))


@each_form
def test_every_token_hands_out_mass_one_over_the_kept_slots(impl):
    inputs = _inputs(time=53, segment=10, most=7)
    count = inputs["count"]
    assert (count[..., 0] != count[..., 1]).any()  # heads differ
    slots = compress_segments(**inputs, impl=impl)
    torch.testing.assert_close(slots.mass.sum(2), 10.0 * (count > 0))
    torch.testing.assert_close((slots.mass * slots.position).sum(2), 45.0 * (count > 0))
    for mean, whole in ((slots.k, inputs["k"]), (slots.v, inputs["v"])):
        total = whole[:, :50].unflatten(1, (5, 10)).sum(2) * (count > 0)[..., None]
        torch.testing.assert_close((slots.mass[..., None] * mean).sum(2), total, atol=1e-5, rtol=1e-4)
    beyond = torch.arange(7, device=DEVICE)[:, None] >= count[:, :, None]
    assert all((x[beyond] == 0).all() for x in slots)


@each_form
def test_a_smaller_count_uses_the_first_queries(impl):
    inputs = _inputs(most=6)
    inputs["count"] = torch.full((1, 3, 1), 2, device=DEVICE)
    few = compress_segments(**inputs, impl=impl)
    cut = compress_segments(**inputs | {"queries": inputs["queries"][:, :2]}, impl=impl)
    for a, b in zip(few, cut, strict=True):
        torch.testing.assert_close(a[:, :, :2], b)


@each_form
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_as_many_slots_as_tokens_are_the_tokens(impl, dtype):
    inputs = _inputs(time=35, most=8, batch=2)
    inputs |= {name: inputs[name].to(dtype).requires_grad_() for name in ("k", "v", "queries")}
    slots = compress_segments(**inputs | {"count": torch.full((2, 4, 1), 8, device=DEVICE)}, impl=impl)
    for mean, whole in ((slots.k, inputs["k"]), (slots.v, inputs["v"])):
        assert mean.dtype == dtype and torch.equal(mean.flatten(1, 2), whole[:, :32])
    assert (slots.mass == 1).all() and torch.equal(slots.position[0, 1, :, 0].cpu(), torch.arange(8.0))
    cotangents = [torch.randn_like(x) for x in slots]
    loss = sum((x * cotangent).sum() for x, cotangent in zip(slots, cotangents, strict=True))
    grads = torch.autograd.grad(loss, [inputs[name] for name in ("k", "v", "queries")], materialize_grads=True)
    for grad, cotangent in zip(grads[:2], cotangents[:2], strict=True):
        assert torch.equal(grad[:, :32], cotangent.flatten(1, 2)) and not grad[:, 32:].any()
    assert not grads[2].any()


@each_form
def test_documents_do_not_mix(impl):
    inputs = _inputs(time=20, segment=4, most=3)
    inputs["count"] = inputs["count"][:, :4]
    packed = compress_segments(**inputs, cu_seqlens=torch.tensor([0, 9, 9, 12, 20], device=DEVICE), impl=impl)
    assert packed.k.shape == (1, 4, 3, 2, 16)
    first = 0
    for start, stop in ((0, 9), (9, 12), (12, 20)):
        number = (stop - start) // 4
        own = inputs | {name: inputs[name][:, start:stop] for name in ("k", "v")}
        alone = compress_segments(**own | {"count": inputs["count"][:, first : first + number]}, impl=impl)
        for a, b in zip(packed, alone, strict=True):
            torch.testing.assert_close(a[:, first : first + number], b)
        first += number


@each_form
def test_a_slot_that_nobody_wants_stays_finite(impl):
    inputs = _inputs(time=16, most=3, scale=200.0)
    inputs["queries"][:, 1:] = -inputs["queries"][:, :1]  # one of two opposite queries gets nothing
    inputs["queries"][:, 2] *= 10
    inputs["k"][:] = inputs["queries"][:, 0] + 0.01 * inputs["k"]
    inputs["count"] = torch.full((1, 2, 1), 3, device=DEVICE)
    leaves = [inputs[name].requires_grad_() for name in ("k", "v", "queries")]
    slots = compress_segments(**inputs, impl=impl)
    assert (slots.mass[:, :, 1:] == 0).all()  # underflown
    lowest, highest = (inputs["v"].unflatten(1, (2, 8)).amin(2), inputs["v"].unflatten(1, (2, 8)).amax(2))
    assert ((slots.v >= lowest[:, :, None] - 1e-5) & (slots.v <= highest[:, :, None] + 1e-5)).all()
    grads = torch.autograd.grad(slots, leaves, [torch.randn_like(x) for x in slots])
    assert all(x.isfinite().all() for x in (*slots, *grads))


@each_form
@pytest.mark.parametrize("most", (4, 8))
def test_what_is_not_kept_may_hold_anything(impl, most):
    inputs = _inputs(most=most)  # three segments of 8 tokens, two heads
    inputs["count"] = torch.tensor([[[0, 2], [3, 0], [most, -1]]], device=DEVICE)
    leaves = [inputs[name].requires_grad_() for name in ("k", "v", "queries")]
    clean = compress_segments(**inputs, impl=impl)
    cotangents = [torch.randn_like(x) for x in clean]
    grads = torch.autograd.grad(clean, leaves, cotangents)
    beyond = torch.arange(most, device=DEVICE)[:, None] >= inputs["count"][:, :, None]
    inputs |= {name: inputs[name].detach().clone() for name in ("k", "v")}
    for name in ("k", "v"):
        for g, head in ((0, 0), (1, 1), (2, 1)):
            inputs[name][:, 8 * g : 8 * g + 8, head] = torch.nan
    leaves = [inputs[name].requires_grad_() for name in ("k", "v", "queries")]
    slots = compress_segments(**inputs, impl=impl)
    for x, y in zip(slots, clean, strict=True):
        assert (x[beyond] == 0).all() and torch.equal(x, y)
    # nor do the cotangents of empty slots come through
    torn = [x.masked_fill(beyond.view(*beyond.shape, *[1] * (x.ndim - 4)), torch.nan) for x in cotangents]
    for x, y in zip(torch.autograd.grad(slots, leaves, torn), grads, strict=True):
        torch.testing.assert_close(x, y)


@each_form
def test_a_bad_token_stays_in_the_kept_slots(impl):
    inputs = _inputs(time=16, most=4)
    inputs["count"] = torch.tensor([[[2, 4], [4, 4]]], device=DEVICE)
    inputs["k"][:, 3, 0] = torch.nan
    inputs["queries"].requires_grad_()
    slots = compress_segments(**inputs, impl=impl)
    assert slots.v[0, 0, :2, 0].isnan().all() and slots.v[0, 1].isfinite().all()
    assert all((x[0, 0, 2:, 0] == 0).all() for x in slots)
    (grad,) = torch.autograd.grad(slots.mass.square().sum() + slots.k.sum() + slots.v.sum(), inputs["queries"])
    assert grad[0, 2:].isfinite().all() and grad[1].isfinite().all()


@each_form
def test_outputs_left_alone_have_no_gradient(impl):
    inputs = _inputs()
    leaves = [inputs[name].requires_grad_() for name in ("k", "v", "queries")]
    mass = compress_segments(**inputs, impl=impl).mass
    grad_k, grad_v, grad_queries = torch.autograd.grad(mass.square().sum(), leaves, allow_unused=True)
    assert grad_k.any() and grad_queries.any() and (grad_v is None or not grad_v.any())


@each_form
def test_what_is_left_of_a_segment_is_compressed_as_if_alone(impl):
    """Ten tokens but for their first three, beside the seven as a segment."""
    inputs = _inputs(time=20, segment=10, most=4)
    slots = compress_segments(**inputs, first=torch.tensor([[3, 3]], device=DEVICE), impl=impl)
    rest = {name: inputs[name].unflatten(1, (2, 10))[:, :, 3:].flatten(1, 2) for name in ("k", "v")}
    alone = compress_segments(**inputs | rest | {"segment": 7}, impl=impl)
    held = torch.arange(4, device=DEVICE)[:, None] < inputs["count"][:, :, None]
    for a, b in zip(slots, alone._replace(position=alone.position + 3 * held), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(slots.mass.sum(2), 7.0 * held.any(2))


@each_form
def test_tokens_kept_whole_but_for_the_first(impl):
    inputs = _inputs(time=16, most=8)
    inputs |= {"count": torch.full((1, 2, 1), 8, device=DEVICE), "first": torch.tensor([[3, 0]], device=DEVICE)}
    slots = compress_segments(**inputs, impl=impl)
    assert all((x[0, 0, :3] == 0).all() for x in slots)
    for mean, whole in ((slots.k, inputs["k"]), (slots.v, inputs["v"])):
        assert torch.equal(mean.flatten(1, 2)[:, 3:], whole[:, 3:])
    assert slots.mass[0, :, :, 0].flatten().tolist() == [0] * 3 + [1] * 13
    assert slots.position[0, 0, :, 0].tolist() == [0, 0, 0, 3, 4, 5, 6, 7]


@each_form
@pytest.mark.parametrize("most", (4, 8))
def test_tokens_left_out_may_hold_anything(impl, most):
    """Segments of 8: some left out, all, more than all, and none; compressed, or kept whole where most is 8."""
    first = torch.tensor([[3, 8, 11, 0]], device=DEVICE)
    inputs = _inputs(time=32, most=most, first=first)
    inputs["count"] = torch.full((1, 4, 2), most, device=DEVICE)
    inputs["count"][..., 1] = 2
    out = torch.arange(8, device=DEVICE) < first[..., None]

    def run(filling):
        given = inputs | {name: inputs[name].detach().clone() for name in ("k", "v", "queries")}
        for name in ("k", "v"):
            given[name][out.flatten(1)] = filling
        leaves = [given[name].requires_grad_() for name in ("k", "v", "queries")]
        slots = compress_segments(**given, impl=impl)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(x) for x in slots]
        # of slots that hold nothing: the tokens left out of those kept whole, and segments of which nothing is left
        for x in cotangents:
            x[:, 1:3] = filling
            if most == 8:
                x[:, 0, :3, 0] = filling
        return slots, torch.autograd.grad(slots, leaves, cotangents)

    (slots, grads), (same_slots, same_grads) = run(torch.nan), run(5.0)
    for x, y in zip((*slots, *grads), (*same_slots, *same_grads), strict=True):
        assert x.isfinite().all() and torch.equal(x, y)
    assert all((x[:, 1:3] == 0).all() for x in slots)
    for grad in grads[:2]:
        assert not grad[out.flatten(1)].any() and grad[~out.flatten(1)].any(-1).all()


@each_form
def test_gradients_through_what_is_left(impl):
    """Beside central differences of the reference in float64."""
    inputs = _inputs(time=12, segment=6, most=6, dim=16, first=torch.tensor([[2, 5]], device=DEVICE))
    inputs["count"] = torch.tensor([[[3, 6], [2, 4]]], device=DEVICE)
    cotangents = [torch.randn_like(x) for x in compress_segments(**inputs, impl=impl)]

    def loss(form, **changed):
        slots = compress_segments(**inputs | changed, impl=form)
        return sum((x * y.to(x)).sum() for x, y in zip(slots, cotangents, strict=True))

    leaves = {name: inputs[name].requires_grad_() for name in ("k", "v", "queries")}
    grads = dict(zip(leaves, torch.autograd.grad(loss(impl), list(leaves.values())), strict=True))
    exact = {name: x.detach().double() for name, x in leaves.items()}
    for name, x in exact.items():
        way = torch.randn_like(x)
        ahead, behind = (loss("reference", **exact | {name: x + step * way}) for step in (1e-6, -1e-6))
        torch.testing.assert_close((grads[name] * way).sum().double(), (ahead - behind) / 2e-6, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ("none, some, all, too many", "wide head", "packed documents", "the first left out"))
def test_a_program_may_take_several_segments(monkeypatch, case):
    """As on long inputs: one program of each head adds up all the segments' gradients of the queries."""
    from hmlab_kernels.compress_segments import fused

    case = parity.cases("compress_segments")[case]
    if case.name == "wide head":  # dims in several tiles: added up in memory
        case = parity.Case(case.name, lambda d: cases.inputs(d, 2, 34, 2, 256, segment=17, most=3), case.gradients)
    monkeypatch.setattr(fused, "_PROGRAMS", 3)
    assert not [d for d in parity.compare("compress_segments", case, "fused", device=DEVICE) if d.first is not None]


@pytest.mark.unchecked
@pytest.mark.parametrize("changed, message", (
    ({"k": torch.zeros(2, 3, 4)}, r"k: expected \[batch, time, kv_heads, dim\] of floats, got torch.float32 of shape"),
    ({"k": torch.zeros(1, 9, 2, 4, dtype=torch.int64)}, "k: expected .* got torch.int64"),
    ({name: torch.zeros(1, 9, 2, 0) for name in ("k", "v")}, "k: expected at least 1 kv head of at least 1 dim, got"),
    ({name: torch.zeros(1, 9, 0, 4) for name in ("k", "v")}, "k: expected at least 1 kv head of at least 1 dim, got"),
    ({"v": torch.zeros(1, 9, 2, 4, dtype=torch.int64)}, "v: expected torch.float32 .* got torch.int64"),
    ({"queries": torch.zeros(2, 3, 4).int()}, "queries: expected k's dtype torch.float32, got torch.int32"),
    ({"segment": 4.0}, "segment: expected a whole number, got 4.0"),
    ({"v": torch.zeros(1, 9, 2, 5)}, r"v: expected torch.float32 \[1, 9, 2, 4\] as k is, got .* \[1, 9, 2, 5\]"),
    ({"v": torch.zeros(1, 9, 2, 4).half()}, "v: expected torch.float32 .* got torch.float16"),
    ({"segment": 0}, "segment: expected 1 to 256, got 0"),
    ({"segment": 257}, "segment: expected 1 to 256, got 257"),
    ({"queries": torch.zeros(1, 3, 4)}, r"queries: expected \[2, most, 4\], got \[1, 3, 4\]"),
    ({"queries": torch.zeros(2, 5, 4)}, "queries: expected 1 to 4 for a segment of 4, got 5"),
    ({"queries": torch.zeros(2, 0, 4)}, "queries: expected 1 to 4 for a segment of 4, got 0"),
    ({"queries": torch.zeros(2, 3, 4).half()}, "queries: expected k's dtype torch.float32, got torch.float16"),
    ({"count": torch.zeros(1, 2, 2)}, "count: expected integers, got torch.float32"),
    ({"count": torch.zeros(1, 3, 2, dtype=torch.int64)}, r"count: expected \[1, 2, 2 or 1\], got \[1, 3, 2\]"),
    ({"count": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"count: expected \[1, 2, 2 or 1\], got \[1, 2, 3\]"),
    ({"first": torch.zeros(1, 2)}, r"first: expected integers \[1, 2\], got torch.float32 \[1, 2\]"),
    ({"first": torch.zeros(1, 2, dtype=torch.bool)}, r"first: expected integers \[1, 2\], got torch.bool"),
    ({"first": torch.zeros(1, 3, dtype=torch.int64)}, r"first: expected integers \[1, 2\], got torch.int64 \[1, 3\]"),
    ({"first": torch.zeros(1, 2, dtype=torch.int64, device="meta")}, "first: expected a tensor on cpu, got one"),
    ({"cu_seqlens": torch.tensor([0, 3, 9])}, "count: expected 1 segments for these cu_seqlens, got 2"),
    ({"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens: expected to rise from 0 to 9"),
    ({"cu_seqlens": torch.zeros(1, 2)}, "cu_seqlens: expected a vector of int"),
    ({"impl": "native"}, "impl: compress_segments expected one of"),
))  # fmt: skip
def test_what_is_wrong_is_named(changed, message):
    right = {"k": torch.zeros(1, 9, 2, 4), "v": torch.zeros(1, 9, 2, 4), "queries": torch.zeros(2, 3, 4),
             "count": torch.ones(1, 2, 2, dtype=torch.int64), "segment": 4}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        compress_segments(**right | changed)
