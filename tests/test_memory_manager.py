"""The memory manager: every token in one place, exact where nothing is lost, repaired where something is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.codecs import Chain, Identity, KMeans, LearnedSlots, MeanPool, Quantisation, StridedConvolution, TruncatedSVD
from hmlab.hashing import buckets, cross_polytope, hyperplane, p_stable, tree
from hmlab.memories.harmony.manager import DISK, MEDIUM, SHORT, Config, MemoryManager
from hmlab.memories.harmony.reading import CAUSES, LookupConfig, log_rest, strata
from hmlab.memories.harmony.storage import DensityRatio, DiskView, FixedRatio
from hmlab.memory import load_state, reorder, save_state, state_bytes
from hmlab.stores.persistent import PersistentMemory
from hmlab.stores.tiers import FirstInFirstOut, Learned, LeastFrequentlyUsed, LeastRecentlyUsed, Priority

HEADS, DIM = 2, 8


def made(batch: int, length: int, *, heads: int = HEADS, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of random tokens."""
    return tuple(torch.randn(batch, length, heads, dim) for _ in range(3))


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query of each row and head to all of these tokens."""
    weight = torch.einsum("bhd,bthd->bht", q, k).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weight, v)


def opened(folder, *, heads: int = HEADS, dim: int = DIM) -> PersistentMemory:
    return PersistentMemory.open(folder / "slots", dim=dim, heads=heads)


def held_mass(manager: MemoryManager) -> Tensor:
    """Tokens in all readable places `[batch, heads]`."""
    state = manager.state
    window, _ = manager._window()
    mass = (state.medium.slots.mass * state.medium.usage.held[..., None]).sum(1) + window.shape[1]
    for row in range(len(mass)):
        cursor = state.disk.cursor(row)
        above = set(state.medium.slots.number[row].tolist())
        number = torch.tensor([n for n in range(cursor.watermark) if n not in above], dtype=torch.int64)
        if len(number):
            mass[row] += manager.store.read(number, cursor).mass.sum(0)
    return mass


def assert_same_state(a, b) -> None:
    """Bit for bit, but for how long reads took."""
    a, b = (state._replace(traffic=state.traffic._replace(seconds=state.traffic.seconds * 0)) for state in (a, b))
    for (path, x), (_, y) in zip(*(pytree.tree_flatten_with_path(s)[0] for s in (a, b)), strict=True):
        assert torch.equal(x, y), pytree.keystr(path)


@pytest.mark.parametrize(
    ("window", "segment", "sinks", "fine"), [(13, 8, 3, 2), (1, 8, 0, 0), (16, 8, 7, 0), (5, 7, 1, 3)]
)
def test_ratio_1_and_all_slots_are_full_attention(window, segment, sinks, fine):
    q, k, v = made(2, 75)
    config = Config(heads=HEADS, dim=DIM, window=window, segment=segment, sinks=sinks, capacity=80, picks=80, fine=fine)
    manager = config.build(ratio=FixedRatio(1))
    for t in range(75):
        manager.write(k[:, t : t + 1], v[:, t : t + 1])
        reading = manager.read(q[:, t], exact=True)
        torch.testing.assert_close(reading.out, full(q[:, t], k[:, : t + 1], v[:, : t + 1]), rtol=0, atol=1e-5)
        score = torch.einsum("bhd,bthd->bht", q[:, t], k[:, : t + 1])
        torch.testing.assert_close(reading.lse, score.logsumexp(-1), rtol=0, atol=1e-5)
        first = max(0, (t - window + 1) // segment * segment)
        near = score.softmax(-1)[..., [s for s in range(t + 1) if s >= first or s < sinks]].sum(-1)
        torch.testing.assert_close(reading.hit_share[..., SHORT], near, rtol=0, atol=1e-5)


def test_ratio_1_over_the_disk_is_full_attention(tmp_path):
    q, k, v = made(2, 60)
    config = Config(heads=HEADS, dim=DIM, window=9, segment=8, sinks=2, capacity=12, picks=64)
    with opened(tmp_path) as store:
        manager = config.build(ratio=FixedRatio(1), store=store)
        for t in range(60):
            manager.write(k[:, t : t + 1], v[:, t : t + 1])
            if t % 6 == 5:
                reading = manager.read(q[:, t], exact=True)
                torch.testing.assert_close(reading.out, full(q[:, t], k[:, : t + 1], v[:, : t + 1]), rtol=0, atol=1e-5)
        assert (reading.hit_share[..., DISK] > 0.1).any()


@pytest.mark.parametrize("sizes", [[101], [1, 20, 3, 7, 8, 40, 22], [16] * 6 + [5]])
def test_chunks_do_what_token_by_token_does(sizes):
    _, k, v = made(2, 101)
    tokens = torch.randint(0, 30, (2, 101))
    config = Config(heads=HEADS, dim=DIM, window=9, segment=8, sinks=2, capacity=20, fine=2, density="surprisal")
    family = hyperplane.Config(dim=DIM, heads=HEADS).build()
    ratio = DensityRatio(ratio=4, ratios=(1, 2, 4, 8))
    whole, steps = (config.build(ratio=ratio, family=family) for _ in range(2))
    for t in range(101):
        steps.write(k[:, t : t + 1], v[:, t : t + 1], tokens[:, t : t + 1])
    for a, b, ids in zip(k.split(sizes, 1), v.split(sizes, 1), tokens.split(sizes, 1), strict=True):
        whole.write(a, b, ids)
    assert_same_state(whole.state, steps.state)


RULES = {"fifo": FirstInFirstOut, "lru": LeastRecentlyUsed, "lfu": LeastFrequentlyUsed, "priority": Priority,
         "learned": Learned}  # fmt: skip


@pytest.mark.parametrize("promote", [0, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_token_is_in_one_place(rule, promote, tmp_path):
    q, k, v = made(2, 140)
    config = Config(heads=HEADS, dim=DIM, window=10, segment=8, sinks=2, capacity=16, picks=6, promote=promote)
    with opened(tmp_path) as store:
        manager = config.build(ratio=FixedRatio(2), eviction=RULES[rule](), store=store)
        for t in range(0, 140, 7):
            manager.write(k[:, t : t + 7], v[:, t : t + 7])
            manager.read(3 * q[:, t])
            assert torch.equal(held_mass(manager), torch.full((2, HEADS), t + 7.0))
            held = manager.state.medium.usage.held.sum(1)
            assert (manager.state.tables.divided.load.sum(-1) == held[:, None, None]).all()
        if rule != "learned":  # untrained, it may like none of them better
            assert (manager.state.medium.slots.number >= 0).any() == (promote > 0)


def test_without_a_disk_what_is_evicted_is_gone():
    _, k, v = made(1, 90)
    manager = Config(heads=HEADS, dim=DIM, window=10, segment=8, sinks=0, capacity=16).build(ratio=FixedRatio(1))
    manager.write(k, v)
    assert (held_mass(manager) == 16 + 90 - 80).all()
    assert manager.state.medium.slots.segment.unique().tolist() == [8, 9]  # the last that left the window


@pytest.mark.parametrize(("rule", "kept"), [("fifo", False), ("lru", True), ("lfu", True), ("priority", True)])
def test_slots_that_are_read_stay(rule, kept):
    _, k, v = made(1, 400)
    k = unit(k)
    wanted = k[:, 3]  # a token of the first segment
    config = Config(heads=HEADS, dim=DIM, window=8, segment=8, sinks=0, capacity=32, picks=1)
    manager = config.build(ratio=FixedRatio(1), eviction=RULES[rule]())
    manager.write(k[:, :16], v[:, :16])
    for t in range(16, 400, 8):
        manager.read(30 * wanted, exact=True)
        manager.write(k[:, t : t + 8], v[:, t : t + 8])
    there = ((manager.state.medium.slots.position == 3).all(-1)).any()
    assert there == kept


def test_wanted_slots_come_back_from_the_disk_and_are_written_once(tmp_path):
    _, k, v = made(1, 200)
    k = unit(k)
    config = Config(heads=HEADS, dim=DIM, window=8, segment=8, sinks=0, capacity=16, picks=2, promote=1)
    with opened(tmp_path) as store:
        manager = config.build(ratio=FixedRatio(1), eviction=LeastRecentlyUsed(), store=store)
        manager.write(k[:, :80], v[:, :80])
        query = 300 * k[:, 3]  # sees nothing else
        before = manager.read(query, exact=True)
        assert (before.tier == DISK).all()
        number = before.stored[0, 0, 0]
        manager.write(k[:, 80:88], v[:, 80:88])
        after = manager.read(query, exact=True)
        assert (after.tier == MEDIUM).all() and not (after.stored == number).any()
        torch.testing.assert_close(after.out, before.out, rtol=0, atol=1e-5)
        place = after.retrieved[0, 0, 0]
        assert manager.state.medium.slots.number[0, place] == number
        assert (manager.state.medium.slots.position[0, place] == 3).all()
        # Unread again it leaves: what is on disk is seen again, and nothing was written twice.
        manager.write(k[:, 88:160], v[:, 88:160])
        assert (manager.state.medium.slots.number < 0).all()
        assert (manager.read(query, exact=True).tier == DISK).all()
        slots = store.read(torch.arange(int(manager.state.disk.watermark[0])), manager.state.disk.cursor(0))
        assert len(slots.position[:, 0].unique()) == len(slots.position) == 160 - 8 - 16


def test_a_state_is_a_value(tmp_path):
    """Kept, saved and loaded, continued twice over one store: no continuation sees another's slots."""
    q, k, v = made(2, 160)
    config = Config(heads=HEADS, dim=DIM, window=10, segment=8, capacity=24, picks=4, promote=2, fine=2, confident=0.5)
    with opened(tmp_path) as store:
        torch.manual_seed(1)
        manager = config.build(ratio=DensityRatio(ratio=4, ratios=(2, 4, 8)), store=store)

        def go_on(first: int, end: int) -> Tensor:
            outs = []
            for t in range(first, end, 5):
                manager.write(k[:, t : t + 5], v[:, t : t + 5])
                outs.append(manager.read(q[:, t]).out)
            return torch.stack(outs)

        go_on(0, 100)
        fork = manager.state
        copy = pytree.tree_map(torch.clone, fork)
        save_state(fork, tmp_path / "state")
        expected = go_on(100, 160)
        assert_same_state(fork, copy)
        manager.state = load_state(manager.init_state(2), tmp_path / "state")
        k[:, 100:] *= -1
        other = go_on(100, 160)
        k[:, 100:] *= -1
        manager.state = fork
        assert torch.equal(go_on(100, 160), expected) and not torch.equal(other, expected)


