"""What is special to hash codes: invariants of the codes, and that the comparison of codes catches what is wrong."""

import pytest
import torch
from hmlab_kernels import parity
from hmlab_kernels.hash_codes import IMPLEMENTATIONS, cases, eager, hash_codes, margins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ("hyperplane", "cross_polytope")
each_form = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def _inputs(heads=2, tables=3, bits=7, dim=20, time=19):
    x = torch.randn(2, time, heads, dim, device=DEVICE)
    return x, torch.randn(heads, tables, bits, dim, device=DEVICE)


def test_a_code_worked_out_by_hand():
    x = torch.tensor([3.0, -1.0, 0.5, -4.0], device=DEVICE).view(1, 1, 1, 4)
    axes = torch.eye(4, device=DEVICE).view(1, 1, 4, 4)
    assert hash_codes(x, axes, probes=5).flatten().tolist() == [0b0101, 0b0001, 0b0111, 0b0100, 0b1101]
    assert hash_codes(x, axes, probes=4, family="cross_polytope").flatten().tolist() == [3 + 4, 0, 1 + 4, 2]


@each_form
@each_family
def test_a_longer_vector_has_the_same_code(impl, family):
    x, weight = _inputs()
    codes = hash_codes(x, weight, family=family, impl=impl)
    assert torch.equal(codes, hash_codes(3 * x, weight, family=family, impl=impl))
    if family == "hyperplane":
        cut = torch.randn(2, 3, 7, device=DEVICE)
        assert torch.equal(
            hash_codes(x, weight, threshold=cut, impl=impl), hash_codes(4 * x, weight, threshold=cut, impl=impl)
        )
        unlike = hash_codes(4 * x, weight, threshold=cut, normalise=False, impl=impl)
        assert not torch.equal(unlike, hash_codes(x, weight, threshold=cut, normalise=False, impl=impl))


@each_form
@each_family
def test_probes_are_distinct_and_begin_with_the_code(impl, family):
    x, weight = _inputs()
    x[0, 0] = 0  # every margin is equal
    most = 8 if family == "hyperplane" else 7
    codes = hash_codes(x, weight, family=family, probes=most, impl=impl)
    assert torch.equal(codes[..., :1], hash_codes(x, weight, family=family, impl=impl))
    ranked = codes.sort(-1).values
    assert (ranked[..., 1:] > ranked[..., :-1]).all()
    assert ranked.min() >= 0 and ranked.max() < (2**7 if family == "hyperplane" else 14)


@each_form
def test_ties_go_to_the_lower_index(impl):
    x, weight = _inputs()
    zero = torch.zeros_like(x)
    hyperplane = hash_codes(zero, weight, probes=8, impl=impl)
    assert (hyperplane == torch.tensor([0, 1, 2, 4, 8, 16, 32, 64], device=DEVICE)).all()
    cross = hash_codes(zero, weight, family="cross_polytope", probes=7, impl=impl)
    assert (cross == torch.arange(7, device=DEVICE)).all()
    below = torch.full((1, 3, 7), -0.5, device=DEVICE)  # a zero vector stays zero when normalised
    assert (hash_codes(zero, weight, threshold=below, impl=impl) == 127).all()


@each_form
def test_shared_tables_are_the_same_tables_for_every_head(impl):
    x, weight = _inputs()
    cut = torch.randn(1, 3, 7, device=DEVICE)
    shared = hash_codes(x, weight[:1], threshold=cut, impl=impl)
    spread = hash_codes(x, weight[:1].expand(2, -1, -1, -1), threshold=cut.expand(2, -1, -1), impl=impl)
    assert torch.equal(shared, spread)


def test_margins_are_the_distances_by_which_probes_are_ordered():
    x, weight = _inputs()
    cut = torch.randn(1, 3, 7, device=DEVICE)
    margin = margins(x, weight, threshold=cut)
    unit = x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(margin, (torch.einsum("bthd,hnid->bthni", unit, weight) - cut).abs())
    codes = hash_codes(x, weight, threshold=cut, probes=2)
    assert torch.equal(codes[..., 0] ^ codes[..., 1], (1 << margin.argmin(-1)).int())
    x.requires_grad_()
    margins(x, weight, normalise=False).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert not hash_codes(x, weight).requires_grad


def test_nearby_vectors_share_more_codes_than_distant_ones():
    x, weight = _inputs(time=200)
    near, far = x + 0.1 * torch.randn_like(x), torch.randn_like(x)
    for family in FAMILIES:
        codes, close, apart = (hash_codes(y, weight, family=family) for y in (x, near, far))
        assert (codes == close).float().mean() > 2 * (codes == apart).float().mean()


def _case(family):
    return next(c for c in cases.CASES if c.name == ("every probe" if family == "hyperplane" else
                                                     "cross-polytope, every probe"))  # fmt: skip


@each_family
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_comparison_catches_wrong_codes(family, dtype):
    """Any wrong sign, swapped probes, repeated probe, unwritten entry; and it lets nothing differ at wide margins."""
    inputs = _case(family).make(parity.Draw(dtype, DEVICE))
    right = hash_codes(**inputs, impl="reference")
    assert not cases.unexplained("out", right, right, inputs).any()
    other = right[..., 0].clone()
    wrong = {
        "unwritten": torch.full_like(right, torch.iinfo(torch.int32).max),
        "negative": right - 2**31,
        "repeated": right[..., :1].expand_as(right).contiguous(),
        "swapped": right[..., [0, *range(2, right.shape[-1]), 1]],
        "sign": torch.cat([(other ^ 1 if family == "hyperplane" else (other + 5) % 10)[..., None], right[..., 1:]], -1),
    }
    for name, codes in wrong.items():
        found = cases.unexplained("out", codes, right, inputs)
        differing = codes != right
        assert found[differing].float().mean() > 0.9, name
        assert not found[~differing].any(), name


