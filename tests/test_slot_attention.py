"""Slot attention: what it equals, and its own errors."""

import pytest
import torch
from hmlab_kernels import parity
from hmlab_kernels.slot_attention import IMPLEMENTATIONS, merge, slot_attention
from hmlab_kernels.slot_attention.cases import inputs
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [impl for impl in IMPLEMENTATIONS if impl != "native" or DEVICE == "cpu"]


def _attention(q, k, v, mask=None):
    repeated = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    return scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("impl", FORMS)
def test_with_every_slot_picked_equals_plain_attention(impl):
    made = inputs(parity.Draw(device=DEVICE), 2, 9, 11, 4, 20, kv_heads=2, groups=2, query_block=4, slot_block=4,
                  bias=False)  # fmt: skip
    made["index"] = torch.tensor([2, 0, 1], device=DEVICE).expand(2, 3, 2, 3)
    out, lse = slot_attention(**made, impl=impl)
    torch.testing.assert_close(out, _attention(made["q"], made["k"], made["v"]))
    keys = made["k"].repeat_interleave(2, 2)
    score = torch.einsum("bthd,bnhd->bthn", made["q"], keys) * 20**-0.5
    torch.testing.assert_close(lse, score.logsumexp(-1))


@pytest.mark.parametrize("impl", FORMS)
def test_joined_equals_one_softmax_over_both(impl):
    """A causal window of 3 over the tokens, and slots that become visible one by one."""
    draw = parity.Draw(device=DEVICE)
    made = inputs(draw, 1, 10, 6, 2, 16, query_block=4, slot_block=2, bias=False, visible=True)
    made["index"] = torch.arange(3, device=DEVICE).expand(1, 3, 2, 3)
    k, v = draw.normal(1, 10, 2, 16), draw.normal(1, 10, 2, 16)
    t, i = torch.arange(10, device=DEVICE)[:, None], torch.arange(10, device=DEVICE)
    window, seen = (i <= t) & (i > t - 3), made["visible"][0] <= t
    score = torch.einsum("bthd,bnhd->bthn", made["q"], k) / 4
    score = score.masked_fill(~window[:, None], -torch.inf)
    joined = score.softmax(-1).transpose(1, 2) @ v.transpose(1, 2), score.logsumexp(-1)
    out, _ = slot_attention(**made, joined=(joined[0].transpose(1, 2), joined[1]), impl=impl)
    expected = _attention(made["q"], torch.cat([made["k"], k], 1), torch.cat([made["v"], v], 1),
                          torch.cat([seen, window], 1))  # fmt: skip
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("impl", FORMS)
def test_sharing_is_but_a_repeated_index(impl):
    made = inputs(parity.Draw(device=DEVICE), 2, 11, 9, 4, 16, kv_heads=2, groups=2, query_block=4, start=(3, 1))
    shared = slot_attention(**made, impl=impl)
    block = (torch.arange(11, device=DEVICE) + made["start"][:, None]) // 4  # both start in block 0
    own = made["index"].gather(1, block[:, :, None, None].expand(-1, -1, 2, 3)).repeat_interleave(2, 2)
    alone = slot_attention(**made | {"index": own, "query_block": 1, "start": None}, impl=impl)
    torch.testing.assert_close(shared, alone)


@pytest.mark.parametrize("impl", FORMS)
def test_an_entry_given_twice_counts_twice(impl):
    made = inputs(parity.Draw(device=DEVICE), 1, 2, 4, 1, 16, picks=2)
    made["index"][:] = 1
    twice = slot_attention(**made, impl=impl)
    once = slot_attention(**made | {"index": made["index"][..., :1]}, impl=impl)
    torch.testing.assert_close(twice[0], once[0])
    torch.testing.assert_close(twice[1], once[1] + torch.tensor(2.0).log().to(DEVICE))


@pytest.mark.parametrize("impl", FORMS)
def test_slots_that_nobody_picked_have_no_gradient(impl):
    made = inputs(parity.Draw(device=DEVICE), 1, 6, 8, 2, 16, query_block=2, slot_block=2)
    made["index"][:] = torch.tensor([3, -1, 1], device=DEVICE)
    leaves = [made[name].requires_grad_() for name in ("k", "v", "bias")]
    out, lse = slot_attention(**made, impl=impl)
    for grad in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        of_slots = grad.abs().reshape(8, -1).sum(1)
        assert (of_slots[[2, 3, 6, 7]] > 0).all()
        assert (of_slots[[0, 1, 4, 5]] == 0).all()


