"""Rules of eviction against the algorithms that they are named after, and what tiers count."""

from __future__ import annotations

from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmlab.stores.tiers import (
    FirstInFirstOut,
    Learned,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Priority,
    Traffic,
    Usage,
    eviction_order,
    promotions,
)

SLOTS = 4
requests = st.lists(st.integers(0, 7), min_size=1, max_size=60)


def simulate(policy, pages: list[list[int]]) -> list[list[int | None]]:
    """What a tier of SLOTS places, one row of the batch for each list, drives out at each request."""
    rows, usage = len(pages), Usage.empty(len(pages), SLOTS)
    content = torch.full((rows, SLOTS), -1)
    gone: list[list[int | None]] = [[] for _ in range(rows)]
    for now, asked in enumerate(torch.tensor(pages).T):
        time = torch.full((rows,), now)
        there = content == asked[:, None]
        place = eviction_order(policy(usage, time), usage)[:, 0]
        hit = there.any(1)
        usage = usage.read(there.long().argmax(1).where(hit, -1)[:, None], torch.ones(rows, 1), time)
        usage = usage.write(place.where(~hit, -1)[:, None], torch.zeros(rows, 1), time)
        for row in (~hit).nonzero()[:, 0].tolist():
            gone[row].append(int(content[row, place[row]]))
            content[row, place[row]] = asked[row]
    return gone


def textbook(name: str, pages: list[int]) -> list[int]:
    gone, held, reads = [], OrderedDict(), Counter()  # held: oldest first
    for page in pages:
        if page in held:
            reads[page] += 1
            if name == "lru":
                held.move_to_end(page)
            continue
        out = -1
        if len(held) == SLOTS:
            out = min(held, key=lambda page: reads[page]) if name == "lfu" else next(iter(held))
            del held[out]
        gone.append(out)
        held[page], reads[page] = True, 0
    return gone


@pytest.mark.parametrize(
    ("name", "policy"),
    [("fifo", FirstInFirstOut()), ("lru", LeastRecentlyUsed()), ("lfu", LeastFrequentlyUsed())],
)
@settings(max_examples=30, deadline=None)
@given(pages=st.lists(requests, min_size=1, max_size=3))
def test_policies_are_the_textbooks(name, policy, pages):
    length = min(map(len, pages))
    pages = [row[:length] for row in pages]
    assert simulate(policy, pages) == [textbook(name, row) for row in pages]


def usage_of(**counters: list[float]) -> Usage:
    """One row; what is not said is 0."""
    [count] = {len(values) for values in counters.values()}
    types = dict(zip(Usage._fields, (torch.int64,) * 3 + (torch.float32,) * 2, strict=True))
    return Usage(*(torch.tensor([counters.get(name, [0] * count)], dtype=kind) for name, kind in types.items()))


def test_equal_scores_leave_oldest_first_then_by_place_and_free_places_are_used_first():
    usage = usage_of(written=[7, 3, -1, 3, 9, -1])
    assert eviction_order(torch.zeros(1, 6), usage).tolist() == [[2, 5, 1, 3, 0, 4]]
    score = torch.tensor([[0.0, 0, 99, 0, -torch.inf, torch.nan]])
    assert eviction_order(score, usage).tolist() == [[2, 5, 4, 1, 3, 0]]


def test_priority_is_the_sum_of_shares():
    usage = usage_of(written=[0, 10, -1], last_read=[90, -1, -1], reads=[3, 0, 5], mass=[1, 3, 9], density=[2, 6, 9])
    now = torch.tensor([100])
    assert Priority(density=0.0, relevance=0.0)(usage, now).tolist() == [[0.25, 0.75, 0]]
    assert Priority(attention=0.0, relevance=0.0, density=2.0)(usage, now).tolist() == [[0.5, 1.5, 0]]
    rates = torch.tensor([4 / 110 * 2**-1.0, 1 / 100 * 2**-9.0, 0], dtype=torch.float64)
    score = Priority(attention=0.0, density=0.0, half_life=10.0)(usage, now)
    torch.testing.assert_close(score[0], rates / rates.sum())
    nothing = Priority()(Usage.empty(2, 3), torch.tensor([1, 2]))
    assert not nothing.any()


def test_a_slot_read_twice_at_once_counts_twice_and_a_new_one_forgets():
    usage = usage_of(written=[0, 1, -1]).read(
        torch.tensor([[1, -1, 1]]), torch.tensor([[0.25, 9.0, 0.5]]), torch.tensor([5])
    )
    assert usage.reads.tolist() == [[0, 2, 0]] and usage.mass.tolist() == [[0, 0.75, 0]]
    assert usage.last_read.tolist() == [[0, 5, 0]]
    usage = usage.write(torch.tensor([[-1, 1]]), torch.tensor([[8.0, 4.0]]), torch.tensor([6]))
    expected = usage_of(written=[0, 6, -1], last_read=[0, -1, 0], density=[0, 4, 0])
    assert all(torch.equal(got, wanted) for got, wanted in zip(usage, expected, strict=True))


