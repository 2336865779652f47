"""What is special to each hash family: its codes by hand, by their invariants and against what others compute."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hmlab.hashing import (
    PCA,
    RandomProjection,
    Reduced,
    balance,
    buckets,
    code_churn,
    cross_polytope,
    decorrelation,
    enough_probes,
    hyperplane,
    learned,
    minhash,
    mixture,
    p_stable,
    recall_curve,
    reduction,
    retrieval_loss,
    tree,
)

DIM = 12


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
    restored = copy.deepcopy(family)
    for held in restored.state_dict().values():
        held.zero_()
    restored.load_state_dict(family.state_dict())
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
    one = family.codes(torch.tensor([[ids[:1]]]), probes=3)
    assert (one == one[..., :1]).all()


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