def test_rows_do_not_touch_one_another(tmp_path):
    q, k, v = made(3, 90)
    config = Config(heads=HEADS, dim=DIM, window=10, segment=8, capacity=16, picks=3, promote=2, fine=2, confident=0.5)
    family = hyperplane.Config(dim=DIM, heads=HEADS).build()
    with opened(tmp_path) as store:
        readings = []
        for rows in ([0, 1, 2], [2]):
            manager = config.build(ratio=DensityRatio(ratio=2, ratios=(1, 2, 4)), store=store, family=family)
            for t in range(0, 90, 6):
                manager.write(k[rows, t : t + 6], v[rows, t : t + 6])
                reading = manager.read(q[rows, t])
            readings.append(reading)
        for name, a, b in zip(reading._fields, *readings, strict=True):
            torch.testing.assert_close(a[-1:], b, rtol=1e-5, atol=1e-6, msg=name)


def test_reordered_rows_go_on_as_before():
    q, k, v = made(2, 80)
    config = Config(heads=HEADS, dim=DIM, window=10, segment=8, capacity=16, picks=3, fine=2)
    manager = config.build(ratio=DensityRatio(ratio=2, ratios=(1, 2, 4)))
    manager.write(k[:, :50], v[:, :50])
    rows = torch.tensor([1, 0])
    swapped = reorder(manager.state, rows)
    manager.write(k[:, 50:], v[:, 50:])
    out = manager.read(q[:, 0]).out
    manager.state = swapped
    manager.write(k[rows, 50:], v[rows, 50:])
    torch.testing.assert_close(manager.read(q[rows, 0]).out, out[rows])


