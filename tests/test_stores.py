"""The persistent tier: what was acknowledged is there, whoever died; a view never changes; search finds the best."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmlab.stores import layout
from hmlab.stores.layout import Slots
from hmlab.stores.persistent import START, Cursor, PersistentMemory
from hmlab.stores.search import Found

DIM, HEADS = 8, 2
KILLS = 5


def made(count: int, seed: int = 0, *, dim: int = DIM, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> Slots:
    """Random slots, some of which one head or both keep nothing of."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)

    mass = (normal(count, heads) * 10).relu()
    present = (mass > 0)[..., None]
    return Slots(normal(count, heads, dim).where(present, 0), normal(count, heads, dim).where(present, 0), mass,
                 normal(count, heads).abs() * 1e6, normal(count).abs(), torch.full((count,), seed),
                 torch.arange(count) // 4)  # fmt: skip


def joined(*parts: Slots) -> Slots:
    return Slots(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def assert_same(found: Slots, expected: Slots) -> None:
    """Bit for bit: positions and densities are held in float64, from which they come back."""
    for name, got, wanted in zip(Slots._fields, found, expected, strict=True):
        got = got.to(wanted.dtype)
        assert got.shape == wanted.shape, name
        assert torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


def whole(store: PersistentMemory, cursor: Cursor) -> Slots:
    return store.read(torch.arange(cursor.watermark), cursor)


def brute(slots: Slots, queries: torch.Tensor, k: int) -> Found:
    """Every score, the best k by (−score, number); slots without mass do not exist."""
    scores = torch.einsum("qhd,nhd->qhn", queries, slots.keys) + slots.mass.log().T
    scores = torch.nn.functional.pad(scores, (0, k), value=-torch.inf)
    order = scores.sort(dim=2, descending=True, stable=True).indices[..., :k]
    head = torch.arange(slots.keys.shape[1])[None, :, None]
    score = scores.gather(2, order)
    found = score > -torch.inf
    held = (slots.keys, slots.values, slots.mass, slots.position.double())
    fields = (torch.cat((t, torch.zeros_like(t[:1])))[order.where(found, -1), head] for t in held)
    return Found(order.where(found, -1), score, *fields)


@pytest.fixture
def store(tmp_path: Path):
    with PersistentMemory.open(tmp_path / "slots", dim=DIM, heads=HEADS) as opened:
        yield opened


def test_reads_back_every_bit_and_after_reopening(store):
    first, second = made(300, 1), made(41, 2)
    first.keys[5, 0, :3] = torch.tensor([-0.0, 1e-42, torch.finfo().max])
    first.mass[5, 0] = 1e-45
    cursor = store.append(second, store.append(first))
    assert cursor.watermark == len(store) == 341
    assert_same(whole(store, cursor), joined(first, second))
    picked = torch.tensor([340, 3, 3, 17])
    assert_same(store.read(picked, cursor), Slots(*(t[picked] for t in joined(first, second))))
    assert not len(store.read(picked[:0], cursor).keys)
    with PersistentMemory.open(store.address, dim=DIM, heads=HEADS, create=False) as again:
        assert_same(whole(again, cursor), joined(first, second))
        longer = again.append(made(3, 3), cursor)
        assert_same(whole(again, longer), joined(first, second, made(3, 3)))
    assert_same(whole(store, longer), joined(first, second, made(3, 3)))  # the older handle follows


def test_any_floating_type_that_fits(tmp_path):
    for wide, narrow in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32)):
        with PersistentMemory.open(tmp_path / str(wide), dim=DIM, heads=HEADS, dtype=wide) as store:
            slots = made(20, dtype=narrow)
            cursor = store.append(slots)
            assert store.read(torch.arange(20), cursor).keys.dtype == wide
            assert_same(whole(store, cursor), slots)
            found = store.search(torch.randn(2, HEADS, DIM, dtype=torch.float64), 3, cursor)
            assert found.keys.dtype == found.score.dtype == torch.float64
            assert store.search(torch.randn(2, HEADS, DIM, dtype=narrow), 3, cursor).keys.dtype == wide


def test_two_continuations_of_one_state(store):
    start = store.append(made(9, 1))
    longer = store.append(made(5, 2), start)
    assert longer.branch == start.branch
    with PersistentMemory.open(store.address, dim=DIM, heads=HEADS) as other:
        for seed, handle in ((3, store), (4, other)):
            forked = handle.append(made(7, seed), start)
            assert_same(whole(store, forked), joined(made(9, 1), made(7, seed)))
    assert_same(whole(store, longer), joined(made(9, 1), made(5, 2)))
    assert_same(whole(store, store.append(made(2, 5), longer)), joined(made(9, 1), made(5, 2), made(2, 5)))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 5)), min_size=1, max_size=10), st.data())
