"""Codecs of segments: what they keep, what it weighs, how far it is; each against a closed form or another library."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hmlab_kernels.compress_segments import Slots
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from hmlab.codecs import (
    CODECS,
    PCA,
    Chain,
    Code,
    HeadPruning,
    Identity,
    KMeans,
    Landmarks,
    LearnedSlots,
    MeanPool,
    Quantisation,
    SparseDictionary,
    StridedConvolution,
    TokenPruning,
    TruncatedSVD,
    bits,
)
from hmlab.codecs.packing import pack, unpack, width_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SEGMENTS, SEGMENT, HEADS, DIM = 2, 3, 12, 2, 8
HEAD = {"dim": DIM, "kv_heads": HEADS}
CONFIGS = {
    "identity": Identity.Config(),
    "learned-slots": LearnedSlots.Config(**HEAD, most=SEGMENT),
    "mean-pool": MeanPool.Config(),
    "strided-convolution": StridedConvolution.Config(**HEAD, ratios=(1, 2, 4, 12)),
    "k-means": KMeans.Config(),
    "landmarks": Landmarks.Config(),
    "token-pruning": TokenPruning.Config(by="keys"),
    "head-pruning": HeadPruning.Config(),
    "truncated-svd": TruncatedSVD.Config(),
    "pca": PCA.Config(**HEAD),
    "sparse-dictionary": SparseDictionary.Config(**HEAD, atoms=20),
    "quantisation": Quantisation.Config(),
    "chain": Chain.Config(stages=(MeanPool.Config(), Quantisation.Config(bits=4))),
}
TOKENS_ARE_SLOTS = {"identity", "head-pruning", "truncated-svd", "pca", "sparse-dictionary", "quantisation"}
LEARNED = ("learned-slots", "strided-convolution", "sparse-dictionary")
each_codec = pytest.mark.parametrize("name", CONFIGS)


def _segments(dtype=torch.float32, segment=SEGMENT, heads=HEADS, dim=DIM):
    return torch.randn(2, BATCH, SEGMENTS, segment, heads, dim, device=DEVICE, dtype=dtype).unbind()


def _codec(name, k, v):
    codec = CONFIGS[name].build().to(DEVICE, k.dtype)
    return codec.fit(k, v) if isinstance(codec, PCA) else codec


def _sizes(name):
    """Numbers of slots that a codec takes here, rising; the last is all there can be."""
    return {"identity": (None,), "quantisation": (None,), "head-pruning": (1, None), "truncated-svd": (1, 3, None),
            "pca": (1, 3, None), "sparse-dictionary": (1, 3, None)}.get(name, (1, 3, 6, None))  # fmt: skip


def test_every_codec_has_a_name_and_a_test():
    assert list(CODECS) and set(CODECS) == set(CONFIGS)
    assert all(isinstance(config.build(), CODECS[name]) for name, config in CONFIGS.items())


@each_codec
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_slots_stand_for_their_tokens(name, dtype):
    k, v = _segments(dtype)
    codec = _codec(name, k, v)
    for size in _sizes(name):
        code = codec.encode(k, v, size)
        slots = codec.decode(code)
        count = SEGMENT if name in TOKENS_ARE_SLOTS or size is None else size
        assert slots.k.shape == slots.v.shape == (BATCH, SEGMENTS, count, HEADS, DIM)
        assert slots.mass.shape == slots.position.shape == slots.k.shape[:-1]
        assert slots.k.dtype == slots.v.dtype == dtype and slots.mass.dtype == torch.promote_types(dtype, torch.float32)
        # A pruned token or head is represented by nothing.
        tokens = torch.full_like(slots.mass[:, :, 0], count if name == "token-pruning" else SEGMENT)
        if name == "head-pruning" and size == 1:
            assert (slots.mass.sum(2).sum(-1) == SEGMENT).all() and ((slots.mass == 0) | (slots.mass == 1)).all()
        else:
            torch.testing.assert_close(slots.mass.sum(2), tokens)
        if not name.endswith("pruning"):
            places = (slots.mass * slots.position).sum(2)
            torch.testing.assert_close(places, torch.full_like(tokens, SEGMENT * (SEGMENT - 1) / 2))
        assert all(x.shape == k.shape and x.dtype == dtype for x in codec.reconstruct(code))


@each_codec
def test_segments_do_not_mix(name):
    k, v = _segments()
    codec = _codec(name, k, v)
    whole = codec.decode(codec.encode(k, v, _sizes(name)[0]))
    alone = codec.decode(codec.encode(k[1:, 1:2], v[1:, 1:2], _sizes(name)[0]))
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[1:, 1:2], b)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"quantisation", "chain"}))
def test_as_many_slots_as_there_can_be_are_exact(name):
    k, v = _segments(torch.float64)
    codec = _codec(name, k, v)
    code = codec.encode(k, v)
    for x, y in zip((k, v), codec.reconstruct(code), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-10)
    q = torch.randn(BATCH, 5, 2 * HEADS, DIM, dtype=k.dtype, device=DEVICE)
    assert max(codec.distortion(k, v, code, q)) < 1e-10


@each_codec
def test_more_slots_are_less_distortion(name):
    k, v = _segments(torch.float64, dim=DIM)
    codec = _codec(name, k, v)
    errors = []
    for size in _sizes(name):
        distortion = codec.distortion(k, v, codec.encode(k, v, size))
        errors.append((distortion.keys + distortion.values).item())
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_gets_gradients_and_learns(name):
    k, v = _segments()
    codec = _codec(name, k, v)
    q = torch.randn(BATCH, 4, HEADS, DIM, device=DEVICE)
    optimiser, losses = torch.optim.Adam(codec.parameters(), 0.03), []
    for _ in range(30):
        distortion = codec.distortion(k, v, codec.encode(k, v, 3), q)
        losses.append(distortion.values + distortion.attention + distortion.mass)
        optimiser.zero_grad()
        losses[-1].backward()
        used = [p.grad for p in codec.parameters() if p.grad is not None]
        assert used and all(g.isfinite().all() and g.any() for g in used)
        optimiser.step()
    assert losses[-1] < 0.97 * losses[0]


def test_bits_are_those_of_the_tensors_held():
    k, v = _segments(torch.bfloat16)
    number, groups = 16, BATCH * SEGMENTS
    heads = groups * HEADS
    assert bits(Identity.Config().build().encode(k, v)) == 2 * k.numel() * number
    assert bits(MeanPool.Config().build().encode(k, v, 3)) == 2 * heads * 3 * DIM * number
    # Twelve tokens name one of three clusters in two bits each.
    assert bits(KMeans.Config().build().encode(k, v, 3)) == heads * (2 * 3 * DIM * number + 12 * 2)
    assert bits(KMeans.Config().build().encode(k, v, 1)) == heads * 2 * DIM * number
    # Two places among twelve, four bits each; one head of two, one bit, in a whole byte.
    assert bits(TokenPruning.Config().build().encode(k, v, 2)) == heads * (2 * 2 * DIM * number + 8)
    assert bits(HeadPruning.Config().build().encode(k, v, 1)) == groups * (2 * SEGMENT * DIM * number + 8)
    assert bits(TruncatedSVD.Config().build().encode(k, v, 2)) == 2 * heads * 2 * (SEGMENT + DIM) * number
    token, channel = (Quantisation.Config(bits=4, scale=s).build().encode(k, v) for s in ("token", "channel"))
    assert bits(token) == 2 * (k.numel() * 4 + heads * SEGMENT * number)
    assert bits(channel) == 2 * (k.numel() * 4 + heads * DIM * number)
    learned = CONFIGS["learned-slots"].build().to(DEVICE, k.dtype).encode(k, v, 4)
    assert bits(learned) == heads * (2 * 4 * DIM * number + 2 * 4 * 32 + 12 * 2)


@given(st.integers(0, 12), st.integers(0, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packed_integers_come_back(width, count, seed):
    x = torch.randint(2**width, (2, 3, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(x, width)
    assert packed.shape == (2, 3, -(-count * width // 8)) and torch.equal(unpack(packed, width, count), x)


def test_width_tells_things_apart():
    assert [width_of(n) for n in (1, 2, 3, 4, 5, 256, 257)] == [0, 1, 2, 2, 3, 8, 9]


def test_learned_slots_nest():
    k, v = _segments(torch.float64)
    fine = CONFIGS["learned-slots"].build().to(DEVICE, k.dtype)
    coarse = LearnedSlots.Config(**HEAD, most=4).build().to(DEVICE, k.dtype)
    with torch.no_grad():
        coarse.queries.copy_(fine.queries[:, :4])
    for size in (1, 3, 4):
        for a, b in zip(fine.decode(fine.encode(k, v, size)), coarse.decode(coarse.encode(k, v, size)), strict=True):
            assert torch.equal(a, b)
    # One slot has every token's whole share, so it is the mean.
    pooled = MeanPool.Config().build()
    for a, b in zip(fine.decode(fine.encode(k, v, 1)), pooled.decode(pooled.encode(k, v, 1)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_lower_rank_is_a_prefix():
    k, v = _segments()
    for name in ("truncated-svd", "pca"):
        codec = _codec(name, k, v)
        high, low = codec.encode(k, v, 5), codec.encode(k, v, 2)
        torch.testing.assert_close(high.k[..., :2], low.k)
        torch.testing.assert_close(high.v[..., :2], low.v)


def test_convolution_begins_as_the_mean():
    k, v = _segments()
    conv, mean = _codec("strided-convolution", k, v), MeanPool.Config().build()
    for size in (1, 3, 6):
        for a, b in zip(conv.decode(conv.encode(k, v, size)), mean.decode(mean.encode(k, v, size)), strict=True):
            torch.testing.assert_close(a, b)


def test_convolution_is_a_convolution():
    k, v = _segments()
    codec = _codec("strided-convolution", k, v)
    with torch.no_grad():
        codec.kernels["4"].normal_()
    slots = codec.decode(codec.encode(k, v, 3))
    for x, got, kernel in zip((k, v), slots[:2], codec.kernels["4"], strict=True):
        grouped = F.conv1d(rearrange(x, "b s t h d -> (b s) (h d) t"), rearrange(kernel, "r h d e -> (h e) d r"),
                           stride=4, groups=HEADS)  # fmt: skip
        want = rearrange(grouped, "(b s) (h d) t -> b s t h d", b=BATCH, h=HEADS)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_svd_is_the_best_of_its_rank(rank, seed):
    torch.manual_seed(seed)
    k, v = _segments(torch.float64)
    codec = TruncatedSVD.Config().build()
    for x, y in zip((k, v), codec.reconstruct(codec.encode(k, v, rank)), strict=True):
        tail = np.linalg.svd(x.transpose(2, 3).cpu().numpy(), compute_uv=False)[..., rank:]
        error = (x - y).square().sum((2, 4)).cpu().numpy()
        np.testing.assert_allclose(error, (tail**2).sum(-1), atol=1e-12)  # Eckart and Young


def test_pca_leaves_the_smallest_variances():
    k, v = _segments(torch.float64)
    codec = PCA.Config(**HEAD).build().to(DEVICE, k.dtype).fit(k, v)
    for x, y in zip((k, v), codec.reconstruct(codec.encode(k, v, 3)), strict=True):
        for head in range(HEADS):
            flat = x[..., head, :].flatten(0, 2).cpu().numpy()
            left = np.linalg.eigvalsh(np.cov(flat.T, bias=True))[:-3].sum() * len(flat)
            np.testing.assert_allclose((x - y)[..., head, :].square().sum().item(), left)


def test_k_means_is_lloyds():
    k, v = _segments(torch.float64, segment=24)
    codec = KMeans.Config(steps=10).build()
    slots = codec.decode(codec.encode(k, v, 4))
    for b, s, h in itertools.product(range(BATCH), range(SEGMENTS), range(HEADS)):
        tokens = torch.cat((k, v), -1)[b, s, :, h].cpu().numpy()
        means, _ = kmeans2(tokens, tokens[::6].copy(), iter=10, minit="matrix", missing="raise")
        np.testing.assert_allclose(torch.cat((slots.k, slots.v), -1)[b, s, :, h].cpu(), means, atol=1e-12)
        last = ((tokens[:, None] - means) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(slots.mass[b, s, :, h].cpu(), np.bincount(last, minlength=4))


def test_a_cluster_without_tokens_has_no_mass():
    k = torch.zeros(1, 1, 4, 1, 2, device=DEVICE)
    k[..., 2:, :, :] = 1
    codec = KMeans.Config().build()
    slots = codec.decode(codec.encode(k, k, 4))
    assert sorted(slots.mass.flatten().tolist()) == [0, 0, 2, 2] and all(x.isfinite().all() for x in slots)
    q = torch.randn(1, 3, 1, 2, device=DEVICE)
    torch.testing.assert_close(codec.mass_error(q, k, codec.encode(k, k, 4)), torch.zeros(1, 3, 1, 1, device=DEVICE))


def test_pruning_keeps_the_greatest():
    k, v = _segments()
    for by, x in (("keys", k), ("values", v)):
        tokens = TokenPruning.Config(by=by).build()
        slots = tokens.decode(tokens.encode(k, v, 5))
        heads = HeadPruning.Config(by=by).build()
        kept = heads.reconstruct(heads.encode(k, v, 1))
        for b, s in itertools.product(range(BATCH), range(SEGMENTS)):
            best = x[b, s].square().sum((0, 2)).argmax()
            assert torch.equal(kept[0][b, s, :, best], k[b, s, :, best]) and not kept[0][b, s, :, 1 - best].any()
            for h in range(HEADS):
                index = sorted(x[b, s, :, h].norm(dim=-1).argsort(descending=True)[:5].tolist())
                assert slots.position[b, s, :, h].tolist() == index
                assert torch.equal(slots.k[b, s, :, h], k[b, s, index, h])
                assert torch.equal(slots.v[b, s, :, h], v[b, s, index, h])
        back = tokens.reconstruct(tokens.encode(k, v, 5))[1]
        assert ((back == v).all(-1) | (back == 0).all(-1)).all() and ((back != 0).any(-1).sum(2) == 5).all()


def test_matching_pursuit_finds_planted_atoms():
    codec = SparseDictionary.Config(**HEAD, atoms=DIM).build().to(DEVICE, torch.float64)
    with torch.no_grad():
        codec.atoms.copy_(torch.linalg.qr(codec.atoms).Q)
    weights = torch.randn(2, BATCH, SEGMENTS, SEGMENT, HEADS, 3, dtype=torch.float64, device=DEVICE)
    atom = torch.rand(*weights.shape[:-1], DIM, device=DEVICE).argsort(-1)[..., :3]
    dense = torch.zeros(*weights.shape[:-1], DIM, dtype=torch.float64, device=DEVICE).scatter(-1, atom, weights)
    k, v = torch.einsum("pbstha,phad->pbsthd", dense, codec.atoms.detach()).unbind()
    code = codec.encode(k, v, 3)
    for x, y in zip((k, v), codec.reconstruct(code), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
    assert torch.equal(codec._chosen(code.side.keys, code.k).sort(-1).values, atom[0].sort(-1).values)


def test_matching_pursuit_is_a_least_squares_fit_of_what_it_chose():
    k, v = _segments(torch.float64)
    codec = _codec("sparse-dictionary", k, v)
    code = codec.encode(k, v, 4)
    atom = codec._chosen(code.side.values, code.v)
    atoms = F.normalize(codec.atoms[1], dim=-1)[torch.arange(HEADS, device=DEVICE)[:, None], atom]
    assert (atom.sort(-1).values.diff(dim=-1) > 0).all()
    left = v - codec.reconstruct(code)[1]
    assert torch.einsum("bsthmd,bsthd->bsthm", atoms, left).abs().max() < 1e-12


def test_fitting_a_dictionary_helps():
    k, v = _segments()
    codec = _codec("sparse-dictionary", k, v)
    before = codec.distortion(k, v, codec.encode(k, v, 2))
    codec.fit(k, v, slots=2)
    after = codec.distortion(k, v, codec.encode(k, v, 2))
    assert after.keys < 0.8 * before.keys and after.values < 0.8 * before.values


def test_two_equal_atoms_are_no_harm():
    codec = SparseDictionary.Config(dim=2, kv_heads=1, atoms=2).build().to(DEVICE)
    with torch.no_grad():
        codec.atoms.copy_(torch.tensor([3.0, 4.0], device=DEVICE).expand_as(codec.atoms))
    k = torch.tensor([0.6, 0.8], device=DEVICE).expand(1, 1, 4, 1, 2)
    torch.testing.assert_close(codec.reconstruct(codec.encode(k, k, 2))[0], k, rtol=0, atol=1e-5)


@given(st.integers(2, 8), st.sampled_from(("token", "channel")), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_quantisation_errs_by_half_a_step(width, scale, size, seed):
    torch.manual_seed(seed)
    k, v = (size * x for x in _segments(torch.float64))
    codec = Quantisation.Config(bits=width, scale=scale).build()
    axis = -1 if scale == "token" else 2
    for x, y in zip((k, v), codec.reconstruct(codec.encode(k, v)), strict=True):
        largest = x.abs().amax(axis, keepdim=True)
        step = largest / (2 ** (width - 1) - 1)
        assert ((x - y).abs() <= step * (0.5 + 1e-12)).all()
        torch.testing.assert_close(y.abs().amax(axis, keepdim=True), largest)
        torch.testing.assert_close(codec.reconstruct(codec.encode(-x, x))[0], -y)


def test_zeros_are_quantised_to_zeros():
    k = torch.zeros(1, 1, 4, 1, 2, device=DEVICE)
    codec = Quantisation.Config(bits=4).build()
    assert torch.equal(codec.reconstruct(codec.encode(k, k))[0], k)


def test_a_chain_codes_the_vectors_of_the_code_before():
    k, v = _segments()
    first, second = MeanPool.Config().build(), Quantisation.Config(bits=5).build()
    chain = Chain.Config(stages=(MeanPool.Config(), Quantisation.Config(bits=5))).build()
    code, pooled = chain.encode(k, v, 4), first.encode(k, v, 4)
    inner = second.encode(pooled.k, pooled.v)
    assert bits(code) == bits(inner)
    rounded = pooled._replace(**dict(zip("kv", second.reconstruct(inner), strict=True)))
    for a, b in zip(chain.decode(code), first.decode(rounded), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(chain.reconstruct(code), first.reconstruct(rounded), strict=True):
        assert torch.equal(a, b)


def test_a_chain_of_three_and_of_factors():
    k, v = _segments()
    stages = (HeadPruning.Config(), TruncatedSVD.Config(), Quantisation.Config())
    chain = Chain.Config(stages=stages, slots=(3,)).build()
    code = chain.encode(k, v, 1)
    # Three columns of two factors, a byte each, and one head.
    assert code.k.shape == (BATCH, SEGMENTS, 1, 1, 3 * (SEGMENT + DIM))
    svd, pruned = TruncatedSVD.Config().build(), HeadPruning.Config().build()
    kept = pruned.encode(k, v, 1)
    factors = svd.encode(*kept[:2], 3)
    want = pruned.reconstruct(kept._replace(**dict(zip("kv", svd.reconstruct(factors), strict=True))))
    for a, b, factor in zip(chain.reconstruct(code), want, factors[:2], strict=True):
        # Both factors of three products are half a step off at most.
        most = factor.abs().max()
        off = most / 254
        assert 0 < (a - b).abs().max() <= 3 * (2 * most * off + off**2)
    assert (chain.decode(code).mass.sum((2, 3)) == SEGMENT).all()


def test_masses_are_those_of_repeated_tokens():
    """Attention to a slot of mass n is attention to n tokens like it."""
    k, v = _segments(torch.float64)
    codec = KMeans.Config().build()
    code = codec.encode(k, v, 4)
    k_hat, v_hat = codec.reconstruct(code)
    q = torch.randn(BATCH, 5, 2 * HEADS, DIM, dtype=k.dtype, device=DEVICE)
    heads_first = [repeat(x, "b s t h d -> b (h g) (s t) d", g=n) for x, n in ((k_hat, 2), (v_hat, 2), (k, 2), (v, 2))]
    coded = F.scaled_dot_product_attention(q.transpose(1, 2), *heads_first[:2])
    exact = F.scaled_dot_product_attention(q.transpose(1, 2), *heads_first[2:])
    distortion = codec.distortion(k, v, code, q)
    torch.testing.assert_close(distortion.attention, (coded - exact).square().sum() / exact.square().sum())
    values = v - v.mean((0, 1, 2))
    torch.testing.assert_close(distortion.values, (v - v_hat).square().sum() / values.square().sum())
    total = [torch.einsum("bthd,bsnhd->bthsn", q, x.repeat_interleave(2, 3)).mul(DIM**-0.5).exp().sum(-1)
             for x in (k, k_hat)]  # fmt: skip
    error = codec.mass_error(q, k, code)
    torch.testing.assert_close(error, total[1] / total[0] - 1)
    torch.testing.assert_close(distortion.mass, error.abs().mean())


@pytest.mark.parametrize("name", ("learned-slots", "mean-pool", "k-means"))
def test_means_never_have_too_much_mass(name):
    k, v = _segments(torch.float64)
    codec = _codec(name, k, v)
    error = codec.mass_error(3 * torch.randn(BATCH, 6, HEADS, DIM, dtype=k.dtype, device=DEVICE), k,
                             codec.encode(k, v, 3))  # fmt: skip
    assert error.shape == (BATCH, 6, HEADS, SEGMENTS) and (error < 0).all() and (error > -1).all()


def test_a_pruned_head_answers_nothing():
    k, v = _segments(heads=1)
    k, v = torch.cat((k, 2 * k), 3), torch.cat((v, 2 * v), 3)
    codec = HeadPruning.Config().build()
    code = codec.encode(k, v, 1)
    q = torch.randn(BATCH, 4, 2, DIM, device=DEVICE)
    error = codec.mass_error(q, k, code)
    assert (error[:, :, 0] == -1).all()
    torch.testing.assert_close(error[:, :, 1], torch.zeros_like(error[:, :, 1]), rtol=0, atol=1e-6)
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k.flatten(1, 2), v.flatten(1, 2))))
    lost = exact[:, 0].square().sum() / exact.square().sum()
    torch.testing.assert_close(codec.distortion(k, v, code, q).attention, lost)


@each_codec
def test_no_segments_are_no_slots(name):
    k, v = _segments()
    codec = _codec(name, k, v)
    slots = codec.decode(codec.encode(k[:, :0], v[:, :0], _sizes(name)[0]))
    assert isinstance(slots, Slots) and slots.k.shape[:2] == slots.mass.shape[:2] == (BATCH, 0)


K = torch.zeros(1, 1, 6, 2, 4)
BAD_CALLS = {
    r"k: expected floats \[batch": lambda: MeanPool().encode(K[0], K[0]),
    "k: expected floats": lambda: MeanPool().encode(K.int(), K.int()),
    "k: expected at least one token": lambda: MeanPool().encode(K[:, :, :0], K[:, :, :0]),
    "v: expected torch.float32": lambda: MeanPool().encode(K, K[..., :2]),
    "slots: expected 1 to 6 .* got 0": lambda: MeanPool().encode(K, K, 0),
    "slots: expected 1 to 6 .* got 7": lambda: KMeans.Config().build().encode(K, K, 7),
    "slots: expected 1 to 4 ": lambda: TruncatedSVD().encode(K, K, 5),
    "slots: expected 1 to 2 ": lambda: HeadPruning.Config().build().encode(K, K, 3),
    "slots: expected a divisor": lambda: MeanPool().encode(K, K, 4),
    "slots: expected all 6 tokens": lambda: Identity().encode(K, K, 3),
    "slots: expected a ratio in": lambda: StridedConvolution.Config(dim=4, kv_heads=2, ratios=(2,)).build()
    .encode(K, K, 2),
    "k: expected 1 heads of 4": lambda: PCA.Config(dim=4, kv_heads=1).build().fit(K, K),
    "k: expected 2 heads of 3": lambda: LearnedSlots.Config(dim=3, kv_heads=2, most=2).build().encode(K, K),
    "q: expected": lambda: MeanPool().distortion(K, K, MeanPool().encode(K, K), torch.zeros(1, 3, 3, 4)),
    "most: expected at least 1": lambda: LearnedSlots.Config(dim=3, kv_heads=2, most=0),
    "dim: expected at least 1": lambda: PCA.Config(dim=0, kv_heads=2),
    "atoms: expected at least 1": lambda: SparseDictionary.Config(dim=2, kv_heads=2, atoms=0),
    "kv_heads: expected at least 1": lambda: StridedConvolution.Config(dim=2, kv_heads=0),
    "ratios: expected": lambda: StridedConvolution.Config(dim=2, kv_heads=1, ratios=()),
    "steps: expected at least 1": lambda: KMeans.Config(steps=0),
    "by: expected": lambda: TokenPruning.Config(by="length"),
    "bits: expected 2 to 8": lambda: Quantisation.Config(bits=1),
    "scale: expected": lambda: Quantisation.Config(scale="row"),
    "stages: expected": lambda: Chain.Config(stages=()),
    "slots: expected at most 1": lambda: Chain.Config(stages=(MeanPool.Config(), KMeans.Config()), slots=(1, 2)),
    "k: expected floats .* got torch.uint8": lambda: Chain.Config(stages=(Quantisation.Config(), KMeans.Config()))
    .build().encode(K, K),
}  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_a_code_is_a_tuple_of_tensors_and_sizes():
    """So that it can be moved, stored and counted without knowing the codec."""
    k, v = _segments()

    def leaves(x):
        return [y for part in x for y in leaves(part)] if isinstance(x, tuple) else [x]

    for name in CONFIGS:
        code = _codec(name, k, v).encode(k, v, _sizes(name)[0])
        assert isinstance(code, Code) and all(isinstance(x, torch.Tensor | int) for x in leaves(code))
        assert bits(code) == 8 * sum(x.nbytes for x in leaves(code) if isinstance(x, torch.Tensor))


def test_landmarks_are_the_tokens_that_stand_out():
    k, v = _segments()
    v = v * 0.01
    v[:, :, 5], v[:, :, 9] = 3.0, -2.0
    slots = Landmarks.Config().build()
    found = slots.decode(slots.encode(k, v, 3))
    assert (found.position[:, :, :2] == torch.tensor([5.0, 9.0])[:, None]).all()
    assert torch.equal(found.k[:, :, 0], k[:, :, 5]) and torch.equal(found.v[:, :, 1], v[:, :, 9])
    rest = [t for t in range(SEGMENT) if t not in (5, 9)]
    torch.testing.assert_close(found.k[:, :, 2], k[:, :, rest].mean(2))
    assert (found.mass == torch.tensor([1.0, 1.0, SEGMENT - 2])[:, None]).all()
    torch.testing.assert_close(found.position[0, 0, 2, 0], torch.tensor(rest).float().mean())
