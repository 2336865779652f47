"""Hash families: laws of collision against simulation, codes against what defines them, buckets against their bounds.

Simulated frequencies are held against the closed form by an exact binomial test: it fails where the law would give so
extreme a count with probability below LEVEL. There are fewer than 200 such tests, so chance alone would fail one
with probability below 2 %, and the seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch
from hmlab_kernels.bucket_lookup import bucket_lookup
from hmlab_kernels.bucket_lookup import buckets as sorted_buckets
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from hmlab.hashing import (
    NOWHERE,
    PCA,
    RandomProjection,
    Reduced,
    balance,
    buckets,
    code_churn,
    cross_polytope,
    decorrelation,
    distinct,
    enough_probes,
    hyperplane,
    kept,
    learned,
    minhash,
    mixture,
    p_stable,
    recall_curve,
    reduction,
    retrieval_loss,
    tree,
)

LEVEL = 1e-4
TABLES = 4000
DIM = 12
ANGLES = (0.0, 0.1, 0.4, 0.8, 1.3, 2.2)
DISTANCES = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
JACCARDS = (0.0, 0.25, 0.5, 0.8, 0.95, 1.0)


def _at_angle(angle: float, count: int = 1, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and as many at that angle from them [1, count, 1, dim]."""
    basis = torch.linalg.qr(torch.randn(count, dim, 2, dtype=torch.float64)).Q
    x, across = basis.unbind(-1)
    y = math.cos(angle) * x + math.sin(angle) * across
    return tuple(v[None, :, None].float() for v in (x, y))