def test_continuations_of_one_state_do_not_see_each_other(store, appends, data):
    """Append behind any view ever had, through two handles; each view stays the list that a model says it is."""
    with PersistentMemory.open(store.address, dim=DIM, heads=HEADS) as other:
        views: list[tuple[Cursor, list[Slots]]] = [(START, [made(0)])]
        for seed, (pick, count) in enumerate(appends):
            cursor, held = views[int(pick * len(views))]
            slots = made(count, seed)
            views.append(((other if seed % 3 == 2 else store).append(slots, cursor), [*held, slots]))
        cursor, held = data.draw(st.sampled_from(views))
        for reader in (store, other):
            expected = joined(*held)
            assert_same(whole(reader, cursor), expected)
            query = torch.randn(1, HEADS, DIM)
            best, exact = (reader.search(query, 4, cursor, exact=exact).number for exact in (False, True))
            assert torch.equal(best, exact)
            ids = reader.search(query, 100, cursor).number
            assert ids.max() < max(cursor.watermark, 1)
            assert int((ids >= 0).sum()) == int((expected.mass > 0).sum())


@pytest.mark.parametrize("indexed", [False, True])
def test_exact_search_is_brute_force(store, indexed):
    """Small whole numbers, so that every order of summing gives the same score and many scores are equal."""
    chance = torch.Generator().manual_seed(3)
    slots = made(5000, 3)
    keys = torch.randint(-2, 3, slots.keys.shape, generator=chance).float()
    slots = slots._replace(keys=keys, mass=(slots.mass > 0).float())
    cursor = store.append(Slots(*(t[:1500] for t in slots)))
    store.append(made(700, 9), cursor)  # a continuation that is not searched
    with PersistentMemory.open(store.address, dim=DIM, heads=HEADS) as other:
        cursor = other.append(Slots(*(t[1500:] for t in slots)), cursor)
    if indexed:
        store.index()
    queries = torch.randint(-3, 4, (9, HEADS, DIM), generator=chance).float()
    found, expected = store.search(queries, 50, cursor, exact=True), brute(slots, queries, 50)
    for name, got, wanted in zip(Found._fields, found, expected, strict=True):
        assert torch.equal(got, wanted), name


def test_scores_are_those_of_attention_over_slots(store):
    slots, queries = made(400, 4), torch.randn(5, HEADS, DIM)
    cursor = store.append(slots)
    for exact in (True, False):
        found, expected = store.search(queries, 7, cursor, exact=exact), brute(slots, queries, 7)
        assert torch.equal(found.number, expected.number)
        torch.testing.assert_close(found.score, expected.score, rtol=1e-6, atol=1e-5)


def test_fewer_slots_than_asked_for(store):
    queries = torch.randn(3, HEADS, DIM)
    slots = made(4, 5)._replace(mass=torch.tensor([[1.0, 0], [2, 0], [3, 1], [0, 0]]))
    cursor = store.append(slots)
    for exact in (True, False):
        found = store.search(queries, 6, cursor, exact=exact)
        assert found.number[:, 0].sort(dim=1).values.tolist() == [[-1, -1, -1, 0, 1, 2]] * 3
        assert found.number[:, 1].tolist() == [[2, -1, -1, -1, -1, -1]] * 3
        assert (found.score == -torch.inf).equal(found.number < 0)
        assert not found.keys[found.number < 0].any() and not found.values[found.number < 0].any()
        assert (store.search(queries, 2, START, exact=exact).number == -1).all()
        assert store.search(queries[:0], 2, cursor, exact=exact).keys.shape == (0, HEADS, 2, DIM)


