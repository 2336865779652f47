"""The Gaussian bound, and curves of all codecs beside it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from hmlab.codecs import (
    PCA,
    Chain,
    HeadPruning,
    Identity,
    KMeans,
    LearnedSlots,
    MeanPool,
    Quantisation,
    SparseDictionary,
    StridedConvolution,
    TokenPruning,
    TruncatedSVD,
    bits,
    gaussian_bound,
    rate_distortion,
)

HEADS, DIM, SEGMENT = 2, 16, 32
HEAD = {"dim": DIM, "kv_heads": HEADS}


def _gaussian(decay=1.0, segments=24, dtype=torch.float32):
    """Independent tokens whose channels are mixed, of variances 1, decay, decay², …"""
    scale = decay ** (torch.arange(DIM) / 2)
    mix = torch.linalg.qr(torch.randn(2, HEADS, DIM, DIM)).Q * scale[:, None]
    tokens = torch.einsum("pbsthd,phde->pbsthe", torch.randn(2, 2, segments, SEGMENT, HEADS, DIM), mix)
    return tokens.to(dtype).unbind()


def _codecs(k, v):
    configs = {
        "identity": (Identity.Config(), (None,)),
        "learned-slots": (LearnedSlots.Config(**HEAD, most=8), (1, 2, 4, 8)),
        "mean-pool": (MeanPool.Config(), (1, 2, 8, 32)),
        "strided-convolution": (StridedConvolution.Config(**HEAD), (1, 4, 8)),
        "k-means": (KMeans.Config(), (1, 4, 16)),
        "token-pruning": (TokenPruning.Config(), (1, 8, 31)),
        "head-pruning": (HeadPruning.Config(), (1, 2)),
        "truncated-svd": (TruncatedSVD.Config(), (1, 4, 8)),
        "pca": (PCA.Config(**HEAD), (1, 4, 16)),
        "sparse-dictionary": (SparseDictionary.Config(**HEAD, atoms=64), (1, 2, 4)),
    }
    built = {name: (config.build(), sizes) for name, (config, sizes) in configs.items()}
    built["pca"][0].fit(k, v)
    built["sparse-dictionary"][0].fit(k, v, slots=2, steps=3)
    for width in (2, 3, 4, 6, 8):
        for scale in ("token", "channel"):
            integers = Quantisation.Config(bits=width, scale=scale)
            built[f"{width} bits, {scale}"] = integers.build(), (None,)
            for name in ("mean-pool", "k-means", "truncated-svd", "token-pruning"):
                chain = Chain.Config(stages=(configs[name][0], integers)).build()
                built[f"{name}, {width} bits, {scale}"] = chain, (1, 4, 16)
    return built


@pytest.mark.parametrize("decay", (1.0, 0.6))
def test_no_codec_crosses_the_bound_on_gaussian_tokens(decay):
    k, v = _gaussian(decay)
    codecs = _codecs(k, v)
    curve = rate_distortion(codecs, k, v, torch.randn(2, 4, HEADS, DIM))
    asked = curve["rate"].notnull()
    assert (asked == curve["bound"].notnull()).all()
    assert int(asked.sum()) == sum(len(sizes) for _, sizes in codecs.values())
    # Numbers that are held as they came are exact; the bound is of real numbers, not of floats.
    exact = curve["reconstruction"] == 0
    assert int(exact.sum()) == 3
    assert all(exact.sel(codec=name, slots=n) for name, n in (("identity", 0), ("mean-pool", 32), ("head-pruning", 2)))
    assert (curve["reconstruction"] >= curve["bound"]).where(asked & ~exact, True).all()


@pytest.mark.parametrize("width", (4, 6, 8))
def test_integers_of_white_tokens_err_as_theory_says(width):
    """By step²/12 in all numbers but the largest of a scale's, whose square m² is known for n normal numbers."""
    k, v = _gaussian()
    curve = rate_distortion({"integers": (Quantisation.Config(bits=width, scale="channel").build(), (None,))}, k, v)
    numbers, n = 2 * HEADS * DIM, SEGMENT
    density = [lambda m, p=p: m**p * n * (2 * norm.cdf(m) - 1) ** (n - 1) * 2 * norm.pdf(m) for p in (2, 4)]
    square, fourth = (quad(f, 0, 12)[0] for f in density)
    want = square / (2 ** (width - 1) - 1) ** 2 / 12 * (n - 1) / n
    # Four standard errors: of the mean of m² over the scales, and of the mean of the square of a uniform error.
    scales = k.shape[0] * k.shape[1] * numbers
    spread = 4 * ((fourth / square**2 - 1) / scales + 0.8 / (scales * n)) ** 0.5
    assert abs(curve["reconstruction"].item() / want - 1) < spread < 0.04
    # A scale of 32 bits for 32 numbers is one bit a number.
    assert curve["rate"] == (width + 1) * numbers
    np.testing.assert_allclose(curve["bound"].item(), 2.0 ** (-2 * (width + 1)), rtol=0.05)