def test_density_sets_the_ratio_within_the_budget():
    ratio = DensityRatio(ratio=16)
    density = 20 + 0.1 * torch.randn(3, 400).cumsum(1) + torch.randn(3, 400)  # drifts
    state, k = ratio.init_state(3), torch.zeros(3, 64, 1, 1)
    slots = []
    for one in density.T:
        count, state = ratio(k, k, one, state)
        slots.append(count)
    slots = torch.stack(slots, 1)
    assert set(slots.unique().tolist()) == {1, 2, 4, 8, 16}
    torch.testing.assert_close(slots.double().mean(1), torch.full((3,), 4.0).double(), rtol=0.05, atol=0)
    for row in range(3):
        assert torch.corrcoef(torch.stack((slots[row].double().log2(), density[row].double())))[0, 1] > 0.5
    # Later segments change nothing.
    state, again = ratio.init_state(3), []
    for one in density.T[:100]:
        count, state = ratio(k, k, one, state)
        again.append(count)
    assert torch.equal(torch.stack(again, 1), slots[:, :100])


def test_hits_and_misses_are_those_of_attention():
    _, k, v = made(1, 64)
    k = unit(k)
    manager = Config(heads=HEADS, dim=DIM, window=8, segment=8, sinks=0, capacity=64).build(ratio=FixedRatio(1))
    manager.write(k, v)
    near, far = manager.read(40 * k[:, 62], exact=True), manager.read(40 * k[:, 5], exact=True)
    assert (near.tier == SHORT).all() and (far.tier == MEDIUM).all()
    torch.testing.assert_close(far.hit_share.sum(-1), torch.ones(1, HEADS))
    counters = manager.counters
    assert counters.hits.tolist() == [[HEADS, HEADS, 0]] and counters.misses.tolist() == [[HEADS, HEADS, 0]]
    assert counters.hit_rate[0, :2].tolist() == [0.5, 0.5]
    window = 8  # tokens 56 .. 63, two vectors each; every slot's key, the values of those retrieved, samples
    assert counters.bytes[0, SHORT] == 2 * 2 * window * HEADS * DIM * 4
    assert counters.bytes[0, MEDIUM] == 2 * (56 + manager.config.picks + manager.config.samples) * HEADS * DIM * 4
    assert (counters.seconds[0, :2] > 0).all() and counters.seconds[0, DISK] == 0