def test_index_finds_nearly_all_and_later_queries_do_not_help_earlier_ones(tmp_path):
    """Recall at 10 of 20,000 clustered unit keys, queries at temperature 1/5, from 8 of the index's 19 partitions: at
    least 0.95 (seven seeds gave 0.989 to 1)."""
    chance, dim, count = torch.Generator().manual_seed(6), 32, 20_000
    centres = torch.randn(100, dim, generator=chance)
    near = centres[torch.randint(100, (count,), generator=chance)] + torch.randn(count, dim, generator=chance) / 2
    keys = torch.nn.functional.normalize(near, dim=1)[:, None]
    slots = made(count, 6, dim=dim, heads=1)
    slots = slots._replace(keys=keys, mass=torch.rand(count, 1, generator=chance) * 63 + 1)
    asked = torch.randint(count, (100,), generator=chance)
    queries = near[asked] + torch.randn(100, dim, generator=chance) / 2
    queries = 5 * torch.nn.functional.normalize(queries, dim=1)[:, None]
    with PersistentMemory.open(tmp_path, dim=dim, heads=1) as store:
        cursor = START
        for part in zip(*(t.split(5000) for t in slots), strict=True):
            cursor = store.append(Slots(*part), cursor)
        store.index()
        found = store.search(queries, 10, cursor, nprobes=8)
        expected = store.search(queries, 10, cursor, exact=True)
        hit = (found.number[..., :, None] == expected.number[..., None, :]).any(-1)
        assert hit.float().mean() >= 0.95
        alone = store.search(queries[:1], 10, cursor, nprobes=8)
        assert all(torch.equal(a, b[:1]) for a, b in zip(alone, found, strict=True))
        fewer = store.search(queries, 10, cursor, nprobes=1, refine=1)
        assert not torch.equal(fewer.number, expected.number), "one partition held all: the index was not used"
        # What is appended later is found at once, and after the index has been brought up to date.
        best = Slots(*(t[:1] for t in slots))._replace(keys=queries[:1] * 2, mass=torch.tensor([[50.0]]))
        longer = store.append(best, cursor)
        for _ in range(2):
            assert store.search(queries[:1], 1, longer).number.item() == count
            assert store.search(queries[:1], 10, cursor, nprobes=8).number.equal(alone.number)
            store.index()


def test_a_narrow_view_of_a_large_index_is_still_full(store):
    """Partitions beyond `nprobes` are read while a view has slots in them that are wanted."""
    few = store.append(made(30, 1))
    store.append(made(6000, 2))
    store.index()
    number = store.search(torch.randn(4, HEADS, DIM), 30, few, nprobes=1).number
    assert ((number >= 0).sum(2) == (made(30, 1).mass > 0).sum(0)).all()


def test_index_joins_what_many_appends_left(store):
    cursor, parts = START, [made(40, seed) for seed in range(60)]
    for part in parts:
        cursor = store.append(part, cursor)
    before = sum(1 for _ in Path(store.address).rglob("*.lance") if _.is_file())
    store.index(keep=timedelta(seconds=0.001))
    time.sleep(0.01)
    store.index(keep=timedelta(seconds=0.001))
    assert sum(1 for _ in Path(store.address).rglob("*.lance") if _.is_file()) < before / 10
    assert_same(whole(store, cursor), joined(*parts))
    numbers = 2400 * (HEADS * (2 * DIM + 1) * 4 + HEADS * 8 + 8)
    assert numbers <= store.bytes() <= 2 * numbers


WRITER = """
import sys
from hmlab.stores.persistent import Cursor, PersistentMemory
from test_stores import DIM, HEADS, made
address, branch, watermark, seed = sys.argv[1], *map(int, sys.argv[2:])
cursor = Cursor(branch, watermark)
with PersistentMemory.open(address, dim=DIM, heads=HEADS) as store:
    while True:
        cursor = store.append(made(1 + seed * 37 % 90, seed), cursor)
        print(*cursor, seed, flush=True)
        seed += 1
        if seed % 5 == 0:
            store.index()
"""