def _at_distance(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = _at_angle(0.0)
    return x, x + distance * _at_angle(0.0)[0]


def _sets(jaccard: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two runs of consecutive ids, the hard case for weak hashing, in 40 different ids [1, 1, length]."""
    shared = round(40 * jaccard)
    only = (40 - shared) // 2
    a, b = torch.arange(only + shared), torch.arange(only, 2 * only + shared)
    assert len(set(a.tolist()) & set(b.tolist())) / len(set(a.tolist()) | set(b.tolist())) == jaccard
    return a[None, None], b[None, None]


# Every table is a draw of its own, so one pair of items is enough.
BY_TABLES = {
    "hyperplane": (hyperplane.Config(dim=DIM, tables=TABLES, bits=3), _at_angle, ANGLES),
    "learned before training": (learned.Config(dim=DIM, tables=TABLES, bits=3), _at_angle, ANGLES),
    "cross_polytope": (cross_polytope.Config(dim=DIM, tables=TABLES, rows=16), _at_angle, ANGLES),
    "two cross_polytopes": (cross_polytope.Config(dim=DIM, tables=TABLES, rows=4, bits=2), _at_angle, ANGLES),
    "p_stable": (p_stable.Config(dim=DIM, tables=TABLES, bits=2, width=1.5), _at_distance, DISTANCES),
    "minhash": (minhash.Config(tables=TABLES, bits=2), _sets, JACCARDS),
}
CASES = [(name, value) for name, (_, _, values) in BY_TABLES.items() for value in values]


def _agrees(name: str, value: float) -> tuple[torch.nn.Module, torch.Tensor]:
    config, pair, _ = BY_TABLES[name]
    family = config.build()
    x, y = pair(value)
    return family, (family.codes(x) == family.codes(y)).flatten()


def _follows(agree: torch.Tensor, probability: torch.Tensor) -> bool:
    return stats.binomtest(int(agree.sum()), agree.numel(), float(probability)).pvalue > LEVEL


@pytest.mark.parametrize(("name", "value"), CASES)
def test_codes_agree_as_often_as_the_law_says(name, value):
    family, agree = _agrees(name, value)
    similarity = torch.tensor(value, dtype=torch.float64)
    probability = family.collision_probability(similarity)
    assert _follows(agree, probability), (agree.float().mean(), probability)
    found = agree.view(-1, 5).any(1)
    assert _follows(found, family.recall(similarity, tables=5)), (found.float().mean(), family.recall(similarity, 5))


@pytest.mark.parametrize("name", BY_TABLES)
def test_the_simulation_tells_a_wrong_law(name):
    family, agree = _agrees(name, BY_TABLES[name][2][2])
    similarity = torch.tensor(BY_TABLES[name][2][2], dtype=torch.float64)
    assert not _follows(agree, family.recall(similarity, tables=1, bits=family.bits + 1))
    assert not _follows(agree, family.recall(similarity * 1.15, tables=1))


def _gaussian_pair(angle: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, z = torch.randn(2, 1, count, 1, DIM)
    return x, math.cos(angle) * x + math.sin(angle) * z


@pytest.mark.parametrize("angle", ANGLES)
def test_a_tree_of_gaussian_vectors_follows_the_law_of_hyperplanes(angle):
    family = tree.Config(dim=DIM, tables=1, bits=4).build().fit(torch.randn(1, 1 << 16, 1, DIM))
    x, y = _gaussian_pair(angle, TABLES)
    agree = family.codes(x) == family.codes(y)
    assert _follows(agree, family.collision_probability(torch.tensor(angle)))


@pytest.mark.parametrize("seed", range(6))
def test_sampled_components_agree_as_often_as_responsibilities_overlap(seed):
    torch.manual_seed(seed)
    family = mixture.Config(dim=3, components=5).build()
    x, y = torch.randn(2, 1, 1, 1, 3)
    overlap = (family.responsibilities(x) * family.responsibilities(y)).sum().detach()
    draws = [family.sampled_codes(v.expand(1, TABLES, 1, 3)) for v in (x, y)]
    assert _follows(draws[0] == draws[1], family.collision_probability(overlap))
    shares = torch.bincount(draws[0].flatten(), minlength=5)
    for share, probability in zip(shares, family.responsibilities(x).flatten().tolist(), strict=True):
        assert stats.binomtest(int(share), TABLES, probability).pvalue > LEVEL


@pytest.mark.parametrize(("make", "pair", "value"), [
    *((hyperplane.Config, _at_angle, value) for value in ANGLES),
    *((p_stable.Config, _at_distance, value) for value in DISTANCES),
])  # fmt: skip
def test_a_family_of_reduced_vectors_follows_the_averaged_law(make, pair, value):
    x, y = pair(value)
    # Every head is a draw of its own.
    project = reduction.RandomProjectionConfig(dim=DIM, heads=TABLES, reduced=5).build()
    family = Reduced(project, make(dim=5, heads=TABLES, tables=3, bits=4).build())
    codes = [family.codes(v.expand(1, 1, TABLES, DIM)) for v in (x, y)]
    agree, similarity = (codes[0] == codes[1])[0, 0, :, :, 0], torch.tensor(value, dtype=torch.float64)
    assert _follows(agree[:, 0], family.collision_probability(similarity))
    assert _follows(agree.any(1), family.recall(similarity))
    if value == 0.4:  # the law of the unreduced vectors is another
        assert not _follows(agree.any(1), family.family.recall(similarity))


@pytest.mark.parametrize("reduced", [2, 3, 6, 50, 500])
def test_reduced_similarities_have_the_moments_known_of_them(reduced):
    project = reduction.RandomProjectionConfig(dim=4, reduced=reduced).build()
    angle = torch.tensor([0.01, 0.3, 1.0, 2.0, 3.0], dtype=torch.float64)
    value, probability = project.spread(angle, "angle")
    # One hyperplane through projected vectors is one through the vectors, so angles are kept in the mean.
    torch.testing.assert_close((value * probability).sum(-1), angle, rtol=1e-5, atol=0)
    value, probability = project.spread(torch.tensor(3.0, dtype=torch.float64), "distance")
    torch.testing.assert_close((value**2 * probability).sum(), torch.tensor(9.0, dtype=torch.float64))
    chi = stats.chi(reduced).mean() * 3 / math.sqrt(reduced)
    assert float((value * probability).sum()) == pytest.approx(chi, rel=1e-9)


def test_the_law_of_p_stable_hashing_is_its_defining_integral():
    family = p_stable.Config(dim=2, bits=1, width=0.7).build()
    for distance in (0.05, 0.4, 1.0, 6.0):
        density = stats.halfnorm(scale=distance).pdf
        expected = integrate.quad(lambda t, f=density: f(t) * (1 - t / 0.7), 0, 0.7)[0]
        got = family.collision_probability(torch.tensor(distance, dtype=torch.float64))
        assert float(got) == pytest.approx(expected, rel=1e-9)


def test_the_law_of_cross_polytopes_where_it_is_known():
    angle = torch.tensor([0.0, 0.01, 0.3, 1.0, 2.0, math.pi], dtype=torch.float64)
    one = cross_polytope.Config(dim=2, rows=1).build().collision_probability(angle)
    torch.testing.assert_close(one, 1 - angle / math.pi, rtol=0, atol=1e-6)
    right = torch.tensor([math.pi / 2], dtype=torch.float64)
    for rows in (2, 16, 256):
        law = cross_polytope.Config(dim=2, rows=rows).build().collision_probability
        # At a right angle the hashes are independent, each uniform over the vertices.
        torch.testing.assert_close(law(right), torch.tensor([0.5 / rows], dtype=torch.float64), rtol=1e-6, atol=0)
        torch.testing.assert_close(law(angle[[0, -1]]), torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0,
                                   atol=1e-6)  # fmt: skip
        assert (law(angle).diff() < 0).all()


def test_recall_of_many_tables_keeps_small_probabilities():
    family = hyperplane.Config(dim=4, bits=30).build()
    p = (1 - 1.5 / math.pi) ** 30
    assert float(family.recall(torch.tensor(1.5, dtype=torch.float64), tables=2)) == pytest.approx(2 * p, rel=1e-6)


# Probes


@pytest.mark.parametrize(("config", "pair", "value"), [
    *((hyperplane.Config(dim=DIM, tables=TABLES, bits=4), _at_angle, value) for value in (0.2, 0.6, 1.2, 2.0)),
    *((p_stable.Config(dim=DIM, tables=TABLES, bits=3), _at_distance, value) for value in (0.1, 0.4, 1.0, 2.0)),
])  # fmt: skip
def test_probes_find_as_often_as_margins_say(config, pair, value):
    """Hits are independent given the margins, so their number is within 4.5 standard deviations (p < 1e-5)."""
    family = config.build()
    x, y = pair(value)
    probability = family.probe_probability(x, value, probes=5).flatten(0, 2)[0].double()
    hit = (family.codes(x, probes=5) == family.codes(y)).flatten(0, 2)[0]
    for probe in range(5):
        p, h = probability[:, probe], hit[:, probe]
        for half in (p > p.median(), p <= p.median()):  # calibrated, not only right on average
            deviation = (p[half] * (1 - p[half])).sum().sqrt()
            assert (h[half].sum() - p[half].sum()).abs() < 4.5 * deviation, (probe, h.float().mean(), p.mean())
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


@pytest.mark.parametrize("family", [
    hyperplane.Config(dim=DIM, tables=3, bits=6).build(),
    learned.Config(dim=DIM, tables=3, bits=6).build(),
    cross_polytope.Config(dim=DIM, tables=3, bits=3, rows=4).build(),
    p_stable.Config(dim=DIM, tables=3, bits=4).build(),
    tree.Config(dim=DIM, tables=3, bits=6).build(),
    mixture.Config(dim=DIM, tables=3, components=9).build(),
    Reduced(RandomProjection(reduction.RandomProjectionConfig(dim=DIM, reduced=5)),
            hyperplane.Config(dim=5, tables=3, bits=6).build()),
    Reduced(PCA(reduction.PCAConfig(dim=DIM, reduced=5)), p_stable.Config(dim=5, tables=3, bits=6).build()),
], ids=lambda family: type(getattr(family, "family", family)).__name__)  # fmt: skip
def test_probes_are_distinct_codes_that_begin_with_the_code(family):
    x = torch.randn(2, 7, 2, DIM)
    codes = family.codes(x, probes=7)
    assert codes.shape == (2, 7, 2, 3, 7) and codes.dtype == torch.int32 and codes.min() >= 0
    assert torch.equal(codes[..., :1], family.codes(x))
    ranked = codes.sort(-1).values
    assert (ranked[..., 1:] > ranked[..., :-1]).all()
    for dtype in (torch.float64, torch.bfloat16):
        same = (family.codes(x.to(dtype), probes=7) == codes).float().mean()
        assert same > (0.99 if dtype == torch.float64 else 0.3)
    restored = type(family).__new__(type(family))
    restored.__dict__ = {**family.__dict__}
    assert torch.equal(restored.codes(x[:, ::2], probes=7), codes[:, ::2])


def test_cross_polytope_digits_and_their_probes_by_hand():
    family = cross_polytope.Config(dim=3, tables=1, rows=3, bits=2).build()
    family.weight.copy_(torch.stack((torch.eye(3), torch.eye(3)[[1, 2, 0]]))[None])
    x = torch.tensor([3.0, -2.5, 1.0]).view(1, 1, 1, 3)
    # Coordinates (3, -2.5, 1) and (-2.5, 1, 3): digits 0 and 2; seconds are 1 + 3 and 0 + 3, of equal gap.
    assert family.codes(x, probes=5).flatten().tolist() == [12, 4 + 12, 0 + 18, 2 + 12, 0 + 6]


def test_p_stable_probes_cross_the_nearest_walls():
    family = p_stable.Config(dim=2, tables=1, bits=2, width=2.0).build()
    family.weight.copy_(torch.eye(2).view(1, 1, 2, 2))
    family.shift.zero_()

    def code(*cells):
        middle = torch.tensor(cells, dtype=torch.float32) * 2 + 1
        return family.codes(middle.view(1, 1, 1, 2)).item()

    x = torch.tensor([-0.2, 4.7]).view(1, 1, 1, 2)  # cells -1 and 2, 0.9 and 0.35 into them
    expected = [code(-1, 2), code(0, 2), code(-1, 1), code(-1, 3), code(-2, 2)]
    assert family.codes(x, probes=5).flatten().tolist() == expected


def test_probes_named_before_go_to_the_end():
    codes = torch.tensor([[3, 3, 1, 3, 0, 1], [5, 4, 3, 2, 1, 0]])
    assert distinct(codes).tolist() == [[3, 1, 0, 3, 3, 1], [5, 4, 3, 2, 1, 0]]


# MinHash


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 50257), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_minhash_sees_a_set(ids, random):
    torch.manual_seed(1)
    family = minhash.Config(tables=3, bits=2).build()
    again = [*ids, *random.choices(ids, k=4)]
    random.shuffle(again)
    padded = torch.tensor([[[*again, 7, 9]]])
    valid = torch.arange(len(again) + 2) < len(again)
    first = family.codes(torch.tensor([[ids]]), probes=3)
    assert first.shape == (1, 1, 1, 3, 3) and first.dtype == torch.int32
    assert torch.equal(first, family.codes(padded, valid[None, None], probes=3))
    assert (family.codes(padded, torch.zeros_like(padded, dtype=torch.bool)) == -1).all()


def test_minhash_finds_a_set_without_the_least_element_by_its_probe():
    family = minhash.Config(tables=50, bits=1).build()
    a = torch.arange(20)[None, None]
    codes = family.codes(a, probes=2)[0, 0, 0]
    hits = 0
    for gone in range(20):
        rest = family.codes(a[a != gone].view(1, 1, -1))[0, 0, 0]
        assert (rest == codes).any(-1).all()
        hits += int((rest == codes)[:, 1].sum())
    assert hits == 50  # every table's least element was left out once


# Trees


def test_leaves_are_balanced_and_codes_are_paths():
    x = torch.randn(3, 111, 2, DIM) ** 3 + 1
    for heads in (1, 2):
        family = tree.Config(dim=DIM, heads=heads, tables=3, bits=5).build().fit(x)
        codes = family.codes(x)[..., 0]
        for per_tree in codes.flatten(0, 1).permute(2, 1, 0).flatten(2 if heads == 2 else 1).reshape(3 * heads, -1):
            load = torch.bincount(per_tree, minlength=32)
            assert len(load) == 32 and load.min() >= len(per_tree) // 32 and load.max() <= -(-len(per_tree) // 32)
    basis = family.direction.flatten(0, 1)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(5).expand(6, 5, 5), rtol=0, atol=1e-5)
    vector, n = x[1, 17, 1], 2
    path = 0
    for level in range(5):
        above = vector @ family.direction[1, n, level] > family.threshold[1, n, 2**level - 1 + path]
        path += 2**level * int(above)
    assert codes[1, 17, 1, n] == path


def test_tree_probes_go_on_beyond_the_wall():
    family = tree.Config(dim=2, tables=1, bits=2).build()
    family.direction.copy_(torch.eye(2).view(1, 1, 2, 2))
    family.threshold.copy_(torch.tensor([[[0.0, -1.0, 1.0]]]))
    x = torch.tensor([0.3, 0.0]).view(1, 1, 1, 2)
    # Right of 0, below 1: path 01. Left of 0 the second threshold is -1, and the vector lies above it: path 10.
    assert family.codes(x, probes=3).flatten().tolist() == [0b01, 0b10, 0b11]


def test_a_tree_takes_other_directions():
    x = torch.randn(1, 256, 1, 4) * torch.tensor([10.0, 5.0, 1.0, 0.1])
    pca = reduction.PCAConfig(dim=4, reduced=2).build()
    pca.fit(x)
    family = tree.Config(dim=4, tables=1, bits=2).build().fit(x, directions=pca.components[None])
    whole = Reduced(pca, tree.Config(dim=2, tables=1, bits=2).build())
    whole.family.fit(pca(x), directions=torch.eye(2).view(1, 1, 2, 2))
    assert torch.equal(family.codes(x), whole.codes(x))


# Learned projections


def test_straight_codes_are_signs_with_the_slope_of_soft_ones():
    family = learned.Config(dim=DIM, heads=2, tables=2, bits=3, temperature=0.5).build().double()
    x = torch.randn(2, 5, 2, DIM, dtype=torch.float64, requires_grad=True)
    soft, straight = family.soft_codes(x), family.soft_codes(x, straight=True)
    bits = family.codes(x)[..., :1] >> torch.arange(3) & 1
    torch.testing.assert_close(straight, 2.0 * bits - 1, check_dtype=False)
    assert torch.equal(soft > 0, straight > 0) and soft.abs().max() < 1
    upstream = torch.randn_like(soft)
    inputs = [x, *family.parameters()]
    to_soft, to_straight = (torch.autograd.grad(c, inputs, upstream, retain_graph=True) for c in (soft, straight))
    for a, b in zip(to_soft, to_straight, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(family.soft_codes, (x,))


def test_the_retrieval_loss_is_the_cross_entropy_of_what_tables_find():
    query, slots = torch.randn(2, 4, 1, 3, 5).tanh(), torch.randn(2, 6, 1, 3, 5).tanh()
    attention = torch.rand(2, 4, 1, 6)
    visible = torch.rand(2, 4, 6) > 0.3
    visible[0, 0] = False
    attention = attention * visible[:, :, None]
    expected = 0.0
    for b in range(2):
        for t in range(4):
            seen = [j for j in range(6) if visible[b, t, j]]
            odds = [sum(math.exp(0.7 * float(query[b, t, 0, n] @ slots[b, j, 0, n])) for n in range(3)) for j in seen]
            expected -= sum(float(attention[b, t, 0, j]) * math.log(o / sum(odds))
                            for j, o in zip(seen, odds, strict=True))  # fmt: skip
    loss = retrieval_loss(query, slots, attention, visible=visible, scale=0.7)
    assert float(loss) == pytest.approx(expected / float(attention.sum()), rel=1e-5)
    # Slots that no query sees change nothing.
    unseen, poisoned = visible.clone(), slots.clone()
    unseen[:, :, 2], poisoned[:, 2] = False, 1.0
    mass = attention * unseen[:, :, None]
    assert retrieval_loss(query, slots, mass, visible=unseen) == retrieval_loss(query, poisoned, mass, visible=unseen)
    assert retrieval_loss(query, slots, attention * 0, visible=visible) == 0


def test_regularisers_at_their_ends():
    constant = torch.ones(8, 1, 2, 3)
    even = torch.stack([torch.tensor([1.0, -1.0])[(torch.arange(8) >> i) & 1] for i in range(3)], -1)[:, None, None]
    assert balance(constant) == 1 and decorrelation(constant) == 1
    assert balance(even) == 0 and decorrelation(even) == 0
    assert decorrelation(even[..., [0, 0, 1]]) == pytest.approx(1 / 3)


def test_training_raises_recall_and_churn_counts_what_changed():
    """Keys on a few coarse directions plus noise that only other coordinates hold: random planes waste bits on it."""
    signal = torch.randn(1, 256, 1, 4)
    noise = torch.randn(2, 1, 256, 1, 20) * 1.5
    keys, queries = (torch.cat((signal, n), -1) for n in noise)
    own = torch.eye(256)[None, :, None]
    family = learned.Config(dim=24, tables=2, bits=6).build()
    before, hit_before = family.codes(keys), (family.codes(queries) == family.codes(keys)).float().mean()
    optimiser = torch.optim.Adam(family.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        query, slot = family.soft_codes(queries), family.soft_codes(keys)
        loss = retrieval_loss(query, slot, own) + balance(slot) + decorrelation(slot)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = family.codes(keys)
    assert losses[-1] < losses[0] - 0.5
    assert (family.codes(queries) == after).float().mean() > 3 * hit_before
    assert balance(family.soft_codes(keys, straight=True)) < 0.1
    assert code_churn(before, before) == 0 and code_churn(before, after) > 0.5
    assert code_churn(before, torch.where(torch.arange(2)[:, None] == 0, after + 64, before)) == 0.5


# Mixtures


def test_log_likelihood_and_responsibilities_against_scipy():
    family = mixture.Config(dim=3, heads=2, tables=2, components=4).build().double()
    for parameter in family.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    got, share = family.log_likelihood(x), family.responsibilities(x)
    for t in range(5):
        for h in range(2):
            for n in range(2):
                weight = family.logit[h, n].softmax(-1).detach().numpy()
                mean, spread = family.mean[h, n].detach(), (family.log_variance[h, n] / 2).exp().detach()
                density = weight * stats.norm(mean, spread).pdf(x[0, t, h].detach()).prod(-1)
                assert float(got[0, t, h, n]) == pytest.approx(math.log(density.sum()), rel=1e-9)
                np.testing.assert_allclose(share[0, t, h, n].detach(), density / density.sum(), rtol=1e-8)
                order = np.argsort(-density)
                assert family.codes(x, probes=4)[0, t, h, n].tolist() == order.tolist()
    assert torch.autograd.gradcheck(family.log_likelihood, (x,))


def test_expectation_maximisation_never_loses_likelihood_and_finds_clusters():
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 6.0]])
    which = torch.randint(3, (600,))
    x = (centres[which] + 0.3 * torch.randn(600, 2))[None, :, None].double()
    family = mixture.Config(dim=2, tables=2, components=3).build().double()
    best = max((float(family.fit(x)[-1]), seed) for seed in range(3) if torch.manual_seed(seed))
    torch.manual_seed(best[1])
    course = family.fit(x)
    assert (course.diff() > -1e-9).all() and course[-1] > course[0]
    likeliest = family.log_likelihood(x).mean((0, 1, 2)).argmax()
    found = family.mean[0, likeliest]
    assert torch.cdist(centres.double(), found).amin(1).max() < 0.1
    codes = family.codes(x)[0, :, 0, likeliest, 0]
    assert all(len(codes[which == c].unique()) == 1 for c in range(3))


# Principal components


def test_principal_components_against_singular_values():
    x = torch.randn(2, 60, 2, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    pca = reduction.PCAConfig(dim=5, reduced=2, heads=2).build().double()
    share = pca.fit(x)
    for head in range(2):
        centred = (x[:, :, head] - x[:, :, head].mean((0, 1))).flatten(0, 1)
        _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
        torch.testing.assert_close(share[head], singular**2 / (singular**2).sum())
        torch.testing.assert_close((pca.components[head] @ axes.mT).abs(), torch.eye(2, 5, dtype=torch.float64))
        torch.testing.assert_close(pca(x)[:, :, head].flatten(0, 1), centred @ pca.components[head].mT)
    assert (pca.components.gather(-1, pca.components.abs().argmax(-1, keepdim=True)) > 0).all()


# Adaptive buckets


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


# Measuring


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


# Errors


@pytest.mark.parametrize(("make", "argument"), [
    (lambda: hyperplane.Config(dim=4, bits=32), "bits"),
    (lambda: cross_polytope.Config(dim=4, rows=64, bits=5), "bits"),
    (lambda: cross_polytope.Config(dim=4, rows=257), "rows"),
    (lambda: p_stable.Config(dim=4, width=0.0), "width"),
    (lambda: learned.Config(dim=4, temperature=0.0), "temperature"),
    (lambda: tree.Config(dim=4, bits=5), "bits"),
    (lambda: mixture.Config(dim=4, least_variance=0.0), "least_variance"),
    (lambda: reduction.RandomProjectionConfig(dim=4, reduced=1), "reduced"),
    (lambda: reduction.PCAConfig(dim=4, reduced=5), "reduced"),
    (lambda: buckets.Config(most_load=3, least_load=4), "least_load"),
    (lambda: buckets.Config(bits=25), "bits"),
    (lambda: buckets.Config(decay=2.0), "decay"),
    (lambda: minhash.Config(tables=0), "tables"),
])  # fmt: skip
def test_bad_configurations_are_named(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        make()


@pytest.mark.unchecked
@pytest.mark.parametrize(("call", "argument"), [
    (lambda x: p_stable.Config(dim=5).build().codes(x), "x"),
    (lambda x: tree.Config(dim=4, heads=3, bits=2).build().codes(x), "x"),
    (lambda x: p_stable.Config(dim=4).build().codes(x, probes=18), "probes"),
    (lambda x: cross_polytope.Config(dim=4, rows=3, bits=2).build().codes(x, probes=6), "probes"),
    (lambda x: hyperplane.Config(dim=4).build().probe_probability(x, 0.1, probes=10), "probes"),
    (lambda x: hyperplane.Config(dim=4).build().collision_probability(x), "similarity"),
    (lambda x: hyperplane.Config(dim=4).build().recall(x.abs(), tables=0), "tables"),
    (lambda x: tree.Config(dim=4, bits=4).build().fit(x), "x"),
    (lambda x: tree.Config(dim=4, bits=2).build().fit(x, directions=x), "directions"),
    (lambda x: mixture.Config(dim=4).build().fit(x), "x"),
    (lambda x: reduction.PCAConfig(dim=3, reduced=2).build().fit(x), "x"),
    (lambda x: reduction.RandomProjectionConfig(dim=4, reduced=2).build().spread(x, "jaccard"), "kind"),
    (lambda x: Reduced(reduction.PCAConfig(dim=4, reduced=2).build(), hyperplane.Config(dim=4).build()), "family"),
    (lambda x: minhash.Config().build().codes(x), "tokens"),
    (lambda x: enough_probes(x, 0.0), "target"),
    (lambda x: recall_curve(hyperplane.Config(dim=4).build(), x, x, k=6, probes=[1], candidates=9), "k"),
    (lambda x: recall_curve(hyperplane.Config(dim=4).build(), x, x, k=1, probes=[], candidates=9), "probes"),
    (lambda x: recall_curve(hyperplane.Config(dim=4).build(), x, x, k=1, probes=[1], tables=[5], candidates=9),
     "tables"),
])  # fmt: skip
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        call(torch.randn(1, 5, 2, 4))
