"""HARMONY's own promises: exact at ratio 1, every token in one place, bounded, and what the choices do."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hmlab import auxiliary, hashing
from hmlab import model as models
from hmlab.hashing import NOWHERE
from hmlab.information import DENSITIES
from hmlab.memories.harmony import Config, Hierarchy, HierarchyConfig, attribute, replay, retrieval_quality
from hmlab.memories.harmony.compression import Compressor
from hmlab.memories.harmony.retriever import elect
from hmlab.record import VOCABULARY, record
from hmlab.testing import check_memory

SMALL = {"dim": 16, "heads": 2, "window": 6, "segment": 4, "ratios": (1, 2, 4), "budget": 2.0, "capacity": 64,
         "picks": 3, "tables": 2, "bits": 3, "probes": 2, "candidates": 16, "sinks": 2, "query_block": 2,
         "table": 16, "bigram_table": 16}  # fmt: skip
FAMILIES = ("learned", "hyperplane", "cross_polytope", "p_stable", "mixture", "tree", "minhash")


def built(**fields):
    torch.manual_seed(0)
    return Config(**{**SMALL, **fields}).build().eval()


def inputs(time=41, batch=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, time, dim, generator=generator, dtype=dtype)
    return x, torch.randint(64, (batch, time), generator=generator)


def prove(**fields):
    """Later tokens change nothing, and neither does how the stream is cut; the whole contract is proven elsewhere."""
    check_memory(Config(**{**SMALL, "window": 4, **fields}), lengths=(0, 5, 23), only=["future", "step", "split"],
                 dtypes=[torch.float32])  # fmt: skip


def attention(memory, x):
    """Full causal attention with the same projections."""
    h = memory.hierarchy
    scale = memory.log_scale.exp().repeat_interleave(h.heads // h.kv_heads)
    q = F.normalize(memory.query(x).unflatten(-1, (h.heads, -1)), dim=-1) * scale[:, None]
    k, v = memory.key_value(x).unflatten(-1, (2, h.kv_heads, -1)).unbind(2)
    k = F.normalize(k, dim=-1)
    position = torch.arange(x.shape[1], dtype=torch.float64).expand(len(x), -1)[..., None]
    q, k = memory.rotate(q, position), memory.rotate(k, position)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    return memory.output(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fields", [
    {}, {"sinks": 0}, {"sinks": 5}, {"window": 1}, {"window": 7, "segment": 3}, {"kv_heads": 1},
    {"window": 64, "segment": 64}, {"codec": "landmarks", "sinks": 0},
    {"retrieval": "exact", "picks": 41, "sharing": "none"},
])  # fmt: skip
def test_ratio_1_with_all_slots_is_causal_attention(fields):
    memory = built(**{"ratios": (1,), "budget": 1.0, "retrieval": "all", **fields})
    x, tokens = inputs(130 if fields.get("segment") == 64 else 41)
    with torch.no_grad():
        y, _ = memory(x, tokens=tokens)
        assert (y - attention(memory, x)).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(window=st.integers(1, 20), segment=st.sampled_from([2, 4, 8]), sinks=st.integers(0, 9),
       ratio=st.sampled_from([1, 2]), time=st.integers(1, 64), cut=st.integers(0, 64))  # fmt: skip
def test_every_token_is_in_exactly_one_place(window, segment, sinks, ratio, time, cut):
    """With queries of zero every token weighs the same, so the mean of one-hot values counts where tokens are."""
    config = HierarchyConfig(window=window, segment=segment, sinks=sinks, ratios=tuple(sorted({ratio, segment})),
                             budget=float(ratio), retrieval="all", spread=False, densities=())  # fmt: skip
    torch.manual_seed(0)
    hierarchy = Hierarchy(config, heads=1, kv_heads=1, head_dim=time).eval()
    k, v = torch.randn(1, time, 1, time), torch.eye(time)[None, :, None]
    q, cut = torch.zeros_like(k), min(cut, time)
    state, parts = None, []
    with torch.no_grad():
        for part in (slice(0, cut), slice(cut, time)):
            out, state = hierarchy(q[:, part], k[:, part], v[:, part], state)
            parts.append(out)
    share = torch.cat(parts, 1)[0, :, 0]
    want = torch.ones(time, time).tril() / torch.arange(1, time + 1)[:, None]
    torch.testing.assert_close(share, want, atol=2e-6, rtol=0)


def test_the_oldest_slots_are_forgotten_and_the_state_stops_growing():
    memory = built(capacity=9, retrieval="all", ratios=(2,), budget=2.0)
    x, tokens = inputs(200)
    with torch.no_grad():
        y, whole = memory(x, tokens=tokens)
        state, bytes_at, parts = None, {}, []
        for t in range(0, 200, 10):
            part, state = memory(x[:, t : t + 10], state, tokens=tokens[:, t : t + 10])
            parts.append(part)
            bytes_at[t] = memory.state_bytes(state)
    assert bytes_at[190] == bytes_at[60] > bytes_at[0]
    assert (torch.cat(parts, 1) - y).abs().max() < 1e-5
    assert (state.slots + state.dropped).tolist() == [100, 100]
    assert torch.equal(whole.slot_segment, state.slot_segment)
    # What was forgotten is not read: the far past may change without a trace.
    with torch.no_grad():
        other, _ = memory(torch.cat((x[:, :2], -x[:, 2:100], x[:, 100:]), 1), tokens=tokens)
    assert (other[:, 150:] - y[:, 150:]).abs().max() < 1e-6
    assert (other[:, 110] - y[:, 110]).abs().max() > 1e-3


def test_all_candidates_and_all_picks_are_all_slots():
    x, tokens = inputs(60)
    with torch.no_grad():
        want = built(retrieval="all")(x, tokens=tokens)[0]
        for fields in ({"retrieval": "exact"}, {"sharing": "heads", "retrieval": "exact"},
                       {"bits": 1, "probes": 2, "candidates": 400}):  # one bit and its flip: every slot
            torch.manual_seed(0)
            memory = Config(**{**SMALL, "picks": 64, **fields}).build().eval()
            memory.load_state_dict(built(retrieval="all").state_dict(), strict=False)
            got = memory(x, tokens=tokens)[0]
            assert (got - want).abs().max() < 1e-5, fields


def test_a_block_reads_what_the_block_before_votes_for():
    memory = built(sharing="block", retrieval="exact", picks=2)
    x, tokens = inputs(41)
    with torch.no_grad(), record(memory, {"retrieval_index"}) as recording:
        memory(x, tokens=tokens)
        index = recording.dataset()["retrieval_index"].values[0]
    assert (index[:, 0:40:2] == index[:, 1:41:2]).all()
    assert (index[:, 20:] >= 0).all()
    x[:, 33] += 10  # inside the block of 32 and 33: it changes what the next block reads, not what its own does
    with torch.no_grad(), record(memory, {"retrieval_index"}) as recording:
        memory(x, tokens=tokens)
        other = recording.dataset()["retrieval_index"].values[0]
    assert (other[:, :34] == index[:, :34]).all()


def test_votes_are_counted_once_for_each_voter():
    index = torch.tensor([[3, 1, 3, -1, 2, 1, 3]])
    score = torch.tensor([[0.0, 1.0, 0.0, 99.0, 1.2, -torch.inf, 0.0]])
    # 3: log 3 = 1.10; 1: 1.0; 2: 1.2
    assert elect(index, score, 2).tolist() == [[2, 3]]
    assert elect(index, score, 5).tolist() == [[2, 3, 1, -1, -1]]


@pytest.mark.unchecked
@pytest.mark.parametrize("density", DENSITIES)
def test_no_density_looks_ahead(density):
    prove(densities=(density,), policy="density", retrieval="all")


@pytest.mark.unchecked
@pytest.mark.parametrize(("family", "sharing"), [
    *((family, "none") for family in FAMILIES),
    *((family, sharing) for family in ("learned", "minhash") for sharing in ("heads", "block")),
])  # fmt: skip
def test_no_family_looks_ahead(family, sharing):
    prove(family=family, sharing=sharing, kv_heads=1 if sharing == "heads" else None)


@pytest.mark.unchecked
@pytest.mark.parametrize("codec", ["mean_pool", "strided_convolution", "k_means", "landmarks"])
def test_other_codecs_keep_the_contract(codec):
    prove(codec=codec, sinks=0)


@pytest.mark.unchecked
def test_reduced_dimensions_and_no_phase():
    prove(reduced=4, phase=False, fallback=0.9)


def test_dense_segments_get_more_slots_by_the_density_policy():
    config = HierarchyConfig(segment=16, window=16, ratios=(1, 2, 4, 8, 16), budget=4.0, policy="density",
                             densities=("surprisal",), retrieval="all", table=64, sinks=0)  # fmt: skip
    hierarchy = Hierarchy(config, heads=1, kv_heads=1, head_dim=8).eval()
    generator = torch.Generator().manual_seed(0)
    segments = [torch.full((16,), 7) if n % 2 else torch.randint(64, (16,), generator=generator) for n in range(40)]
    tokens = torch.cat(segments)[None]
    q = torch.randn(1, tokens.shape[1], 1, 8, generator=generator)
    with torch.no_grad():
        _, state = hierarchy(q, q, q, tokens=tokens)
    number = torch.bincount(state.slot_segment[0], minlength=40)
    assert number[10::2].float().mean() > 2 * number[11::2].float().mean()


@pytest.mark.unchecked
@pytest.mark.parametrize("budget", [4.0, 8.0])
def test_the_learned_policy_meets_its_budget(budget):
    """Half of the segments repeat one token, and one slot says all of it: the others get what there is."""
    config = HierarchyConfig(segment=64, window=64, ratios=(2, 4, 8, 16, 32, 64), budget=budget, sinks=0, densities=())
    torch.manual_seed(0)
    compressor = Compressor(config, kv_heads=1, head_dim=8).train()
    optimizer = torch.optim.Adam(compressor.parameters(), 1e-2)
    beside = (torch.zeros(2, 8, dtype=torch.int64), torch.arange(8).expand(2, 8), compressor.init_statistics(2, "cpu"),
              torch.zeros(2, 2))  # fmt: skip
    whole, spent = torch.ones(2, 8, dtype=torch.bool), []
    for step in range(240):
        k = F.normalize(torch.randn(2, 8, 64, 1, 8), dim=-1)
        k[:, ::2] = k[:, ::2, :1]
        k = k.flatten(1, 2)
        with auxiliary.collect() as losses:
            compressor(k, k.roll(1, -1), None, whole, *beside)
        optimizer.zero_grad()
        losses["compression"].backward()
        optimizer.step()
        if step >= 120:
            with torch.no_grad():
                spent.append(compressor.eval()(k, k.roll(1, -1), None, whole, *beside).count.float())
            compressor.train()
    spent = torch.stack(spent).mean((0, 1))
    assert 64 / spent.mean() == pytest.approx(budget, rel=0.25)
    assert spent[1::2].mean() > 3 * spent[::2].mean()


def test_recorded_are_all_the_names_that_views_read():
    memory = built()
    x, tokens = inputs(80)
    with torch.no_grad(), record(memory) as recording:
        memory(x, tokens=tokens)
    seen = recording.dataset()
    names = {"density_bits", "ratio", "bucket", "retrieval_index", "retrieval_score", "confidence", "hit_share", "tier",
             "provenance"}  # fmt: skip
    assert names <= set(seen) and names <= set(VOCABULARY)
    share = seen["hit_share"].isel(layer=0)
    assert share.sum("tiers").values == pytest.approx(1, abs=1e-5)
    assert share.sel(tiers="slots").values[:, :9].max() == 0  # the first segment leaves the window at token 9
    assert share.sel(tiers="slots").values[:, 40:].max() > 0.01
    index, source = seen["retrieval_index"].values[0], seen["provenance"].values[0]
    assert ((index >= 0) == (source >= 0)).all()
    late = source[:, 60][source[:, 60] >= 0]
    assert len(late) and (late % 4 == 0).all() and (late + 4 <= (60 - 5) // 4 * 4).all()
    ends = seen["ratio"].notnull().values[0]
    assert (ends == (torch.arange(80) % 4 == 3).numpy()).all()
    confidence = seen["confidence"].values
    assert (confidence <= 1).all() and confidence[..., 40:, :].min() > 0


def test_confidence_falls_with_what_is_not_read():
    x, tokens = inputs(400)
    means = []
    for picks in (1, 8, 300):
        memory = built(retrieval="exact", picks=picks, capacity=1000, confidence=32, spread=False)
        with torch.no_grad(), record(memory, {"confidence", "hit_share"}) as recording:
            memory(x, tokens=tokens)
        means.append(float(recording.dataset()["confidence"].values[..., 200:, :].mean()))
    assert means[0] < means[1] < means[2] == 1


@pytest.mark.unchecked
def test_the_retrieval_loss_teaches_codes():
    """Of the slots that it looks at, a learned code finds more of what is wanted than it did untrained."""
    memory = built(capacity=400, densities=(), ratios=(2,), bits=4, tables=4, candidates=32, phase=False).train()
    with torch.no_grad():
        memory.log_scale.fill_(2.5)
    x, _ = inputs(400)
    optimizer = torch.optim.Adam(memory.hierarchy.retriever.parameters(), 2e-2)

    def lift():
        found = retrieval_quality(memory, x, {"": memory.hierarchy.retriever.family}, tables=(2,), probes=(1,))
        return (found["recall"] / found["work"]).item()

    before = lift()
    for _ in range(150):
        with auxiliary.collect() as asked:
            memory(x)
        optimizer.zero_grad()
        asked["retrieval"].backward()
        optimizer.step()
    assert lift() > 1.2 * before > 1.2


def test_quality_is_perfect_where_every_slot_is_a_candidate():
    memory = built(retrieval="all", ratios=(2,), densities=())
    x, _ = inputs(200)
    halves = hashing.hyperplane.Config(dim=8, heads=2, tables=1, bits=1).build()
    fine = hashing.hyperplane.Config(dim=8, heads=2, tables=1, bits=8).build()
    quality = retrieval_quality(memory, x, {"halves": halves, "fine": fine}, tables=(1,), probes=(1, 2))
    for name in ("recall", "precision", "work"):
        assert quality[name].sel(family="halves", tables=1, probes=2) == pytest.approx(1)
    assert 0.3 < quality["work"].sel(family="halves", tables=1, probes=1) < 0.7
    assert quality["recall"].sel(family="fine", tables=1, probes=1) < 0.3
    assert 1 < quality.attrs["relevant_slots"] < quality.attrs["readable_slots"] < 100


def test_errors_are_attributed():
    torch.manual_seed(0)
    memory = Config(**{**SMALL, "dim": 32, "ratios": (4,), "picks": 2, "bits": 6, "tables": 1, "probes": 1})
    model = models.Config(vocab=64, dim=32, memory=memory, layers=2).build()
    tokens = inputs(100)[1]
    found = attribute(model, tokens, tokens.roll(-1, 1))
    with torch.no_grad():
        whole = replay(model, retrieval="all", ratios=(1,), budget=1.0, capacity=100)
        assert torch.equal(whole.blocks[0].memory.query.weight, model.blocks[0].memory.query.weight)
        logits, _ = whole.eval()(tokens)
    assert model.training  # as it was
    torch.testing.assert_close(found.uncompressed, F.cross_entropy(logits.mT, tokens.roll(-1, 1), reduction="none"))
    torch.testing.assert_close(found.as_is - found.uncompressed, found.collisions + found.compression)
    # Before the first slots are read there is nothing to be wrong about.
    assert found.compression[:, :9].abs().max() < 1e-5 < found.compression[:, 50:].abs().max()
    assert found.collisions[:, 50:].abs().max() > 1e-5
    with pytest.raises(ValueError, match="model: expected one with a HARMONY memory"):
        replay(torch.nn.Linear(1, 1))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    memory = Config(**{**SMALL, "densities": ("surprisal", "cross_entropy")}).build().train()
    with torch.no_grad():  # away from zero, where what lies behind gets no gradient
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    x, tokens = inputs(60)
    with auxiliary.collect() as asked:
        y, _ = memory(x, tokens=tokens)
    (y.square().mean() + sum(asked.values())).backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_far_positions_keep_their_angle():
    """Attention depends on distances alone, so a document may lie anywhere; float32 angles would not let it."""
    memory = built(ratios=(1,), budget=1.0, retrieval="all")
    x, _ = inputs(2)
    x = F.normalize(x.unflatten(-1, (2, 8)), dim=-1)
    near, far = (memory.rotate(x, torch.tensor([[[p], [p + 3]]] * 2, dtype=torch.float64)) for p in (0, 10**7))
    torch.testing.assert_close((near[:, 0] * near[:, 1]).sum(-1), (far[:, 0] * far[:, 1]).sum(-1), atol=1e-6, rtol=0)


@pytest.mark.unchecked
def test_wrong_settings_are_refused_by_name():
    for fields, message in (
        ({"ratios": (3,)}, "ratios: expected divisors of the segment"),
        ({"ratios": (4, 2)}, "ratios: expected rising numbers"),
        ({"budget": 9.0}, "budget: expected 1 to 4"),
        ({"policy": "none"}, "policy: expected one of"),
        ({"codec": "mean_pool"}, "sinks: expected 0 with codec"),
        ({"sharing": "block", "query_block": 3}, "query_block: expected a divisor"),
        ({"candidates": 3}, "candidates: expected at least"),
        ({"densities": ("none",)}, "densities: expected some of"),
        ({"window": 0}, "window: expected at least 1"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor"),
        ({"fallback": 2.0}, "fallback: expected 0 to 1"),
        ({"dim": 15}, "dim: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**{**SMALL, **fields})
    memory = built()
    with pytest.raises(ValueError, match="tokens: expected ids"):
        memory(inputs()[0])


def test_codes_of_places_without_slots_find_nothing():
    memory = built()
    x, tokens = inputs(20, batch=2)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 8:] = False
    with torch.no_grad():
        _, state = memory(x, tokens=tokens, valid=valid)
    assert state.slots[1] < state.slots[0] == state.slot_segment.shape[1]
    assert (state.codes[1, state.slots[1] :] == NOWHERE).all()
    assert (state.slot_bias[1, state.slots[1] :] == -math.inf).all()


def test_operations_are_counted_from_shapes_alone():
    memory = Config(**{**SMALL, "dim": 32})
    per_token = models.flops(models.Config(vocab=64, dim=32, memory=memory, layers=1), 256)
    projections = 2 * (4 * 32 * 32)
    assert per_token > projections


@pytest.mark.parametrize("sharing", ["none", "block"])
def test_a_window_alone_has_no_use_for_room(sharing):
    memory = built(retrieval="none", sharing=sharing)
    x, tokens = inputs(30)
    with torch.no_grad():
        _, state = memory(x, tokens=tokens)
        assert memory.reserve(state, 99) is state
        want, _ = memory(torch.cat((x, x[:, :1]), 1), tokens=torch.cat((tokens, tokens[:, :1]), 1))
        got, _ = memory.step(x[:, 0], memory.reserve(state, 99), tokens=tokens[:, 0])
    torch.testing.assert_close(got, want[:, -1], atol=1e-5, rtol=0)


def test_reduced_codes_are_learned_too():
    memory = built(reduced=4).train()
    with auxiliary.collect() as asked:
        memory(inputs(60)[0], tokens=inputs(60)[1])
    asked["retrieval"].backward()
    assert memory.hierarchy.retriever.family.family.weight.grad.abs().max() > 0


@pytest.mark.unchecked
def test_ids_may_be_of_any_integer_type():
    memory = built(policy="density")
    x, tokens = inputs(60)
    with torch.no_grad():
        want = memory(x, tokens=tokens)[0]
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert torch.equal(memory(x, tokens=tokens.to(dtype))[0], want)


def test_only_training_moves_the_price():
    memory = built()
    price = memory.hierarchy.medium_term.compressor.price
    before = price.clone()
    for training, grad in ((False, True), (True, False)):
        with torch.set_grad_enabled(grad), auxiliary.collect() as asked:
            memory.train(training)(inputs(60)[0], tokens=inputs(60)[1])
        assert torch.equal(price, before)
    assert asked  # and it would have
    with auxiliary.collect():
        memory.train()(inputs(60)[0], tokens=inputs(60)[1])
    assert not torch.equal(price, before)


@pytest.mark.unchecked
def test_replays_refuse_what_is_no_choice():
    memory = built()
    for choices, message in (({"dim": 32}, "dim: expected one of the hierarchy's"), ({"foo": 1}, "foo: expected")):
        with pytest.raises(ValueError, match=message):
            replay(memory, **choices)
    with pytest.raises(ValueError, match="probes: expected at most 3"):
        replay(memory, bits=2, probes=4)
    memory.output.requires_grad_(False)
    assert not replay(memory, picks=5).output.weight.requires_grad


def test_attribution_ends_at_causal_attention_though_slots_have_no_phase():
    memory = Config(**{**SMALL, "dim": 32, "ratios": (4,), "densities": (), "phase": False})
    torch.manual_seed(0)
    model = models.Config(vocab=64, dim=32, memory=memory, layers=2).build()
    tokens = inputs(60)[1]
    found = attribute(model, tokens, tokens.roll(-1, 1))
    with torch.no_grad():
        logits, _ = replay(model, window=60, retrieval="none").eval()(tokens)
    want = F.cross_entropy(logits.mT, tokens.roll(-1, 1), reduction="none")
    torch.testing.assert_close(found.uncompressed, want, atol=1e-5, rtol=1e-5)


def test_a_slot_is_scored_by_direction_mass_and_spread():
    memory = built(ratios=(4,), phase=False, densities=(), retrieval="all", sinks=0)
    shape, x = memory.hierarchy.medium_term, inputs(40)[0]

    def slots(sharpness, crowding, variance):
        with torch.no_grad():
            for parameter, value in zip((shape.sharpness, shape.crowding, shape.variance),
                                        (sharpness, crowding, variance), strict=True):  # fmt: skip
                parameter.fill_(value)
            return memory(x)[1]

    plain = slots(0, 1, 0)
    torch.testing.assert_close(plain.slot_bias, plain.slot_mass.log())
    length = plain.slot_keys.square().sum(-1)
    assert length.max() < 0.99
    second = memory.log_scale.exp().square() * (1 - length) / (2 * 8)
    torch.testing.assert_close(slots(0, 0, 1).slot_bias, second.detach())
    torch.testing.assert_close(slots(0, 2, 0.5).slot_bias, (2 * plain.slot_mass.log() + second / 2).detach())
    torch.testing.assert_close(slots(1, 1, 0).slot_keys.norm(dim=-1), torch.ones_like(length), atol=1e-4, rtol=0)