def writer(address: Path, cursor: Cursor, seed: int) -> subprocess.Popen:
    """A process that appends for ever, and says so after each time."""
    command = [sys.executable, "-c", WRITER, str(address), *map(str, cursor), str(seed)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_of_writes(tmp_path):
    """After each kill, all that was acknowledged is there; the next process goes on from there."""
    address, chance = tmp_path / "slots", random.Random(0)
    cursor, parts = START, []
    for _ in range(KILLS):
        process = writer(address, cursor, len(parts))
        lines = [process.stdout.readline() for _ in range(chance.randrange(4, 14))]
        time.sleep(chance.uniform(0, 0.03))  # somewhere in an append, or in bringing the index up to date
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        lines += [line for line in process.stdout if line.endswith("\n")]
        assert process.wait() == -signal.SIGKILL
        for line in lines:
            branch, watermark, seed = map(int, line.split())
            assert seed == len(parts)
            parts.append(made(1 + seed * 37 % 90, seed))
        cursor, expected = Cursor(branch, watermark), joined(*parts)
        with PersistentMemory.open(address, dim=DIM, heads=HEADS, create=False) as store:
            assert_same(whole(store, cursor), expected)
            queries = torch.randn(4, HEADS, DIM)
            assert store.search(queries, 9, cursor, exact=True).number.equal(brute(expected, queries, 9).number)


def test_readers_see_what_another_process_has_acknowledged(tmp_path):
    address = tmp_path / "slots"
    process, parts = writer(address, START, 0), []
    try:
        branch, watermark, seed = map(int, process.stdout.readline().split())
        with PersistentMemory.open(address, dim=DIM, heads=HEADS, create=False) as store:
            for _ in range(25):
                parts.append(made(1 + seed * 37 % 90, seed))
                cursor, expected = Cursor(branch, watermark), joined(*parts)
                assert_same(whole(store, cursor), expected)
                queries = torch.randn(3, HEADS, DIM)
                number = store.search(queries, 5, cursor, exact=True).number
                assert torch.equal(number, brute(expected, queries, 5).number)
                assert store.search(queries, 5, cursor).number.max() < watermark
                branch, watermark, seed = map(int, process.stdout.readline().split())
        assert process.poll() is None, "it should have been writing all the while"
    finally:
        process.kill()
        process.wait()


@pytest.mark.unchecked
def test_other_stores_are_refused_by_name(tmp_path):
    address = tmp_path / "slots"
    PersistentMemory.open(address, dim=DIM, heads=HEADS).close()
    for changed, told in (
        ({"dim": 16}, r"expected a store with dim 16, .*slots has dim 8$"),
        ({"heads": 3}, "expected a store with heads 3, .* has heads 2$"),
        ({"dim": 4, "heads": 1}, "expected a store with dim 4, heads 1, .* has dim 8, heads 2$"),
        ({"dtype": torch.float64}, "expected a store with dtype float64, .* has dtype float32$"),
    ):
        with pytest.raises(ValueError, match=told):
            PersistentMemory.open(address, **{"dim": DIM, "heads": HEADS, **changed})


@pytest.mark.unchecked
def test_other_formats_are_refused_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(layout, "FORMAT", 0)
        PersistentMemory.open(tmp_path / "older", dim=5, heads=HEADS).close()
    with pytest.raises(ValueError, match=r"expected a store with format 1, .*older has format 0$"):
        PersistentMemory.open(tmp_path / "older", dim=DIM, heads=HEADS)
    lancedb.connect(tmp_path / "other").create_table("slots", pa.table({"vector": [1.0]}))
    with pytest.raises(ValueError, match=r"expected a store of slots, .* holds another table"):
        PersistentMemory.open(tmp_path / "other", dim=DIM, heads=HEADS)


def test_nothing_is_made_where_nothing_should_be(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(FileNotFoundError, match=f"no store at .*{name}"):
            PersistentMemory.open(tmp_path / name, dim=DIM, heads=HEADS, create=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_other_addresses_are_lancedbs(tmp_path):
    with PersistentMemory.open(f"file://{tmp_path}/slots", dim=DIM, heads=HEADS) as store:
        cursor = store.append(made(5))
    with PersistentMemory.open(tmp_path / "slots", dim=DIM, heads=HEADS, create=False) as store:
        assert_same(whole(store, cursor), made(5))


@pytest.mark.unchecked
def test_bad_arguments_are_named(store):
    slots = made(3)
    cursor = store.append(slots)
    nan, infinite = torch.full_like(slots.keys, torch.nan), torch.full_like(slots.mass, torch.inf)
    for field, value, told in (
        ("keys", slots.keys[..., :5], r"slots.keys: expected \[3, 2, 8\], got \[3, 2, 5\]"),
        ("keys", slots.keys.double(), "slots.keys: expected floats no wider than torch.float32"),
        ("values", nan, "slots.values: expected finite"),
        ("mass", infinite, "slots.mass: expected finite"),
        ("mass", -slots.mass - 1, "slots.mass: expected at least 0"),
        ("position", slots.position[:, :1], r"slots.position: expected \[3, 2\]"),
        ("segment", slots.segment.float(), "slots.segment: expected integers"),
    ):
        with pytest.raises(ValueError, match=told):
            store.append(slots._replace(**{field: value}), cursor)
    assert len(store) == 3
    queries = torch.randn(2, HEADS, DIM)
    for call, told in (
        (lambda: store.search(queries[..., :3], 1, cursor), "queries: expected floats"),
        (lambda: store.search(queries, 0, cursor), "k: expected at least 1, got 0"),
        (lambda: store.search(queries, 1, cursor, nprobes=0), "nprobes: expected at least 1"),
        (lambda: store.read(torch.tensor([3]), cursor), "number: expected 0 to 2, got 3 to 3"),
        (lambda: store.search(queries, 1, Cursor(cursor.branch, 4)), "cursor: expected a watermark of at most 3"),
        (lambda: store.append(slots, Cursor(77, 1)), "cursor: expected a branch of the store .* got 77"),
        (lambda: store.append(slots, Cursor(0, 1)), "cursor: expected watermark 0 in branch 0"),
        (lambda: PersistentMemory.open(store.address, dim=0, heads=1), "dim: expected at least 1, got 0"),
        (lambda: PersistentMemory.open("x", dim=1, heads=1, dtype=torch.float16), "dtype: expected one of"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        len(store)
