"""What the bucket lookup promises beyond the cases that every operator meets."""

import pytest
import torch
from hmlab_kernels.bucket_lookup import Buckets, bucket_lookup, buckets, cases
from hmlab_kernels.parity import Draw

FORMS = ["eager", "reference"] if torch.cuda.is_available() else ["fused", "eager", "reference"]


def _call(**changes):
    return cases.inputs(Draw(), 1, 6, 2, 16, 40, kv_heads=1, picks=4) | changes


def test_buckets_are_sorted_by_code_then_slot():
    codes = torch.tensor([2, 0, 2, 1, 0], dtype=torch.int32).view(1, 5, 1, 1)
    pairs = [(int(key) >> 32, int(key) & 0xFFFFFFFF) for key in buckets(codes).keys.flatten()]
    assert pairs == [(0, 1), (0, 4), (1, 3), (2, 0), (2, 2)]
    packed = buckets(codes, cu_slots=torch.tensor([0, 2, 2, 5])).keys.flatten()
    assert [(int(key) >> 32, int(key) & 0xFFFFFFFF) for key in packed] == [(0, 1), (2, 0), (0, 2), (1, 1), (2, 0)]


@pytest.mark.parametrize("impl", FORMS)
def test_one_bucket_that_holds_every_slot_is_exact(impl):
    made = _call(codes=torch.zeros(1, 6, 2, 1, 1, dtype=torch.int32), candidates=64)
    made["buckets"] = buckets(torch.zeros(1, 40, 1, 1, dtype=torch.int32))
    got = bucket_lookup(**made, impl=impl)
    score = torch.einsum("bthd,bjd->bthj", made["q"], made["k"][:, :, 0]) / 4
    hidden = torch.arange(40) >= made["available"][..., None]
    score = score.masked_fill(hidden[:, :, None], -torch.inf).topk(4, dim=-1)
    torch.testing.assert_close(got.score, score.values)
    assert torch.equal(got.index.long(), torch.where(score.values > -torch.inf, score.indices, -1))
    assert torch.equal(got.found.long(), made["available"][..., None].expand(1, 6, 2))


@pytest.mark.parametrize("impl", FORMS)
def test_a_slot_found_in_several_tables_comes_once(impl):
    made = _call(codes=torch.ones(1, 6, 2, 3, 2, dtype=torch.int32), candidates=48, picks=10, available=None)
    codes = torch.zeros(1, 40, 1, 3, dtype=torch.int32)
    codes[:, [4, 9, 31]] = 1
    got = bucket_lookup(**made | {"buckets": buckets(codes)}, impl=impl)
    assert (got.found == 3).all()
    assert (got.index[..., :3].sort().values == torch.tensor([4, 9, 31])).all() and (got.index[..., 3:] == -1).all()


@pytest.mark.parametrize("impl", FORMS)
def test_a_full_bucket_gives_its_newest_available_slots(impl):
    made = _call(codes=torch.zeros(1, 6, 2, 1, 1, dtype=torch.int32), candidates=4)
    made["buckets"] = buckets(torch.zeros(1, 40, 1, 1, dtype=torch.int32))
    made["available"] = torch.tensor([[0, 2, 4, 17, 40, 99]])
    got = bucket_lookup(**made, impl=impl)
    for t, end in enumerate([0, 2, 4, 17, 40, 40]):
        wanted = [-1] * (4 - min(4, end)) + list(range(max(end - 4, 0), end))
        assert (got.index[0, t].sort().values == torch.tensor(wanted)).all()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("available", [None, torch.tensor([[0, 2, 4, 17, 40, 99]])])
