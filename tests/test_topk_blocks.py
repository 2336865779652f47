"""What the votes on blocks of slots promise beyond the cases that every operator meets."""

import pytest
import torch
from hmlab_kernels.parity import Draw
from hmlab_kernels.topk_blocks import cases, topk_blocks

FORMS = ["eager", "reference"] if torch.cuda.is_available() else ["fused", "eager", "reference"]


def _call(**changes):
    made = cases.inputs(Draw(), 1, 24, 2, 16, 18, kv_heads=1, picks=3, query_block=4, slot_block=3)
    return made | changes


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("query_block", [1, 4])
def test_nothing_leaks_from_a_block_or_from_slots_it_may_not_read(impl, query_block):
    made = _call(query_block=query_block)
    before = topk_blocks(**made, impl=impl)
    for block in (1, 3, 5):
        first = block * query_block
        changed = dict(made, q=made["q"].clone(), k=made["k"].clone())
        changed["q"][:, first + (query_block == 1) :] *= -5
        changed["k"][made["visible"] > first] += 7
        after = topk_blocks(**changed, impl=impl)
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[:, : block + 1], y[:, : block + 1])


@pytest.mark.parametrize("impl", FORMS)
def test_votes_are_the_sum_of_exponentials(impl):
    made = _call(bias=Draw(seed=3).normal(1, 18, 1), picks=6, groups=1)
    index, score = topk_blocks(**made, impl=impl)
    terms = torch.einsum("tud,jd->tuj", made["q"][0], made["k"][0, :, 0]) / 4 + made["bias"][0, :, 0]
    for c in range(1, 6):
        seen = made["visible"][0] <= 4 * c
        dense = (terms[4 * c - 4 : 4 * c].exp() * seen).sum((0, 1)).view(6, 3).sum(-1).log()
        wanted = dense.sort(descending=True)
        count = int(dense.isfinite().sum())
        assert index[0, c, 0, :count].tolist() == wanted.indices[:count].tolist()
        assert (index[0, c, 0, count:] == -1).all()
        torch.testing.assert_close(score[0, c, 0], wanted.values)
    assert (index[:, 0] == -1).all() and (score[:, 0] == -torch.inf).all()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("query_block", [1, 4])