def test_merge():
    draw = parity.Draw(torch.float64)
    score, values = draw.normal(2, 3, 7), draw.normal(2, 3, 7, 5)
    parts = [(score[..., s].softmax(-1)[..., None] * values[..., s, :]).sum(-2) for s in (slice(3), slice(3, 7))]
    sums = [score[..., :3].logsumexp(-1), score[..., 3:].logsumexp(-1)]
    out, lse = merge(parts[0], sums[0], parts[1], sums[1])
    torch.testing.assert_close(out, (score.softmax(-1)[..., None] * values).sum(-2))
    torch.testing.assert_close(lse, score.logsumexp(-1))
    leaves = [x.detach().requires_grad_() for x in (parts[0], sums[0], parts[1], sums[1])]
    assert torch.autograd.gradcheck(merge, leaves)


def test_merge_with_nothing():
    out_a, out_b = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    lse_a = torch.tensor([0.5, -torch.inf, -torch.inf], requires_grad=True)
    lse_b = torch.tensor([-torch.inf, 1.0, -torch.inf], requires_grad=True)
    empty = torch.where(lse_a.isfinite()[:, None], out_a, 0)
    out, lse = merge(empty, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, torch.where(lse_a.isfinite()[:, None], out_a, 0))
    torch.testing.assert_close(lse, torch.tensor([0.5, 1.0, -torch.inf]))
    grads = torch.autograd.grad(out.sum() + lse[:2].sum(), (out_a, lse_a, out_b, lse_b))
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[1], torch.tensor([1.0, 0, 0]))


WRONG = {
    "q": ({"q": torch.zeros(1, 4, 16)}, r"q: expected \[batch, time, heads, dim\]"),
    "wide q": ({"q": torch.zeros(1, 4, 2, 513)}, "q: expected .* dim of 1 to 512"),
    "k": ({"k": torch.zeros(1, 6, 2, 8)}, r"k: expected \[1, slots, kv_heads, 16\]"),
    "heads of k": ({"k": torch.zeros(1, 6, 3, 16)}, "k: expected a number of heads that divides q's 2, got 3"),
    "v": ({"v": torch.zeros(1, 5, 2, 16)}, r"v: expected k's shape \[1, 6, 2, 16\]"),
    "dtype of k": ({"k": torch.zeros(1, 6, 2, 16).half()}, "k: expected q's dtype torch.float32"),
    "dtype of v": ({"v": torch.zeros(1, 6, 2, 16).half()}, "v: expected q's dtype torch.float32"),
    "index": ({"index": torch.zeros(1, 4, 2).int()}, r"index: expected \[1, sets, groups, picks\]"),
    "groups": ({"index": torch.zeros(1, 2, 1, 3).int()}, "index: expected groups that divide the 2 heads"),
    "sets": ({"index": torch.zeros(1, 1, 2, 3).int()}, "index: expected at least 2 sets, got 1"),
    "dtype of index": ({"index": torch.zeros(1, 2, 2, 3)}, "index: expected int32 or int64"),
    "query_block": ({"query_block": 0}, "query_block: expected at least 1"),
    "slot_block": ({"slot_block": 0}, "slot_block: expected at least 1"),
    "bias": ({"bias": torch.zeros(1, 6)}, r"bias: expected torch.float32 of \[1, 6, 2\]"),
    "dtype of bias": ({"bias": torch.zeros(1, 6, 2).half()}, "bias: expected torch.float32"),
    "visible": ({"visible": torch.zeros(1, 5).int()}, r"visible: expected \[1, 6\]"),
    "dtype of visible": ({"visible": torch.zeros(1, 6)}, "visible: expected int32 or int64"),
    "start": ({"start": torch.zeros(2).int()}, r"start: expected \[1\]"),
    "cu_slots alone": ({"cu_slots": torch.tensor([0, 6])}, "cu_seqlens: expected cu_seqlens and cu_slots together"),
    "cu_seqlens alone": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_slots: expected cu_seqlens and cu_slots together"),
    "cu_seqlens": ({"cu_seqlens": torch.zeros(1, 2).int(), "cu_slots": torch.tensor([0, 6])}, "cu_seqlens: expected a"),
    "cu_slots": ({"cu_seqlens": torch.tensor([0, 4]), "cu_slots": torch.zeros(2)}, "cu_slots: expected a vector"),
    "bounds": ({"cu_seqlens": torch.tensor([0, 4]), "cu_slots": torch.tensor([0, 3, 6])}, "cu_slots: expected cu_seql"),
    "values of cu_seqlens": ({"cu_seqlens": torch.tensor([0, 3]), "cu_slots": torch.tensor([0, 6])},
                             "cu_seqlens: expected to rise from 0 to 4"),
    "values of cu_slots": ({"cu_seqlens": torch.tensor([0, 4]), "cu_slots": torch.tensor([0, 7])},
                           "cu_slots: expected to rise from 0 to 6"),
    "sets of packed sequences": ({"cu_seqlens": torch.tensor([0, 1, 2, 4]), "cu_slots": torch.tensor([0, 1, 2, 6])},
                                 "index: expected at least 3 sets, got 2"),
    "joined out": ({"joined": (torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2))}, "joined: expected out of q's shape"),
    "joined dtype": ({"joined": (torch.zeros(1, 4, 2, 16).half(), torch.zeros(1, 4, 2))}, "joined: expected out in"),
    "joined lse": ({"joined": (torch.zeros(1, 4, 2, 16), torch.zeros(1, 4))}, r"joined: expected lse of \[1, 4, 2\]"),
    "impl": ({"impl": "fast"}, "impl: slot_attention expected one of"),
}  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_errors_name_the_argument(wrong, impl):
    arguments, message = WRONG[wrong]
    made = inputs(parity.Draw(), 1, 4, 6, 2, 16, query_block=2) | {"impl": impl} | arguments
    with pytest.raises(ValueError, match=message):
        slot_attention(**made)


