"""How far a lookup goes: probes by their margins, buckets that split and merge, and what is retrieved for the work."""

import math

import numpy as np
import pytest
import torch
from hmlab_kernels.bucket_lookup import bucket_lookup
from hmlab_kernels.bucket_lookup import buckets as sorted_buckets
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hmlab.hashing import (
    NOWHERE,
    buckets,
    cross_polytope,
    distinct,
    enough_probes,
    hyperplane,
    kept,
    learned,
    p_stable,
    recall_curve,
)

LEVEL = 1e-5
TABLES = 4000
DIM = 12


def _at_angle(angle: float, count: int = 1, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and as many at that angle from them [1, count, 1, dim]."""
    basis = torch.linalg.qr(torch.randn(count, dim, 2, dtype=torch.float64)).Q
    x, across = basis.unbind(-1)
    y = math.cos(angle) * x + math.sin(angle) * across
    return tuple(v[None, :, None].float() for v in (x, y))


def _at_distance(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = _at_angle(0.0)
    return x, x + distance * _at_angle(0.0)[0]


@pytest.mark.parametrize(("config", "pair", "value"), [
    *((hyperplane.Config(dim=DIM, tables=TABLES, bits=4), _at_angle, value) for value in (0.2, 0.6, 1.2, 2.0)),
    *((cross_polytope.Config(dim=DIM, tables=TABLES, rows=7), _at_angle, value) for value in (0.05, 0.6, 2.0)),
    *((cross_polytope.Config(dim=DIM, tables=TABLES, rows=4, bits=2), _at_angle, value) for value in (0.3, 1.2)),
    *((p_stable.Config(dim=DIM, tables=TABLES, bits=3), _at_distance, value) for value in (0.1, 0.4, 1.0, 2.0)),
])  # fmt: skip
def test_probes_find_as_often_as_margins_say(config, pair, value):
    """Hits are independent given the margins, so their number is Poisson binomial, held to LEVEL in either tail."""
    family = config.build()
    x, y = pair(value)
    probability = family.probe_probability(x, value, probes=5).flatten(0, 2)[0].double()
    hit = (family.codes(x, probes=5) == family.codes(y)).flatten(0, 2)[0]
    for probe in range(5):
        p, h = probability[:, probe], hit[:, probe]
        for half in (p > p.median(), p <= p.median()):  # calibrated, not only right on average
            hits, law = int(h[half].sum()), stats.poisson_binom(p[half].clamp(0, 1).numpy())
            assert min(law.cdf(hits), law.sf(hits - 1)) > LEVEL, (probe, hits, p[half].sum())
    assert probability.sum(1).max() <= 1 + 1e-6


def test_margins_of_learned_normals_predict_over_neighbours():
    family = learned.Config(dim=64, tables=2, bits=4).build()
    with torch.no_grad():  # orthogonal normals of different lengths, thresholds off zero
        family.weight.copy_(torch.linalg.qr(torch.randn(64, 64)).Q[:8].view(1, 2, 4, 64) * 3)
        family.threshold.copy_(torch.randn(1, 2, 4) * 0.1)
    x = torch.nn.functional.normalize(torch.randn(1, 1, 1, 64), dim=-1)
    across = torch.randn(1, 40000, 1, 64)
    across = torch.nn.functional.normalize(across - (across * x).sum(-1, keepdim=True) * x, dim=-1)
    y = math.cos(0.5) * x + math.sin(0.5) * across
    hit = (family.codes(x, probes=5) == family.codes(y)).float().mean((0, 1, 2))
    expected = family.probe_probability(x, 0.5, probes=5)[0, 0, 0]
    # The Gaussian is the limit of large dim; at 64 it is good to a few thousandths.
    torch.testing.assert_close(hit, expected, rtol=0, atol=0.01)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 1.0), st.integers(0, 1 << 16))
def test_as_many_probes_as_needed_and_none_more(tables, probes, target, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(3, tables, probes + 1, generator=generator, dtype=torch.float64)
    probability = (weight / weight.sum(-1, keepdim=True))[..., :-1].sort(-1, descending=True).values
    mask, recall = enough_probes(probability, target)
    for p, taken, reached in zip(probability, mask, recall, strict=True):
        assert float(reached) == pytest.approx(float(1 - (1 - (p * taken).sum(-1)).prod()), rel=1e-9)
        assert float(p[taken].min()) >= float(p[~taken].max() if (~taken).any() else 0)
        assert reached >= target or taken.all()
        if taken.sum() > 1:
            least = taken.clone()
            index = (p.masked_fill(~taken, 2)).flatten().argmin()
            least.view(-1)[index] = False
            assert float(1 - (1 - (p * least).sum(-1)).prod()) < target + 1e-12


def test_queries_that_need_less_look_less_far_and_reach_the_target():
    family = hyperplane.Config(dim=DIM, tables=8, bits=6).build()
    found = expected = work = variance = 0.0
    for _ in range(300):
        family.weight.normal_()
        x, y = _at_angle(0.35, 20)
        mask, recall = enough_probes(family.probe_probability(x, 0.35, probes=7), 0.9)
        probed = kept(family.codes(x, probes=7), mask)
        assert torch.equal(probed == NOWHERE, ~mask)
        found += (probed == family.codes(y)).any(-1).any(-1).sum().item()
        expected, variance = expected + recall.sum().item(), variance + (recall * (1 - recall)).sum().item()
        work += mask.sum().item()
    # The 20 pairs of a draw share its hyperplanes; at most that makes the deviation √20 times that of 6000 pairs.
    assert abs(found - expected) < 4 * math.sqrt(20 * variance)
    assert 0.9 <= expected / 6000 < 0.95
    # With fewer lookups than three, more is found than by three tables whatever the margins.
    assert 1 < work / 6000 < 3 and expected / 6000 > family.recall(torch.tensor(0.35), tables=3)


def test_probes_named_before_go_to_the_end():
    codes = torch.tensor([[3, 3, 1, 3, 0, 1], [5, 4, 3, 2, 1, 0]])
    assert distinct(codes).tolist() == [[3, 1, 0, 3, 3, 1], [5, 4, 3, 2, 1, 0]]


def _sizes(adaptive, state):
    """For every table: {bucket: load} of the buckets there are, by walking the directory."""
    codes = torch.arange(state.depth.shape[-1])
    shape = state.depth.shape
    ids = adaptive.of(state, codes.view(1, -1, 1, 1).expand(shape[0], -1, *shape[1:3]))
    ids = ids.permute(0, 2, 3, 1).flatten(0, 2)
    for bucket, load, probed in zip(ids, state.load.flatten(0, 2), state.probed.flatten(0, 2), strict=True):
        sizes, work = {}, {}
        for b, slots, asked in zip(bucket.tolist(), load.tolist(), probed.tolist(), strict=True):
            sizes[b] = sizes.get(b, 0) + slots
            work[b] = work.get(b, 0) + asked
        total = max(sum(work.values()), 1e-30)
        yield sizes, {b: sizes[b] * w / total for b, w in work.items()}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 16), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_loads_stay_within_bounds_and_every_slot_is_reachable(seed, bits, most, by_work):
    torch.manual_seed(seed)
    limits = {"most_work": 1.5, "least_work": 0.7} if by_work else {}
    config = buckets.Config(bits=bits, most_load=most, least_load=most // 2, **limits)
    adaptive = config.build()
    state = adaptive.init_state(2, 1, 2)
    slots = torch.zeros(2, 0, 1, 2, dtype=torch.int32)
    for _ in range(5):
        written = (torch.rand(2, 17, 1, 2) ** 3 * 2**bits).int()  # uneven
        gone = int(torch.randint(slots.shape[1] + 1, ()))
        probed = (torch.rand(2, 9, 1, 2, 3) ** 2 * 2**bits).int()
        probed[:, ::4, ..., 2] = NOWHERE
        old = state
        state = adaptive.update(state, written=written, evicted=slots[:, :gone], probed=probed)
        again = adaptive.update(old, written=written, evicted=slots[:, :gone], probed=probed)
        assert all(torch.equal(a, b) for a, b in zip(state, again, strict=True))
        slots = torch.cat((slots[:, gone:], written), 1)

        for sizes, work in _sizes(adaptive, state):
            assert sum(sizes.values()) == slots.shape[1]
            for bucket, load in sizes.items():
                depth = bucket.bit_length() - 1
                if depth < bits:
                    assert load <= most and work[bucket] <= config.most_work + 1e-4
                if depth and bucket ^ (1 << depth - 1) in sizes:  # the other half: the last bit of the path differs
                    sibling = bucket ^ (1 << depth - 1)
                    together = load + sizes[sibling]
                    asked = (work[bucket] / max(load, 1e-30) if load else 0, work[sibling] / max(sizes[sibling], 1e-30))
                    assert together > config.least_load or (by_work and together * sum(asked) > 0)

        ids = adaptive.of(state, slots)
        if slots.shape[1]:
            k = torch.randn(2, slots.shape[1], 1, 4)
            found = bucket_lookup(k, adaptive.of(state, slots)[..., None], k, sorted_buckets(ids),
                                  picks=slots.shape[1], candidates=2 * slots.shape[1])  # fmt: skip
            own = torch.arange(slots.shape[1]).view(1, -1, 1, 1)
            assert (found.index == own).any(-1).all()


def test_buckets_merge_when_emptied_and_not_before_the_lower_bound():
    adaptive = buckets.Config(bits=4, most_load=4, least_load=2).build()
    codes = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32).view(1, 5, 1, 1)
    four = adaptive.update(adaptive.init_state(1, 1, 1), written=codes[:, :4])
    five = adaptive.update(adaptive.init_state(1, 1, 1), written=codes)
    assert four.depth.unique().tolist() == [0] and five.depth.unique().tolist() == [1]
    assert adaptive.loads(five).flatten().tolist() == [3, 2] * 8
    less = adaptive.update(five, evicted=codes[:, :2])
    assert less.depth.unique().tolist() == [1]
    assert adaptive.update(less, evicted=codes[:, 2:3]).depth.unique().tolist() == [0]
    assert adaptive.of(five, torch.tensor([[[[-1]], [[NOWHERE]], [[5]]]])).flatten().tolist() == [-1, NOWHERE, 3]


def test_buckets_that_are_asked_for_divide_and_cold_ones_merge_again():
    adaptive = buckets.Config(bits=6, most_load=64, least_load=32, most_work=4.0, least_work=3.0, decay=0.5).build()
    codes = torch.arange(32, dtype=torch.int32).view(1, 32, 1, 1)
    state = adaptive.update(adaptive.init_state(1, 1, 1), written=codes)
    assert state.depth.unique().tolist() == [0]
    probed = torch.zeros(1, 50, 1, 1, 1, dtype=torch.int32)
    hot = adaptive.update(state, probed=probed)
    assert adaptive.loads(hot)[0, 0, 0, 0] <= 4 and hot.depth[0, 0, 0, 1] == 1
    # As many probes everywhere: a node of depth d has work 32 / 4^d, 2 at depth 2.
    cold = hot
    for _ in range(12):
        cold = adaptive.update(cold, probed=torch.arange(64, dtype=torch.int32).view(1, 64, 1, 1, 1))
    assert hot.depth.max() == 3 and cold.depth.unique().tolist() == [2]


def test_the_gate_lets_only_hot_buckets_through():
    adaptive = buckets.Config(bits=3, most_load=1, least_load=0).build()
    codes = torch.arange(8, dtype=torch.int32).view(1, 8, 1, 1)
    state = adaptive.update(adaptive.init_state(1, 1, 1), written=codes)
    assert torch.equal(adaptive.gate(state, codes, share=0.1), codes)
    probed = torch.tensor([0] * 6 + [5] * 3 + [2]).view(1, 10, 1, 1, 1)
    state = adaptive.update(state, probed=probed)
    passed = {share: adaptive.gate(state, codes, share=share).flatten() for share in (0.6, 0.61, 0.9, 1.0)}
    assert {s: codes.flatten()[p != NOWHERE].tolist() for s, p in passed.items()} == {
        0.6: [0], 0.61: [0, 5], 0.9: [0, 5], 1.0: [0, 2, 5]}  # fmt: skip


def test_the_recall_curve_against_brute_force():
    family = hyperplane.Config(dim=8, heads=1, tables=3, bits=4).build()
    queries, keys = torch.randn(2, 5, 2, 8), torch.randn(2, 40, 1, 8)
    curve = recall_curve(family, queries, keys, k=4, probes=[1, 3], tables=[1, 3], candidates=3 * 3 * 40)
    asked, held = family.codes(queries, probes=3), family.codes(keys)[..., 0]
    for tables in (1, 3):
        for probes in (1, 3):
            recall, precision, work = [], [], []
            for b in range(2):
                for t in range(5):
                    for h in range(2):
                        score = keys[b, :, 0] @ queries[b, t, h]
                        true = set(score.topk(4).indices.tolist())
                        found = {s for s in range(40) for n in range(tables)
                                 if held[b, s, 0, n] in asked[b, t, h, n, :probes]}  # fmt: skip
                        best = sorted(found, key=lambda s, score=score: -float(score[s]))[:4]
                        recall.append(len(true & found) / 4)
                        precision.append(len(true & set(best)) / max(len(best), 1))
                        work.append(len(found))
            at = curve.sel(tables=tables, probes=probes)
            assert float(at.recall) == pytest.approx(np.mean(recall), abs=1e-6)
            assert float(at.precision) == pytest.approx(np.mean(precision), abs=1e-6)
            assert float(at.work) == pytest.approx(np.mean(work), rel=1e-6)
            assert float(at.share) == pytest.approx(np.mean(work) / 40, rel=1e-6)
