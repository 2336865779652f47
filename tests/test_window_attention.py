"""Window attention where the shared cases do not reach: against plain attention, streamed, and its errors."""

import pytest
import torch
from hmlab_kernels import OPS, default_impl, implementations, parity
from hmlab_kernels.window_attention import cases, eager, window_attention
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [impl for impl in implementations("window_attention") if impl != "native" or DEVICE == "cpu"]


def visible(time, window, sinks, segment):
    """[query, key] of one document, spelt out."""
    p, j = torch.arange(time)[:, None], torch.arange(time)
    begin = (p - window + 1).clamp(min=0) // segment * segment
    return (j <= p) & ((j >= begin) | (j < sinks))


def tensors(*shape, kv_heads=None, keys=None, dtype=torch.float32):
    batch, time, heads, dim = shape
    draw = parity.Draw(dtype, DEVICE)
    kv = batch, time if keys is None else keys, kv_heads or heads, dim
    return draw.normal(*shape), draw.normal(*kv), draw.normal(*kv)


@pytest.mark.parametrize("window, sinks, segment", [(1, 0, 1), (7, 3, 1), (10, 5, 16), (2**40, 10**9, 2**35)])
@pytest.mark.parametrize("impl", IMPLS)
def test_is_attention_under_a_mask(impl, window, sinks, segment):
    q, k, v = tensors(2, 75, 4, 16, kv_heads=2)
    mask = visible(75, window, sinks, segment).to(DEVICE)
    heads_first = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    out, lse = window_attention(q, k, v, window=window, sinks=sinks, segment=segment, impl=impl)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    score = heads_first[0] @ heads_first[1].repeat_interleave(2, 1).mT / 4
    expected = score.masked_fill(~mask, -torch.inf).logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks, segment, chunks", [
    (0, 1, (1, 1, 1, 40, 7)), (4, 8, (3, 30, 1, 2, 9, 5)), (6, 5, (50,)), (5, 2, (1,) * 12),
])  # fmt: skip
@pytest.mark.parametrize("impl", IMPLS)
def test_a_stream_is_the_whole(impl, sinks, segment, chunks):
    """From a ring that holds NaN wherever it was not filled yet."""
    window, time = 6, sum(chunks)
    q, k, v = tensors(1, time, 2, 16)
    expected = window_attention(q, k, v, window=window, sinks=sinks, segment=segment, impl="reference")
    ring = window + segment - 2
    empty = torch.full_like(k[:, :1], torch.nan).expand(-1, ring + sinks, -1, -1)
    begin, got = 0, []
    for chunk in chunks:
        end = begin + chunk
        keys, values = (
            torch.cat([x[:, : min(sinks, end)], empty[:, min(sinks, end) : sinks],
                       empty[:, : max(0, ring - begin)], x[:, max(0, begin - ring) : end]], 1)
            for x in (k, v)
        )  # fmt: skip
        start = torch.tensor([begin - ring], device=DEVICE)
        inputs = [x.clone().requires_grad_() for x in (q[:, begin:end], keys, values)]
        result = window_attention(*inputs, window=window, sinks=sinks, segment=segment, start=start, impl=impl)
        for grad in torch.autograd.grad([x.sum() for x in result], inputs):
            assert grad.isfinite().all()
        got.append(result)
        begin = end
    for name, parts, whole in zip(("out", "lse"), zip(*got, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("impl", IMPLS)
def test_documents_do_not_see_one_another(impl):
    q, k, v = tensors(1, 60, 2, 16)
    options = {"window": 9, "sinks": 2, "segment": 4, "impl": impl}
    packed, _ = window_attention(q, k, v, cu_seqlens=torch.tensor([0, 20, 20, 60], device=DEVICE), **options)
    apart = [window_attention(*(x[:, a:b] for x in (q, k, v)), **options)[0] for a, b in ((0, 20), (20, 60))]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_before_the_document_sees_nothing(impl):
    inputs = [x.requires_grad_() for x in tensors(1, 5, 1, 16)]
    start = torch.tensor([-3], device=DEVICE)
    out, lse = window_attention(*inputs, window=4, start=start, impl=impl)
    assert (out[:, :3] == 0).all() and (lse[:, :3] == -torch.inf).all() and lse[:, 3:].isfinite().all()
    for grad in torch.autograd.grad(out.sum() + lse[:, 3:].sum(), inputs):
        assert (grad[:, :3] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("sinks, segment", [(0, 1), (3, 1), (2, 96), (0, 48)])
def test_eager_is_the_same_in_small_parts(monkeypatch, sinks, segment):
    """Every part one block: views, phases of segments and ends alike."""
    inputs = cases.inputs(parity.Draw(), 2, 700, 2, 8, window=30, sinks=sinks, segment=segment)
    case = parity.Case("parts", lambda _: inputs, ("q", "k", "v"))
    whole = parity.evaluate("window_attention", case, inputs, "eager")
    monkeypatch.setattr(eager, "_SCORES", 1)
    for name, value in parity.evaluate("window_attention", case, inputs, "eager").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl in ("native", "fused")])
def test_is_deterministic(impl):
    case = parity.cases("window_attention")["several blocks, sinks"]
    inputs = case.make(parity.Draw(torch.float32, DEVICE))
    first, second = (parity.evaluate("window_attention", case, inputs, impl) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_double_precision_stays_double():
    q, k, v = tensors(1, 9, 1, 8, dtype=torch.float64)
    out, lse = window_attention(q, k, v, window=3)
    assert out.dtype == lse.dtype == torch.float64
    assert default_impl("window_attention", DEVICE, torch.float64) != "fused"


def test_pairs_are_counted():
    for time, window, sinks in ((0, 3, 1), (5, 9, 2), (50, 8, 0), (50, 8, 3), (12, 8, 20)):
        assert cases.pairs(time, window, sinks) == int(visible(time, window, sinks, 1).sum())


Q, K = torch.zeros(2, 8, 4, 16), torch.zeros(2, 8, 2, 16)
ONE = torch.zeros(1, 8, 4, 16)
BOUNDS = torch.tensor([0, 3, 8])


@pytest.mark.unchecked
@pytest.mark.parametrize("change, message", [
    ({"q": Q[0]}, r"q: expected \[batch, time, heads, dim\]"),
    ({"q": Q.long()}, "q: expected floating point"),
    ({"q": torch.zeros(2, 8, 4, 300)}, "q: expected a head dim of 1 to 256, got 300"),
    ({"k": K[:1]}, r"k: expected \[2, keys, kv_heads, 16\]"),
    ({"k": K[..., :8]}, r"k: expected \[2, keys, kv_heads, 16\]"),
    ({"k": torch.zeros(2, 8, 3, 16)}, "k: expected a number of heads that divides q's 4, got 3"),
    ({"v": K[..., :8]}, r"v: expected k's shape \[2, 8, 2, 16\]"),
    ({"k": K.double()}, "k: expected q's dtype torch.float32"),
    ({"v": K.double()}, "v: expected q's dtype torch.float32"),
    ({"window": 0}, "window: expected at least 1, got 0"),
    ({"sinks": -1}, "sinks: expected at least 0, got -1"),
    ({"segment": 0}, "segment: expected at least 1, got 0"),
    ({"k": K[:, :7], "v": K[:, :7]}, "k: expected at least 8 keys .* after 0 separate sinks, got 7"),
    ({"start": torch.tensor([0, 0]), "sinks": 1}, "k: expected at least 8 keys .* after 1 separate sinks, got 7"),
    ({"start": torch.tensor([0])}, r"start: expected integers of shape \[2\]"),
    ({"start": torch.tensor([0.0, 0.0])}, r"start: expected integers of shape \[2\]"),
    ({"cu_seqlens": BOUNDS}, "cu_seqlens: expected a batch of 1"),
    ({"cu_keys": BOUNDS}, "cu_keys: expected a batch of 1"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_keys": BOUNDS}, "cu_keys: expected None without cu_seqlens"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_seqlens": BOUNDS.float()}, "cu_seqlens: expected a vector of integers"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_seqlens": BOUNDS[:2]}, "cu_seqlens: expected to rise from 0 to 8"),
    ({"q": ONE[:, :5], "k": ONE, "v": ONE, "cu_seqlens": BOUNDS}, "k: expected 5 keys .* without cu_keys"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_seqlens": BOUNDS, "cu_keys": BOUNDS[1:]}, "cu_keys: expected 3 elements"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_seqlens": BOUNDS, "cu_keys": torch.tensor([0, 4, 7])},
     "cu_keys: expected to rise from 0 to 8"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_seqlens": BOUNDS, "cu_keys": torch.tensor([0, 4, 8])},
     "cu_keys: expected as many keys as queries after the 0 .*, got 4 and 5 in sequence 1"),
    ({"q": ONE, "k": ONE, "v": ONE, "cu_seqlens": BOUNDS, "start": torch.tensor([0, 0]), "sinks": 1},
     "cu_keys: expected as many keys as queries after the 1 .*, got 2 and 3 in sequence 0"),
    ({"impl": "fastest"}, "impl: window_attention expected one of"),
])  # fmt: skip
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_refuses(change, message, impl):
    arguments = {"q": Q, "k": K, "v": K, "window": 4, "impl": impl} | change
    with pytest.raises(ValueError, match=message):
        OPS["window_attention"](arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("impl", ["native", "eager", "fused"])
def test_a_sequence_without_queries_may_hold_fewer_keys_than_sinks(impl):
    q, k = torch.randn(1, 6, 1, 16, requires_grad=True), torch.randn(1, 10, 1, 16, requires_grad=True)
    options = {"window": 2, "sinks": 4, "start": torch.tensor([0, 0]), "cu_seqlens": torch.tensor([0, 6, 6]),
               "cu_keys": torch.tensor([0, 10, 10])}  # fmt: skip
    results = []
    for form in (impl, "reference"):
        out, _ = window_attention(q, k, k, **options, impl=form)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k))))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("impl", ["native", "eager", "fused"])
def test_a_window_as_wide_as_can_be_is_all_of_the_past(impl):
    import sys

    q, k = torch.randn(1, 40, 1, 16, requires_grad=True), torch.randn(1, 40, 1, 16, requires_grad=True)
    results = []
    for window in (sys.maxsize, 40):
        out, _ = window_attention(q, k, k, window=window, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k))))
    torch.testing.assert_close(results[0], results[1])
