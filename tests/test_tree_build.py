"""Tree building beyond what every operator is asked: its stages, its layout, its shares of work, its errors."""

import pytest
import torch
from hmlab_kernels import implementations, parity
from hmlab_kernels.tree_build import STAGED, cases, tree_build, tree_levels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [impl for impl in implementations("tree_build") if impl != "native" or DEVICE == "cpu"]


def call(impl=None, **changes):
    given = cases.inputs(parity.Draw(torch.float32, DEVICE), 2, 13, 16, banks=2)
    return tree_build(**given | changes, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases.STAGED, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", [impl for impl in STAGED if impl != "reference"])
def test_stages_equal_the_reference(impl, case, dtype):
    outside = [d for d in parity.compare("tree_build", case, impl, dtype, DEVICE) if d.first is not None]
    assert not outside, outside


@pytest.mark.parametrize("impl", FORMS)
def test_sums_of_children(impl):
    """With weights that add its children up, a node is the sum of the leaves it spans."""
    leaves = torch.arange(2.0 * 22 * 3, device=DEVICE).view(2, 22, 3)
    taps = torch.eye(3, device=DEVICE).repeat(1, 2, 3, 1)
    nodes = tree_build(leaves, taps, torch.zeros(2, 3, device=DEVICE), arity=3, impl=impl)
    for i, level in enumerate(tree_levels(2, 22, banks=2, arity=3), 1):
        for row in range(2):
            for node in range(22 // 3**i):
                expected = leaves[row, node * 3**i : (node + 1) * 3**i].sum(0)
                for slot in range(2):
                    at = level.offset + row * level.batch + node * level.node + slot * level.slot
                    assert torch.equal(nodes[at], expected)
    assert at == len(nodes) - 1


@pytest.mark.parametrize("impl", [impl for impl in FORMS if impl != "reference"])
def test_positions_tell_what_equal_rows_need_not(impl):
    """A document in every row, named by its positions, gives the tree of equal rows."""
    given = cases.inputs(parity.Draw(torch.float32, DEVICE), 2, 27, 16, banks=2)
    position = torch.arange(1, 28, device=DEVICE).expand(2, -1)
    ragged = tree_build(**given, position=position, impl=impl)
    levels = tree_levels(2, 27, banks=2)
    # Where rows may differ there is room for one more node than 27 leaves complete.
    roomy = tree_levels(2, 27, banks=2, ragged=True)
    plain = tree_build(**given, impl=impl)
    for level, room in zip(levels, roomy, strict=True):
        for row in range(2):
            for slot in range(2):
                a = level.offset + row * level.batch + slot * level.slot
                b = room.offset + row * room.batch + slot * room.slot
                torch.testing.assert_close(ragged[b : b + level.batch], plain[a : a + level.batch])


@pytest.mark.parametrize("impl", [impl for impl in FORMS if impl in ("native", "fused")])
def test_gradients_of_weights_from_several_shares(impl, monkeypatch):
    """Long enough that the sum over nodes is split, several levels are tiled, and one tile is not the whole."""
    if impl == "fused":
        from hmlab_kernels.tree_build import fused

        monkeypatch.setattr(fused, "SHARE", 32)
    case = parity.Case("shares", lambda d: cases.inputs(d, 1, 150 if impl == "fused" else 1100, 16),
                       ("leaves", "taps", "bias"))  # fmt: skip
    outside = [d for d in parity.compare("tree_build", case, impl, torch.float32, DEVICE) if d.first is not None]
    assert not outside, outside


@pytest.mark.skipif(DEVICE != "cpu", reason="native runs on the CPU")
def test_native_is_the_same_bits_for_any_number_of_threads():
    found, threads = [], torch.get_num_threads()
    given = cases.inputs(parity.Draw(), 3, 900, 32, banks=2, kernel=3)
    weights = [given[name].requires_grad_() for name in ("leaves", "taps", "bias")]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            nodes = tree_build(**given, impl="native")
            found.append((nodes, *torch.autograd.grad(nodes.square().sum(), weights)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_stages_are_served_by_eager_and_refused_elsewhere():
    import hmlab_kernels

    norm = torch.ones(16, device=DEVICE)
    call(norm=norm)
    assert hmlab_kernels.used()["tree_build"] == "eager"
    for impl in ("native", "fused"):
        with pytest.raises(ValueError, match=r"impl: tree_build with deeper or norm expected one of \['eager', 'refer"):
            call(norm=norm, impl=impl)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leaves": torch.zeros(13, 16)}, "leaves: expected"),
        ({"arity": 1}, "arity: expected at least 2"),
        ({"kernel": 1}, "kernel: expected at least arity"),
        ({"taps": torch.zeros(1, 2, 33, 16)}, r"taps: expected \[taps, banks, 32 or banks times that, 16\]"),
        ({"bias": torch.zeros(3, 16)}, r"bias: expected \[2, 16\]"),
        ({"bias": torch.zeros(2, 16, dtype=torch.float64)}, "bias: expected leaves' dtype"),
        ({"norm": torch.zeros(15)}, r"norm: expected \[16\]"),
        ({"deeper": torch.zeros(2, 2, 16, 15)}, r"deeper: expected \[2, 2, 16, 16\]"),
        ({"position": torch.zeros(2, 12, dtype=torch.int64)}, r"position: expected \[2, 13\]"),
        ({"position": torch.zeros(2, 13)}, "position: expected integers"),
        ({"start": -1}, "start: expected at least 0"),
        ({"start": 4, "position": torch.zeros(2, 13, dtype=torch.int64)}, "start: expected at least 0, and 0 where"),
        ({"carried": torch.zeros(1, 1, 16)}, r"carried: expected \[2, nodes, 16\]"),
        ({"carried": torch.zeros(2, 2, 16)}, "carried: expected 1 nodes of each level"),
        ({"leaves": torch.zeros(2, 13, 16, dtype=torch.int64)}, "leaves: expected one of .*, got torch.int64"),
        ({"leaves": torch.zeros(2, 13, 16).to(torch.float8_e5m2)}, "leaves: expected one of .*, got torch.float8"),
        ({"leaves": torch.zeros(2, 13, 0)}, "leaves: expected a dim of at least 1"),
        ({"taps": torch.zeros(0, 2, 32, 16)}, "taps: expected"),
        ({"position": torch.zeros(2, 13, dtype=torch.bool)}, "position: expected integers"),
        ({"start": 2**62}, "start: expected at least 0"),
        ({"levels": -1}, "levels: expected at least 0, .* got -1"),
        ({"levels": 2.5}, "levels: expected a whole number, got 2.5"),
        ({"levels": 70}, "levels: expected .* spans of less than 2.63 leaves, got 70 levels of arity 2"),
        ({"levels": 70, "position": torch.ones(2, 13).long()}, "levels: expected .* got 70 levels of arity 2"),
        ({"impl": "fast"}, "impl: tree_build expected one of"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**{name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in changes.items()})


@pytest.mark.unchecked
@pytest.mark.parametrize("levels", [-1, 63])
def test_places_of_levels_that_cannot_be(levels):
    with pytest.raises(ValueError, match="levels: expected at least 0, and spans of less than"):
        tree_levels(1, 8, banks=1, levels=levels)


@pytest.mark.parametrize("impl", FORMS)
def test_as_many_levels_as_can_be(impl):
    """Levels that no document completes hold no node, whatever the type of the positions."""
    position = torch.arange(1, 14, device=DEVICE).expand(2, -1)
    few = call(impl, position=position.int())
    many = call(impl, position=position.int(), levels=62)
    assert torch.equal(many[: len(few)], few)
    assert len(many) == (last := tree_levels(2, 13, banks=2, levels=62, ragged=True)[-1]).offset + last.slots * 2


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA nothing waits for what positions say")
@pytest.mark.unchecked
@pytest.mark.parametrize("impl", FORMS)
def test_positions_that_no_document_has(impl):
    """More nodes of level 1 than there is room for, and of level 2 some that would have them as children."""
    position = torch.tensor([[2] * 9 + [4] * 4] * 2)
    with pytest.raises(ValueError, match="position: expected at most 7 nodes of level 1 in 13 tokens"):
        call(impl, position=position)
    with pytest.raises(ValueError, match=r"position: expected 0 to 2\^31 - 1, got -1"):
        call(impl, position=torch.arange(-1, 12).expand(2, -1))