def test_only_slots_that_are_not_too_old_vote(impl, query_block):
    """Too old for a set is what is too old for its first query; such slots may hold anything."""
    oldest = Draw(seed=2).integers(-3, 20, 1, 24)
    made = _call(picks=6, groups=1, query_block=query_block, oldest=oldest)
    index, score = topk_blocks(**made, impl=impl)
    terms = torch.einsum("tud,jd->tuj", made["q"][0], made["k"][0, :, 0]) / 4
    slot, partly = torch.arange(18), 0
    for c in range(24 // query_block):
        first = c * query_block
        voters = slice(first, first + 1) if query_block == 1 else slice(max(first - 4, 0), first)
        seen = (slot >= oldest[0, first]) & (made["visible"][0] <= first)
        partly += int((seen.view(6, 3).any(1) & (slot < oldest[0, first]).view(6, 3).any(1)).sum())
        wanted = (terms[voters].exp() * seen).sum((0, 1)).view(6, 3).sum(-1).log().sort(descending=True)
        torch.testing.assert_close(score[0, c, 0], wanted.values)
        count = int(wanted.values.isfinite().sum())
        assert index[0, c, 0].tolist() == wanted.indices[:count].tolist() + [-1] * (6 - count)
    assert partly
    forgotten = torch.full((1, 24), 7)
    before = topk_blocks(**made | {"oldest": forgotten}, impl=impl)
    made["k"][:, :7] = torch.nan
    for x, y in zip(before, topk_blocks(**made | {"oldest": forgotten}, impl=impl), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_is_too_old(impl):
    made = _call()
    plain = topk_blocks(**made, impl=impl)
    for x, y in zip(plain, topk_blocks(**made, oldest=torch.full((1, 24), -4), impl=impl), strict=True):
        assert torch.equal(x, y)
    index, score = topk_blocks(**made, oldest=torch.full((1, 24), 18), impl=impl)
    assert (index == -1).all() and (score == -torch.inf).all()


@pytest.mark.parametrize("impl", FORMS)
def test_large_scores_do_not_overflow(impl):
    made = _call(scale=1e3)
    index, score = topk_blocks(**made, impl=impl)
    assert not score.isnan().any() and (score < torch.inf).all() and score[index >= 0].isfinite().all()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("where", ["k", "bias", "q"])
def test_a_vote_that_is_no_number_is_never_picked(impl, where):
    made = _call(bias=Draw(seed=3).normal(1, 18, 1), visible=None, picks=6)
    before = topk_blocks(**made, impl=impl)
    made[where][0, 4] = torch.nan  # slot of block 1, query of block 1
    index, score = topk_blocks(**made, impl=impl)
    assert not score.isnan().any() and torch.equal(index < 0, score == -torch.inf)
    if where == "q":  # votes for set 2 only
        assert (index[:, 2] == -1).all() and torch.equal(index[:, 3:], before[0][:, 3:])
    else:
        wanted = [[block for block in sets if block != 1] + [-1] for sets in before[0][0, 1:].flatten(0, 1).tolist()]
        assert index[0, 1:].flatten(0, 1).tolist() == wanted


@pytest.mark.parametrize("impl", FORMS)
def test_packed_sequences_answer_as_each_alone(impl):
    made = _call(slot_block=2)
    halves = [
        topk_blocks(**made | {"q": made["q"][:, t], "k": made["k"][:, j], "visible": made["visible"][:, j]}, impl=impl)
        for t, j in ((slice(0, 10), slice(0, 11)), (slice(10, 24), slice(11, 18)))
    ]
    bounds = {"cu_seqlens": torch.tensor([0, 10, 24]), "cu_slots": torch.tensor([0, 11, 18])}
    packed = topk_blocks(**made | bounds, impl=impl)
    for x, *parts in zip(packed, *halves, strict=True):
        together = torch.cat(parts, 1)
        torch.testing.assert_close(x[:, : together.shape[1]], together)
        assert x.shape[1] == (24 + 2 * 3) // 4


def test_gives_no_gradient():
    made = _call()
    assert not topk_blocks(**made | {"q": made["q"].requires_grad_()})[1].requires_grad


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(1, 24, 16)}, r"q: expected floats .*, got torch.float32 \[1, 24, 16\]"),
        ({"q": torch.zeros(1, 24, 2, 0), "k": torch.zeros(1, 18, 1, 0)}, "q: expected at least 1 head"),
        ({"q": torch.zeros(1, 24, 0, 16)}, "q: expected at least 1 head of at least 1 dim"),
        ({"q": torch.zeros(1, 24, 2, 16).int()}, "q: expected floats .*, got torch.int32"),
        ({"k": torch.zeros(1, 18, 1, 16).int()}, "k: expected q's dtype torch.float32, got torch.int32"),
        ({"bias": torch.zeros(1, 18, 1).int()}, "bias: expected floats .*, got torch.int32"),
        ({"picks": 2.0}, "picks: expected a whole number, got 2.0"),
        ({"k": torch.zeros(1, 18, 1, 8)}, r"k: expected \[1, slots, kv_heads, 16\], got \[1, 18, 1, 8\]"),
        ({"k": torch.zeros(1, 18, 3, 16)}, "k: expected kv heads that divide 2 heads, got 3"),
        ({"k": torch.zeros(1, 18, 1, 16).half()}, "k: expected q's dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(1, 18)}, r"bias: expected floats \[1, 18, 1\], got torch.float32 \[1, 18\]"),
        ({"visible": torch.zeros(1, 18)}, r"visible: expected integers \[1, 18\], got torch.float32"),
        ({"oldest": torch.zeros(1, 24)}, r"oldest: expected integers \[1, 24\], got torch.float32 \[1, 24\]"),
        ({"oldest": torch.zeros(1, 24).bool()}, r"oldest: expected integers \[1, 24\], got torch.bool"),
        ({"oldest": torch.zeros(1, 18).long()}, r"oldest: expected integers \[1, 24\], got torch.int64 \[1, 18\]"),
        ({"oldest": torch.zeros(1, 24, device="meta").long()}, "oldest: expected a tensor on cpu, got one on meta"),
        ({"groups": 3}, "groups: expected a divisor of 2 heads, multiple of 1 kv heads, got 3"),
        ({"picks": 0}, "picks: expected at least 1, got 0"),
        ({"query_block": 0}, "query_block: expected at least 1, got 0"),
        ({"slot_block": 0}, "slot_block: expected at least 1, got 0"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens: expected a vector of int"),
        ({"cu_seqlens": torch.tensor([0, 24])}, "cu_slots: expected one bound for each of cu_seqlens, got shapes None"),
        ({"cu_slots": torch.tensor([0, 18])}, "cu_slots: expected one bound for each of cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 24]), "cu_slots": torch.tensor([0, 9])}, "cu_slots: expected to rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 9]), "cu_slots": torch.tensor([0, 18])}, "cu_seqlens: expected to rise"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        topk_blocks(**_call(**changes))
