"""Hash families: laws of collision against simulation, codes against what defines them, buckets against their bounds.

Simulated frequencies are held against the closed form by an exact binomial test: it fails where the law would give so
extreme a count with probability below LEVEL. There are fewer than 200 such tests, so chance alone would fail one
with probability below 2 %, and the seeds are fixed.
"""

import math

import pytest
import torch
from scipy import integrate, stats

from hmlab.hashing import (
    Reduced,
    cross_polytope,
    hyperplane,
    learned,
    minhash,
    mixture,
    p_stable,
    reduction,
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