def test_slots_that_are_too_old_are_no_candidates(impl, available):
    """One bucket holds all: of the newest four that are there, those that are not too old."""
    made = _call(codes=torch.zeros(1, 6, 2, 1, 1, dtype=torch.int32), candidates=4, available=available)
    made |= {"buckets": buckets(torch.zeros(1, 40, 1, 1, dtype=torch.int32)), "oldest": torch.tensor([[38] * 6])}
    made["oldest"][0, 1:5] = torch.tensor([1, -3, 20, 39])
    got = bucket_lookup(**made, impl=impl)
    ends = [40] * 6 if available is None else available[0].clamp(max=40).tolist()
    for t, (end, oldest) in enumerate(zip(ends, made["oldest"][0].tolist(), strict=True)):
        wanted = list(range(max(end - 4, oldest, 0), end))
        assert got.found[0, t].tolist() == [len(wanted)] * 2
        assert (got.index[0, t].sort().values == torch.tensor([-1] * (4 - len(wanted)) + wanted)).all()


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_is_too_old(impl):
    made = _call()
    plain = bucket_lookup(**made, impl=impl)
    for x, y in zip(plain, bucket_lookup(**made, oldest=torch.full((1, 6), -4), impl=impl), strict=True):
        assert torch.equal(x, y)
    got = bucket_lookup(**made, oldest=torch.full((1, 6), 40), impl=impl)
    assert (got.index == -1).all() and (got.score == -torch.inf).all() and not got.found.any()


@pytest.mark.parametrize("impl", FORMS)
def test_later_slots_change_nothing(impl):
    made = _call()
    before = bucket_lookup(**made, impl=impl)
    t = 3
    changed = made["k"].clone()
    changed[:, int(made["available"][0, t]) :] += 7
    after = bucket_lookup(**made | {"k": changed}, impl=impl)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, : t + 1], y[:, : t + 1])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("available", [None, torch.tensor([[3, 10, 40, 99, 99, 2**31 - 1]])])
def test_a_key_that_names_no_slot_is_passed_over(impl, available):
    made = _call(codes=torch.zeros(1, 6, 2, 1, 1, dtype=torch.int32), candidates=64, picks=16, available=available)
    keys = torch.arange(40)
    keys[20:] += 2**31  # the bucket's later slots
    keys[15:20] += 25
    got = bucket_lookup(**made | {"buckets": Buckets(keys.view(1, 1, 1, 40))}, impl=impl)
    limit = torch.tensor([40] * 6) if available is None else available[0]
    for t in range(6):
        assert got.found[0, t].tolist() == [min(15, int(limit[t]))] * 2
        assert got.index[0, t].max() < min(15, int(limit[t]))
        assert torch.equal(got.index[0, t] < 0, got.score[0, t].isinf())


@pytest.mark.parametrize("impl", FORMS)
def test_a_score_that_is_no_number_is_never_picked(impl):
    made = _call(codes=torch.zeros(1, 6, 2, 1, 1, dtype=torch.int32), candidates=64, picks=40, available=None)
    made["buckets"] = buckets(torch.zeros(1, 40, 1, 1, dtype=torch.int32))
    made["k"][0, 7] = torch.nan
    got = bucket_lookup(**made, impl=impl)
    assert (got.found == 40).all() and not got.score.isnan().any() and (got.index != 7).all()
    assert (got.index[..., -1] == -1).all() and (got.index[..., :-1] >= 0).all()


@pytest.mark.parametrize("impl", FORMS)
def test_packed_sequences_answer_as_each_alone(impl):
    made = _call(available=None)
    codes = Draw(seed=5).integers(0, 4, 1, 40, 1, 2).int()
    parts = []
    for t, j in ((slice(0, 2), slice(0, 13)), (slice(2, 6), slice(13, 40))):
        own = {"q": made["q"][:, t], "codes": made["codes"][:, t], "k": made["k"][:, j]}
        parts.append(bucket_lookup(**made | own | {"buckets": buckets(codes[:, j])}, impl=impl))
    bounds = {"cu_seqlens": torch.tensor([0, 2, 6]), "cu_slots": torch.tensor([0, 13, 40])}
    packed = bucket_lookup(**made | bounds | {"buckets": buckets(codes, cu_slots=bounds["cu_slots"])}, impl=impl)
    for x, *both in zip(packed, *parts, strict=True):
        torch.testing.assert_close(x, torch.cat(both, 1))