def test_first_hit_reads_one_tier_only():
    _, k, v = made(1, 64)
    k = unit(k)
    k[:, 40:, 0] = torch.eye(DIM)[0]  # head 0: nothing else in the window
    k[:, :40, 0] = unit(k[:, :40, 0].abs() * (torch.arange(DIM) > 0))
    k[:, :, 1] = torch.eye(DIM)[1]  # head 1: everywhere the same
    config = Config(heads=HEADS, dim=DIM, window=16, segment=8, sinks=0, capacity=64, picks=64)
    manager = config.build(ratio=FixedRatio(1))
    manager.write(k, v)
    query = 400 * torch.stack((k[:, 5, 0], k[:, 0, 1]), 1)
    out, tier = manager.read_first_hit(query)
    assert tier.tolist() == [[MEDIUM, SHORT]]
    torch.testing.assert_close(out[:, 1], v[:, 48:, 1].mean(1), rtol=0, atol=1e-5)  # not of the 48 before the window
    assert (out[:, 0] - v[:, 5, 0]).norm() < 0.1
    out, tier = manager.read_first_hit(-query)
    assert (tier == -1).all() and not out.any()


def test_gate_and_target_recall_read_fewer_slots():
    _, k, v = made(1, 600, heads=1, dim=16)
    k = unit(k)
    family = hyperplane.Config(dim=16, tables=2, bits=4).build()
    divide = buckets.Config(bits=4, most_load=8, least_load=4)

    def candidates(**settings) -> int:
        lookup = LookupConfig(probes=4, per_bucket=256, buckets=divide, **settings)
        config = Config(heads=1, dim=16, window=8, segment=8, sinks=0, capacity=512, lookup=lookup)
        manager = config.build(family=family, ratio=FixedRatio(1))
        manager.write(k[:, :560], v[:, :560])
        for _ in range(4):
            manager.read(20 * k[:, 300])
        manager.write(k[:, 560:], v[:, 560:])
        assert (manager.read(20 * k[:, 300]).tier == MEDIUM).all()  # what was asked for before is hot
        return int(manager._retrieve(20 * k[:, 301], 8).candidates)

    everything = candidates()
    assert candidates(gate=0.9) < everything and candidates(recall=0.6, angle=0.1) < everything