@pytest.mark.parametrize("impl", FORMS)
def test_what_no_query_reads_may_hold_anything(impl):
    """A slot without mass, a slot not yet visible, and whatever lies where an entry names none."""
    made = inputs(parity.Draw(device=DEVICE), 1, 8, 12, 2, 16, query_block=4, slot_block=2, picks=4)
    made["index"][:] = torch.tensor([0, -1, 3, 5], device=DEVICE)
    made["bias"][:, 6] = -torch.inf
    made["visible"] = torch.zeros(1, 12, dtype=torch.int64, device=DEVICE)
    made["visible"][:, 10] = 2**63 - 1
    leaves = [made[name].requires_grad_() for name in ("q", "k", "v")]
    expected = slot_attention(**made, impl=impl)
    expected = *expected, *torch.autograd.grad(expected[0].sum() + expected[1].sum(), leaves)
    poisoned = [x.detach().clone() for x in leaves]
    for x in poisoned[1:]:
        x[:, [6, 10, 4, 5]] = torch.nan  # blocks 2 and 4 are not picked
    poisoned = [x.requires_grad_() for x in poisoned]
    out, lse = slot_attention(**made | dict(zip(("q", "k", "v"), poisoned, strict=True)), impl=impl)
    got = out, lse, *torch.autograd.grad(out.sum() + lse.sum(), poisoned)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", [impl for impl in FORMS if impl != "reference"])
def test_numbers_too_large_name_nothing(impl):
    made = inputs(parity.Draw(device=DEVICE), 1, 4, 6, 2, 16, query_block=2, picks=1)
    made["index"] = torch.full_like(made["index"], 0).long()
    made["index"][:] = 2**32
    out, lse = slot_attention(**made, impl=impl)
    assert (out == 0).all() and (lse == -torch.inf).all()
    wide = slot_attention(**made | {"index": torch.zeros_like(made["index"]), "slot_block": 2**40}, impl=impl)
    whole = slot_attention(**made | {"index": torch.zeros_like(made["index"]), "slot_block": 6}, impl=impl)
    torch.testing.assert_close(wide, whole)


@pytest.mark.skipif(DEVICE == "cuda", reason="the values of start stay on the device")
@pytest.mark.parametrize("impl", [impl for impl in FORMS if impl != "reference"])
def test_too_few_sets_and_negative_starts_are_refused(impl):
    made = inputs(parity.Draw(), 1, 16, 6, 2, 16)
    with pytest.raises(ValueError, match="index: expected at least 16 sets, got 1"):
        slot_attention(**made | {"index": made["index"][:, :1], "start": torch.tensor([3])}, impl=impl)
    with pytest.raises(ValueError, match="start: expected at least 0, got -1"):
        slot_attention(**made | {"start": torch.tensor([-1])}, impl=impl)