def test_learned_scores_find_what_will_be_read():
    """What will be read is what is dense and was read lately; the counters alone do not say so in their order."""
    chance = torch.Generator().manual_seed(0)
    policy = Learned()
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.02)
    now = torch.full((64,), 1000)

    def drawn() -> tuple[Usage, torch.Tensor]:
        written = torch.randint(0, 900, (64, 16), generator=chance)
        idle = torch.randint(0, 100, (64, 16), generator=chance)
        density = torch.rand(64, 16, generator=chance) * 10
        reads = torch.randint(0, 50, (64, 16), generator=chance)
        free = torch.rand(64, 16, generator=chance) < 0.2
        usage = Usage(written.masked_fill(free, -1), 1000 - idle, reads, reads.float(), density)
        return usage, (density > 7) * (idle < 50) * 1.0 + free * 100

    for _ in range(150):
        optimiser.zero_grad()
        usage, future = drawn()
        policy.loss(usage, now, future).backward()
        optimiser.step()
    usage, future = drawn()

    def kept(score: torch.Tensor) -> float:
        """Share of the attention to come that goes to the best quarter of each row."""
        worth = future.where(usage.held, 0)
        return float(worth.gather(1, eviction_order(score, usage)[:, 12:]).sum() / worth.sum())

    best_possible = kept(future)
    assert kept(policy(usage, now)) > 0.95 * best_possible
    others = (LeastRecentlyUsed(), LeastFrequentlyUsed(), FirstInFirstOut())
    assert max(kept(other(usage, now)) for other in others) < 0.8 * best_possible
    assert torch.isfinite(policy.loss(Usage.empty(2, 3), now[:2], torch.ones(2, 3)))


def test_loss_of_a_flat_score_is_the_logarithm_of_what_is_held():
    policy = Learned()
    torch.nn.init.zeros_(policy.network[2].weight)
    usage = usage_of(written=[1, 2, -1, 3])
    loss = policy.loss(usage, torch.tensor([9]), torch.tensor([[0.0, 2, 7, 1]]))
    torch.testing.assert_close(loss, torch.tensor(3.0).log())


def test_promotions_fill_free_places_then_drive_out_the_worst():
    usage = usage_of(written=[0, 1, -1, 3])
    upper, lower = torch.tensor([[5.0, 2, 99, 3]]), torch.tensor([[2.5, 4, -torch.inf, 1]])
    swaps = promotions(upper, usage, lower, 4)
    assert swaps.up.tolist() == [[1, 0, -1, -1]] and swaps.down.tolist() == [[2, 1, -1, -1]]
    assert promotions(upper, usage, lower, 4, margin=0.5).up.tolist() == [[1, -1, -1, -1]]
    assert promotions(upper, usage, lower, 1).up.shape == (1, 1)
    equal = promotions(torch.ones(1, 4), usage_of(written=[0, 1, 2, 3]), torch.ones(1, 4), 4)
    assert (equal.up == -1).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_promotions_leave_the_upper_tier_the_best_of_both(upper, lower):
    usage = usage_of(written=list(range(5)))
    upper, lower = torch.tensor([upper]).double(), torch.tensor([lower]).double()
    swaps = promotions(upper, usage, lower, 5)
    taken = swaps.up >= 0
    result = upper.scatter(1, swaps.down[taken][None], lower[0, swaps.up[taken]][None])
    both = torch.cat((upper, lower), 1).sort(descending=True).values[:, :5]
    assert torch.equal(result.sort(descending=True).values, both)


def test_traffic_adds_up():
    traffic = Traffic.empty(2, 3)
    traffic = traffic.add(1, torch.tensor([[True, False, True], [False] * 3]), seconds=0.5, bytes=torch.tensor([7, 8]))
    traffic = traffic.add(1, torch.tensor([[True], [True]]), seconds=0.25, bytes=1)
    assert traffic.hits.tolist() == [[0, 3, 0], [0, 1, 0]] and traffic.misses.tolist() == [[0, 1, 0], [0, 3, 0]]
    assert traffic.seconds.tolist() == [[0, 0.75, 0]] * 2 and traffic.bytes.tolist() == [[0, 8, 0], [0, 9, 0]]
    assert traffic.hit_rate[:, 1].tolist() == [0.75, 0.25] and traffic.hit_rate[:, 0].isnan().all()


@pytest.mark.unchecked
def test_bad_arguments_are_named():
    for call, told in (
        (lambda: Priority(density=-1.0), "density: expected at least 0, got -1.0"),
        (lambda: Priority(half_life=0.0), "half_life: expected more than 0, got 0.0"),
        (lambda: Learned(0), "hidden: expected at least 1, got 0"),
        (lambda: promotions(torch.ones(1, 1), Usage.empty(1, 1), torch.ones(1, 1), -1), "most: expected at least 0"),
        (lambda: promotions(torch.ones(1, 1), Usage.empty(1, 1), torch.ones(1, 1), 1, margin=-0.1), "margin: expected"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