CODECS = {
    "k-means": lambda: KMeans.Config().build(),
    "learned-slots": lambda: LearnedSlots.Config(dim=DIM, kv_heads=HEADS, most=8).build(),
    "strided-convolution": lambda: StridedConvolution.Config(dim=DIM, kv_heads=HEADS, ratios=(2, 3)).build(),
    "int8 means": lambda: Chain.Config(stages=(MeanPool.Config(), Quantisation.Config())).build(),
    "truncated-svd": lambda: TruncatedSVD.Config().build(),
}


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_keeps_every_token(codec):
    _, k, v = made(2, 90)
    manager = Config(heads=HEADS, dim=DIM, window=10, segment=8, sinks=2, capacity=128, fine=3).build(
        codec=CODECS[codec](), ratio=FixedRatio(2))  # fmt: skip
    manager.write(k, v)
    torch.testing.assert_close(held_mass(manager), torch.full((2, HEADS), 90.0), rtol=1e-5, atol=0)
    assert manager.read(k[:, 20]).out.isfinite().all()


@pytest.mark.parametrize(
    "family",
    [cross_polytope.Config(dim=DIM, heads=HEADS, rows=8), tree.Config(dim=DIM, heads=HEADS, bits=6),
     p_stable.Config(dim=DIM, heads=HEADS, bits=2)],
    ids=lambda config: type(config).__module__.rsplit(".", 1)[-1],
)  # fmt: skip
def test_any_hash_family_finds_the_slot_that_a_query_is(family):
    _, k, v = made(2, 150)
    k = unit(k)
    manager = Config(heads=HEADS, dim=DIM, window=10, segment=8, capacity=256).build(
        family=family.build(), ratio=FixedRatio(1))  # fmt: skip
    manager.write(k, v)
    reading = manager.read(300 * k[:, 70])
    torch.testing.assert_close(reading.out, v[:, 70], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float64, 1e-12)])
def test_other_precisions(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in made(1, 70))
    manager = Config(heads=HEADS, dim=DIM, window=10, segment=8, capacity=64, picks=64, fine=2, confident=0.5).build(
        ratio=FixedRatio(1))  # fmt: skip
    manager.write(k, v)
    reading = manager.read(q[:, 0], exact=True)
    true = full(*(x.double() for x in (q[:, 0], k, v)))
    torch.testing.assert_close(reading.out.double(), true, rtol=0, atol=tolerance)
    assert manager.read(q[:, 0]).out.isfinite().all()


# Confidence


def test_confidence_is_exact_from_all_slots_and_unbiased_from_some():
    q, k, v = made(1, 300)
    config = Config(heads=HEADS, dim=DIM, window=8, segment=8, sinks=0, capacity=300, picks=5, samples=12)
    manager = config.build(ratio=FixedRatio(2))
    manager.write(k, v)
    medium = manager.state.medium
    found = manager._retrieve(q[:, 0], 5)
    score = torch.einsum("bhd,bnhd->bhn", q[:, 0], medium.slots.k) + medium.bias.transpose(1, 2)
    true = (found.score.logsumexp(-1) - score.logsumexp(-1)).exp()
    torch.testing.assert_close(manager.calibration(q[:, 0]).true, true, rtol=1e-4, atol=0)
    rest = score.exp().sum(-1) - found.score.exp().sum(-1)
    held = medium.usage.held.sum(1)
    estimates = []
    for seed in range(3000):
        place, size = strata(held, 12, seed)
        assert size.sum() == held and (place >= 0).all() and (place < held).all()
        drawn = score.gather(2, place.expand(HEADS, -1)[None])
        estimates.append(log_rest(drawn, place, size, found.index).exp())
    estimates = torch.stack(estimates).double()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - rest).abs() < 4 * error).all()