def test_distortion_falls_with_rate():
    k, v = _gaussian(0.7)
    curve = rate_distortion(_codecs(k, v), k, v, torch.randn(2, 16, HEADS, DIM))
    for name in curve["codec"].values:
        points = curve.sel(codec=name).dropna("slots", subset=["rate"]).sortby("rate")
        assert (points["rate"].diff("slots") > 0).all() and (points["bound"].diff("slots") < 0).all()
        if "bits" not in str(name):
            assert (points["reconstruction"].diff("slots") < 0).all(), name
    for scale in ("token", "channel"):
        names = [f"{width} bits, {scale}" for width in (2, 3, 4, 6, 8)]
        points = curve.sel(codec=names, slots=0)
        for measure in ("reconstruction", "attention", "mass"):
            assert (points[measure].diff("codec") < 0).all(), measure


def test_what_the_dataset_holds():
    k, v = _gaussian(segments=3)
    q = torch.randn(2, 4, 2 * HEADS, DIM)
    pool, pca = MeanPool.Config().build(), PCA.Config(**HEAD).build()
    curve = rate_distortion({"pool": (pool, (4, 2)), "pca": (pca, (2, None))}, k, v, q)
    assert curve["slots"].values.tolist() == [0, 2, 4] and curve["codec"].values.tolist() == ["pool", "pca"]
    assert curve["rate"].attrs["units"] == "bits/token"
    code = pool.encode(k, v, 4)
    point = curve.sel(codec="pool", slots=4)
    assert point["rate"] == bits(code) / (2 * 3 * SEGMENT) == 2 * 4 * HEADS * DIM * 32 / SEGMENT
    for name, value in pool.distortion(k, v, code, q)._asdict().items():
        assert point[name].item() == value.item()
    assert point["reconstruction"] == (point["keys"] + point["values"]) / 2
    assert curve["shared"].values.tolist() == [0, 32 * (2 * HEADS * DIM * DIM + 2 * HEADS * DIM)]
    assert np.isnan(curve["rate"].sel(codec="pool", slots=0)) and np.isnan(curve["bound"].sel(codec="pca", slots=4))
    # Alone, and with the same name, a codec has the same curve.
    alone = rate_distortion({"pool": (pool, (4,))}, k, v, q)
    assert alone.sel(codec="pool", slots=4).equals(point)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8), st.floats(0, 60))
@settings(max_examples=80, deadline=None)
def test_the_bound_is_reverse_water_filling(variances, rate):
    variance = np.array(variances)

    def excess(log_level):
        return np.maximum(0, 0.5 * (np.log2(variance) - log_level)).sum() - rate

    top = np.log2(variance.max())
    level = brentq(excess, top - 2 * rate - 1, top, xtol=1e-13) if rate else top
    want = np.minimum(2**level, variance).sum()
    np.testing.assert_allclose(gaussian_bound(variance, np.array([rate, 0.0])), [want, variance.sum()], rtol=1e-9)


def test_the_bound_of_one_variance():
    rate = np.linspace(0, 8, 9)
    np.testing.assert_allclose(gaussian_bound(np.array([3.0]), rate), 3 * 2 ** (-2 * rate))
    np.testing.assert_allclose(gaussian_bound(np.array([3.0, 0.0, 3.0]), 2 * rate), 6 * 2 ** (-2 * rate))
    assert gaussian_bound(np.zeros(3), np.ones((2, 2))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.unchecked
def test_errors_name_the_argument():
    k, v = _gaussian(segments=1)
    pool = MeanPool.Config().build()
    for message, call in {
        "codecs: expected at least one": lambda: rate_distortion({}, k, v),
        "codecs: expected .* number of slots": lambda: rate_distortion({"pool": (pool, ())}, k, v),
        "k: expected tokens that vary": lambda: rate_distortion({"pool": (pool, (1,))}, torch.ones_like(k), v),
        "v: expected tokens that vary": lambda: rate_distortion({"pool": (pool, (1,))}, k, torch.ones_like(k)),
        "v: expected torch.float32": lambda: rate_distortion({"pool": (pool, (1,))}, k, v[:, :, :1]),
        "slots: expected a divisor": lambda: rate_distortion({"pool": (pool, (3,))}, k, v),
        "eigenvalues: expected": lambda: gaussian_bound(np.array([-1.0]), np.array(1.0)),
        "rate: expected at least 0": lambda: gaussian_bound(np.array([1.0]), np.array(-1.0)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