@pytest.mark.parametrize("mistake", ("threshold", "norm", "head"))
def test_parity_catches_a_wrong_implementation(monkeypatch, mistake):
    plain = eager.forward

    def wrong(x, weight, threshold, normalise, *rest):
        if mistake == "threshold":
            threshold = threshold * 1.05
        elif mistake == "norm":
            normalise = False
        else:
            weight = weight.flip(0)
        return plain(x, weight, threshold, normalise, *rest)

    case = _case("hyperplane")
    assert [d.first for d in parity.compare("hash_codes", case, "eager", device=DEVICE)] == [None]
    monkeypatch.setattr(eager, "forward", wrong)
    assert parity.compare("hash_codes", case, "eager", device=DEVICE)[0].first is not None


def test_the_comparison_forgives_only_rounding():
    axes = torch.eye(2, device=DEVICE).view(1, 1, 2, 2)
    for small, forgiven in ((1e-9, True), (1e-3, False)):
        inputs = {"x": torch.tensor([1.0, small], device=DEVICE).view(1, 1, 1, 2), "weight": axes,
                  "threshold": torch.tensor([0.0, 1e-9], device=DEVICE).view(1, 1, 2)}  # fmt: skip
        right = hash_codes(**inputs, impl="reference")
        assert bool(cases.unexplained("out", right ^ 2, right, inputs).any()) != forgiven


@pytest.mark.unchecked
@pytest.mark.parametrize("changed, message", (
    ({"x": torch.zeros(2, 3, 4)}, r"x: expected \[batch, time, heads, dim\] of floats, got torch.float32 of shape"),
    ({"x": torch.zeros(1, 3, 2, 4, dtype=torch.int64)}, "x: expected .* got torch.int64"),
    ({"x": torch.zeros(1, 3, 2, 0), "weight": torch.zeros(2, 1, 5, 0)}, "x: expected at least 1 head of"),
    ({"x": torch.zeros(1, 3, 0, 4), "weight": torch.zeros(1, 1, 5, 4)}, "x: expected at least 1 head of at least 1"),
    ({"weight": torch.zeros(2, 1, 5, 4).int()}, "weight: expected x's dtype torch.float32, got torch.int32"),
    ({"threshold": torch.zeros(2, 1, 5).int()}, "threshold: expected x's dtype torch.float32 or float32, got"),
    ({"probes": 1.0}, "probes: expected a whole number, got 1.0"),
    ({"weight": torch.zeros(3, 1, 5, 4)}, r"weight: expected \[2 or 1, tables, bits, 4\], got \[3, 1, 5, 4\]"),
    ({"weight": torch.zeros(2, 1, 5, 3)}, r"weight: expected \[2 or 1, tables, bits, 4\], got \[2, 1, 5, 3\]"),
    ({"weight": torch.zeros(2, 1, 5, 4).half()}, "weight: expected x's dtype torch.float32, got torch.float16"),
    ({"weight": torch.zeros(2, 1, 32, 4)}, "weight: hyperplane expected at least 1 table of 1 to 31 bits, got 1 of 32"),
    ({"weight": torch.zeros(2, 0, 5, 4)}, "weight: hyperplane expected at least 1 table of 1 to 31 bits, got 0 of 5"),
    ({"weight": torch.zeros(2, 1, 257, 4), "family": "cross_polytope"}, "weight: cross_polytope .* 1 to 256 bits"),
    ({"family": "simhash"}, r"family: expected one of \['hyperplane', 'cross_polytope'\], got 'simhash'"),
    ({"probes": 0}, "probes: hyperplane with 5 bits expected 1 to 6, got 0"),
    ({"probes": 7}, "probes: hyperplane with 5 bits expected 1 to 6, got 7"),
    ({"probes": 6, "family": "cross_polytope"}, "probes: cross_polytope with 5 bits expected 1 to 5, got 6"),
    ({"threshold": torch.zeros(2, 1, 4)}, r"threshold: expected \[2 or 1, 1, 5\], got \[2, 1, 4\]"),
    ({"threshold": torch.zeros(3, 1, 5)}, r"threshold: expected \[2 or 1, 1, 5\], got \[3, 1, 5\]"),
    ({"threshold": torch.zeros(2, 1, 5).half()}, "threshold: expected x's dtype torch.float32 or float32, got"),
    ({"threshold": torch.zeros(2, 1, 5), "family": "cross_polytope"}, "threshold: cross_polytope expected None"),
    ({"impl": "native"}, "impl: hash_codes expected one of"),
))  # fmt: skip
def test_what_is_wrong_is_named(changed, message):
    right = {"x": torch.zeros(1, 3, 2, 4), "weight": torch.zeros(2, 1, 5, 4)}
    with pytest.raises(ValueError, match=message):
        hash_codes(**right | changed)


@pytest.mark.unchecked
def test_margins_are_of_floats():
    with pytest.raises(ValueError, match=r"x: expected floats, got torch.int64"):
        margins(torch.zeros(1, 3, 2, 4, dtype=torch.int64), torch.zeros(2, 1, 5, 4))