def collision(hidden: bool, **settings) -> tuple[MemoryManager, Tensor, Tensor]:
    """A hash table of three bits, and one slot that a query wants: beyond the hyperplane next to it, if hidden."""
    torch.manual_seed(0)
    family = hyperplane.Config(dim=16, tables=1, bits=3).build()
    family.weight.copy_(torch.eye(3, 16)[None, None])
    k = unit(torch.cat((0.2 * torch.randn(1, 200, 1, 3), torch.randn(1, 200, 1, 13)), -1))
    v = torch.randn(1, 200, 1, 16)
    wanted = torch.cat((torch.tensor([0.05, 0.4, 0.4]), 0.2 * torch.randn(13)))
    query, key = wanted.clone(), wanted.clone()
    key[0] *= -1 if hidden else 1
    k[0, 100, 0] = unit(key)
    divide = buckets.Config(bits=3, most_load=1, least_load=0)
    lookup = LookupConfig(probes=1, deep_probes=2, per_bucket=256, buckets=divide)
    config = Config(heads=1, dim=16, window=8, segment=8, sinks=0, capacity=256, picks=8, lookup=lookup, **settings)
    manager = config.build(family=family, ratio=FixedRatio(1))
    manager.write(k, v)
    return manager, 25 * unit(query)[None, None], full(25 * unit(query)[None, None], k, v)


def test_a_collision_is_noticed_and_repaired_by_deeper_probing():
    manager, query, true = collision(hidden=True)
    reading = manager.read(query)
    assert reading.confidence < 0.3 and (reading.out - true).norm() > 0.5 * true.norm() and not reading.deepened
    manager, query, true = collision(hidden=True, confident=0.5)
    reading = manager.read(query)
    assert reading.deepened.all() and reading.confidence > 0.9
    assert (reading.out - true).norm() < 0.05 * true.norm()
    assert manager.state.repairs.tolist() == [[1, 0]]


def test_without_a_collision_nothing_is_repaired():
    manager, query, true = collision(hidden=False, confident=0.5)
    reading = manager.read(query)
    assert not reading.deepened.any() and reading.confidence > 0.9 and manager.state.repairs.tolist() == [[0, 0]]
    assert (reading.out - true).norm() < 0.05 * true.norm()


# Over-compression


def compressed(planted: bool, **settings) -> tuple[MemoryManager, Tensor, Tensor, Tensor, Tensor]:
    """40 segments of nearly equal keys, one slot each; one of them hides a token of another direction, if planted."""
    torch.manual_seed(0)
    centre = unit(torch.randn(40, 1, 1, 32))
    k = unit(centre + 0.02 * torch.randn(40, 64, 1, 32)).flatten(0, 1)[None]
    v = (torch.randn(40, 1, 1, 32) + 0.1 * torch.randn(40, 64, 1, 32)).flatten(0, 1)[None]
    odd = unit(torch.randn(32))
    if planted:
        k[0, 36 * 64 + 17, 0] = odd
        v[0, 36 * 64 + 17, 0] = 3
    config = Config(heads=1, dim=32, window=64, segment=64, sinks=4, capacity=64, **settings)
    manager = config.build(ratio=FixedRatio(64))
    manager.write(k, v)
    return manager, 20 * odd[None, None], 20 * centre[30, 0][None], k, v


def test_over_compression_is_noticed_and_repaired_by_finer_slots():
    manager, query, _, k, v = compressed(planted=True)
    true = full(query, k, v)
    assert (manager.read(query, exact=True).out - true).norm() > 0.5 * true.norm()
    manager, query, _, k, v = compressed(planted=True, fine=8)
    reading = manager.read(query)
    assert reading.doubt > 0.9 and reading.refined.tolist() == [[36]] and manager.state.repairs.tolist() == [[0, 1]]
    assert (reading.out - true).norm() < 0.05 * true.norm()  # int8 keys