def test_gives_no_gradient():
    made = _call()
    assert not bucket_lookup(**made | {"q": made["q"].requires_grad_()}).score.requires_grad


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(1, 6, 16)}, r"q: expected floats .*, got torch.float32 \[1, 6, 16\]"),
        ({"q": torch.zeros(1, 6, 2, 0), "k": torch.zeros(1, 40, 1, 0)}, "q: expected at least 1 head"),
        ({"q": torch.zeros(1, 6, 0, 16)}, "q: expected at least 1 head of at least 1 dim"),
        ({"q": torch.zeros(1, 6, 2, 16).int()}, "q: expected floats .*, got torch.int32"),
        ({"k": torch.zeros(1, 40, 1, 16).int()}, "k: expected q's dtype torch.float32, got torch.int32"),
        ({"picks": 2.0}, "picks: expected a whole number, got 2.0"),
        ({"codes": torch.zeros(1, 6, 2, 2, 2)}, r"codes: expected int32 \[1, 6, 2\] \+ .*, got torch.float"),
        ({"codes": torch.zeros(1, 6, 2, 2, 0).int()}, r"codes: expected int32 .* got torch.int32 \[1, 6, 2, 2, 0\]"),
        ({"k": torch.zeros(1, 40, 1, 8)}, r"k: expected \[1, slots, kv_heads, 16\], got \[1, 40, 1, 8\]"),
        ({"k": torch.zeros(1, 40, 3, 16)}, "k: expected kv heads that divide 2 heads, got 3"),
        ({"k": torch.zeros(1, 40, 1, 16).half()}, "k: expected q's dtype torch.float32, got torch.float16"),
        ({"buckets": Buckets(torch.zeros(1, 1, 3, 40).long())}, r"buckets: expected int64 keys \[1, 1, 2, 40\], got"),
        ({"bias": torch.zeros(1, 40)}, r"bias: expected floats \[1, 40, 1\], got torch.float32 \[1, 40\]"),
        ({"available": torch.zeros(1, 6)}, r"available: expected integers \[1, 6\], got torch.float32"),
        ({"oldest": torch.zeros(1, 6)}, r"oldest: expected integers \[1, 6\], got torch.float32 \[1, 6\]"),
        ({"oldest": torch.zeros(1, 6).bool()}, r"oldest: expected integers \[1, 6\], got torch.bool"),
        ({"oldest": torch.zeros(1, 40).long()}, r"oldest: expected integers \[1, 6\], got torch.int64 \[1, 40\]"),
        ({"oldest": torch.zeros(1, 6, device="meta").long()}, "oldest: expected a tensor on cpu, got one on meta"),
        ({"picks": 0}, "picks: expected at least 1, got 0"),
        ({"candidates": 3}, "candidates: expected one for each of 2 tables x 2 probes, got 3"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens: expected a vector of int"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_slots: expected one bound for each of cu_seqlens, got shapes None"),
        ({"cu_seqlens": torch.tensor([0, 6]), "cu_slots": torch.tensor([0, 9])}, "cu_slots: expected to rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 5]), "cu_slots": torch.tensor([0, 40])}, "cu_seqlens: expected to rise"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        bucket_lookup(**_call(**changes))


@pytest.mark.unchecked
def test_says_what_is_wrong_with_codes_and_the_cap():
    with pytest.raises(ValueError, match=r"codes: expected int32 \[batch, slots, kv_heads, tables\], got torch.int64"):
        buckets(torch.zeros(1, 5, 1, 1, dtype=torch.int64))
    codes = torch.zeros(1, 6, 1, 1, dtype=torch.int32)
    for bounds in ([0, 3], [1, 6], [0, 4, 3, 6], [0, 7]):
        with pytest.raises(ValueError, match="cu_slots: expected to rise from 0 to 6"):
            buckets(codes, cu_slots=torch.tensor(bounds))
    with pytest.raises(ValueError, match="cu_slots: expected a batch of 1"):
        buckets(codes.expand(2, -1, -1, -1), cu_slots=torch.tensor([0, 6]))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="candidates: 'fused' expected at most 256, got 300"):
            bucket_lookup(**_call(candidates=300), impl="fused")