def test_without_over_compression_nothing_is_refined():
    manager, query, other, k, v = compressed(planted=False, fine=8)
    for q in (query, other):
        reading, true = manager.read(q, exact=True), full(q, k, v)
        assert reading.doubt < 0.5 and (reading.refined == -1).all()
        assert (reading.out - true).norm() < 0.2 * true.norm()
    manager, _, other, k, v = compressed(planted=True, fine=8)  # nor by who asks for something else
    assert manager.read(other, exact=True).doubt < 0.5


def test_doubt_bounds_the_share_of_every_hidden_token():
    """Where doubt is d, no token of the segment has more than d / (1 - d) of what was read beside it."""
    _, k, v = made(1, 200)
    k, tight = unit(k + 2 * torch.randn(1, 1, HEADS, DIM)), 0
    config = Config(heads=HEADS, dim=DIM, window=16, segment=16, sinks=3, capacity=80, fine=4, doubtful=1.0,
                    reach=1.0)  # fmt: skip
    manager = config.build(ratio=FixedRatio(4))
    manager.write(k, v)
    for _ in range(50):
        q = 6 * unit(torch.randn(1, HEADS, DIM))
        state, lse = manager.state, manager.read(q, exact=True).lse
        doubt = manager.fine.doubt(state.fine, state.medium, q, lse)
        for at, number in enumerate(state.fine.segment[0].tolist()):
            tokens = k[0, number * 16 : number * 16 + 16]
            chosen = state.medium.slots.segment[0] == number
            means, mass = state.medium.slots.k[0, chosen], state.medium.slots.mass[0, chosen]
            own = torch.einsum("hd,nhd->nh", q[0], means) + mass.log()
            nearest = torch.cdist(tokens.transpose(0, 1), means.transpose(0, 1)).argmin(-1).T
            hidden = torch.einsum("hd,nhd->nh", q[0], tokens).exp() - own.gather(0, nearest).exp()
            share = hidden.clamp(min=0).amax(0) / (hidden.clamp(min=0).amax(0) + lse[0].exp())
            assert (share <= doubt[0, :, at] + 1e-6).all()
            tight = max(tight, float((share / doubt[0, :, at].clamp(min=1e-9)).max()))
    assert 0.05 < tight <= 1 + 1e-5


def test_doubt_tells_what_is_hidden_from_noise():
    """30 rows, keys 16 degrees about their segment's centre: nearly all plants are found, nearly no row without one."""
    rows, refined = 30, {}
    for planted in (True, False):
        centre = unit(torch.randn(rows, 40, 1, 1, 32))
        k = unit(centre + 0.05 * torch.randn(rows, 40, 64, 1, 32)).flatten(1, 2)
        odd = unit(torch.randn(rows, 1, 32))
        if planted:
            k[:, 36 * 64 + 17] = odd
        config = Config(heads=1, dim=32, window=64, segment=64, sinks=0, capacity=64, fine=8)
        manager = config.build(ratio=FixedRatio(64))
        manager.write(k, k)
        refined[planted] = manager.read(20 * odd, exact=True).refined
    assert (refined[True] == 36).double().mean() > 0.9
    assert (refined[False] >= 0).double().mean() < 0.15


def test_segments_whose_slots_have_left_are_not_refined():
    """Else tokens would be read beside their slots on disk."""
    _, k, v = made(1, 120)
    config = Config(heads=HEADS, dim=DIM, window=8, segment=8, sinks=0, capacity=6, fine=4, finer=4, doubtful=0.0)
    manager = config.build(ratio=FixedRatio(4))
    manager.write(k, v)
    assert manager.state.fine.segment.sort().values.tolist() == [[10, 11, 12, 13]]
    reading = manager.read(5 * k[:, 90])
    assert set(reading.refined.flatten().tolist()) <= {-1, 11, 12, 13}
    assert manager.fine.whole(manager.state.fine, manager.state.medium).sum() == 3


def test_refined_segments_are_exact():
    """Everything refined through a codec that loses nothing: full attention, whatever the ratio."""
    q, k, v = made(2, 75)
    config = Config(heads=HEADS, dim=DIM, window=9, segment=8, sinks=3, capacity=80, picks=80, fine=9, finer=9,
                    doubtful=0.0, reach=1.0)  # fmt: skip
    manager = config.build(ratio=FixedRatio(8), fine_codec=Identity())
    manager.write(k, v)
    reading = manager.read(q[:, 0], exact=True)
    assert (reading.refined >= 0).sum(1).tolist() == [8, 8]  # all that the window has passed
    torch.testing.assert_close(reading.out, full(q[:, 0], k, v), rtol=0, atol=1e-5)


# Causes


def test_errors_are_attributed():
    manager, query, *_ = collision(hidden=True)
    assert CAUSES[manager.attribute(query).cause] == "collision"
    manager, query, *_ = collision(hidden=False)
    assert CAUSES[manager.attribute(query, tolerance=0.05).cause] == "none"
    manager, query, other, *_ = compressed(planted=True, fine=8)
    found = manager.attribute(query)
    assert CAUSES[found.cause] == "over-compression" and found.fine < 0.1 * found.error
    assert CAUSES[manager.attribute(other, tolerance=0.05).cause] == "none"
    manager, query, *_ = collision(hidden=False)  # attention spread over more slots than are retrieved
    assert CAUSES[manager.attribute(0 * query).cause] == "neither"


# Streams


def test_a_long_stream_takes_bounded_memory():
    lookup = LookupConfig(buckets=buckets.Config(bits=4))
    config = Config(heads=1, dim=8, window=256, segment=256, capacity=256, picks=8, fine=2, lookup=lookup)
    manager, sizes = config.build(ratio=DensityRatio(ratio=16)), []
    for _ in range(50):
        k, v = torch.randn(2, 1, 2000, 1, 8)
        manager.write(k, v)
        assert manager.read(k[:, -1]).out.isfinite().all()
        sizes.append(state_bytes(manager.state))
    assert manager.state.position.item() == 100_000 and manager.state.medium.usage.held.all()
    assert len(set(sizes)) == 1


@pytest.mark.unchecked
def test_errors_name_what_was_expected():
    good = {"heads": HEADS, "dim": DIM}
    for wrong, message in (
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"sinks": 64}, "sinks: expected 0 to segment - 1"),
        ({"density": "cross_entropy"}, "density: expected one of"),
        ({"confident": 2.0}, "confident: expected a share"),
        ({"fine": -1}, "fine: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**good, **wrong)
    with pytest.raises(ValueError, match="promote: expected 0 without a store"):
        Config(**good, promote=1).build()
    with pytest.raises(ValueError, match="deep_probes: expected at least probes"):
        LookupConfig(probes=9)
    with pytest.raises(ValueError, match="gate: expected a share above 0"):
        LookupConfig(gate=0.0)
    with pytest.raises(ValueError, match="tables: expected 1 to the family's 4"):
        Config(**good, lookup=LookupConfig(tables=5)).build()
    manager = Config(**good).build()
    q, k, v = made(1, 5)
    with pytest.raises(ValueError, match="state: expected a write, or a state"):
        manager.read(q[:, 0])
    with pytest.raises(ValueError, match="k: expected floats"):
        manager.write(k[..., :3], v[..., :3])
    manager.write(k, v)
    with pytest.raises(ValueError, match=r"q: expected floats \[1, 2, 8\]"):
        manager.read(q)
    with pytest.raises(ValueError, match="k: expected 1 rows"):
        manager.write(*made(2, 3)[1:])
    with pytest.raises(ValueError, match="tokens: expected ids"):
        Config(**good, density="kl").build().write(k, v)
    with pytest.raises(ValueError, match="ratios: expected at least one"):
        DensityRatio(ratios=())


def test_wanted_slots_are_counted_once():
    """number: sums of reads and mass over heads and reads, the most attended first, as many as there is room for."""
    view = DiskView.empty(1, 2).want(torch.tensor([[4, 7, -1, 4]]), torch.tensor([[0.1, 0.3, 9.0, 0.1]]))
    assert view.number.tolist() == [[7, 4]] and view.reads.tolist() == [[1, 2]]
    view = view.want(torch.tensor([[5, 4]]), torch.tensor([[0.05, 0.4]]))
    assert view.number.tolist() == [[4, 7]] and view.reads.tolist() == [[3, 1]]
    torch.testing.assert_close(view.mass, torch.tensor([[0.6, 0.3]]).double(), rtol=0, atol=1e-6)
