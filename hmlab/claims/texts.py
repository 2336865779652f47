"""Functions that the ledger's entries name: what a text, made sequences or random vectors decide.

Every random number has a fixed seed. Each returns one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from hmlab import codecs, corpora, hashing
from hmlab.information import measures

_WORDS = 60_000  # of the text on language


def collision_rate(angle: float, bits: int = 8, pairs: int = 4096) -> float:
    """Share of pairs of vectors at that angle (radians) with the same code of random hyperplanes."""
    torch.manual_seed(0)
    family = hashing.hyperplane.Config(dim=32, tables=16, bits=bits).build()
    x = F.normalize(torch.randn(1, pairs, 1, 32), dim=-1)
    across = torch.randn(1, pairs, 1, 32)
    across = F.normalize(across - (across * x).sum(-1, keepdim=True) * x, dim=-1)
    y = math.cos(angle) * x + math.sin(angle) * across
    return float((family.codes(x) == family.codes(y)).double().mean())


def divergence_bound(least: bool = False) -> float:
    """The largest, or least, Jensen-Shannon divergence in bits of 2,000 pairs of distributions: equal, disjoint, flat
    and peaked ones."""
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet([0.05] * 16, 2000), generator.dirichlet([0.5] * 16, 2000)
    q[0] = p[0]
    p[1], q[1] = np.eye(16)[0], np.eye(16)[1]
    found = measures.js_divergence(torch.from_numpy(p), torch.from_numpy(q))
    return float(found.min() if least else found.max())


def token_bits(codec: str, tokens: str, settings: dict[str, int] | None = None) -> float:
    """Bits per token of a lossless code. tokens: "drift", whose frequent ones change every 500; "text", characters of
    a text; "phrases", 50 phrases of random tokens, each said 20 times in a row."""
    encoded = codecs.TOKEN_CODECS[codec](**settings or {}).encode(_sequence(tokens))
    return encoded.bits / len(_sequence(tokens))


def bits_of_alphabet(tokens: str) -> float:
    """Bits per token if each is written as its number in the alphabet; tokens: as `token_bits`."""
    return math.log2(len(np.unique(_sequence(tokens))))


def quantisation(measure: str, bits: int = 8) -> float:
    """Of random keys and values as `bits`-bit integers: "ratio", bits of float32 over theirs; "attention", squared
    error of attention's output over its square."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 8, 64, 2, 32)
    code = codecs.Quantisation.Config(bits=bits).build().encode(k, v)
    if measure == "ratio":
        return 32 * (k.numel() + v.numel()) / codecs.bits(code)
    return float(codecs.Quantisation.Config(bits=bits).build().distortion(k, v, code).attention)


def language(statistic: str) -> float:
    """Of the words of Python's documentation. "zipf": minus the slope of log frequency over log rank, ranks 1 to 1,000.
    Others over the same of the words in random order: "temporal", the share of words said in the last 100;
    "spatial", of pairs of neighbours said in the last 1,000 words; "density", deviation of the mean surprisal of
    64 words."""
    spoken = " ".join(corpora.load("python").splits.values()).lower().split()[:_WORDS]
    words = np.unique(spoken, return_inverse=True)[1]
    if statistic == "zipf":
        counts = np.sort(np.bincount(words))[::-1][:1000]
        x, y = np.log(np.arange(1, len(counts) + 1)), np.log(counts)
        return float(-np.polyfit(x, y, 1)[0])
    mixed = np.random.default_rng(0).permutation(words)
    if statistic == "density":
        surprisal = -np.log2(np.bincount(words) / len(words))
        whole = len(words) // 64 * 64
        return float(np.divide(*(surprisal[w[:whole]].reshape(-1, 64).mean(1).std() for w in (words, mixed))))
    if statistic == "temporal":
        return _said_lately(words, 100) / _said_lately(mixed, 100)
    pairs = [np.unique(w[:-1] * (words.max() + 1) + w[1:], return_inverse=True)[1] for w in (words, mixed)]
    return _said_lately(pairs[0], 1000) / _said_lately(pairs[1], 1000)


def _said_lately(words: np.ndarray, reach: int) -> float:
    last = np.full(words.max() + 1, -reach - 1)
    again = 0
    for place, word in enumerate(words.tolist()):
        again += place - last[word] <= reach
        last[word] = place
    return again / len(words)


def _sequence(name: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    if name == "drift":
        share = 0.5 ** np.arange(1, 17)
        parts = [generator.choice(16, 500, p=share / share.sum()) for _ in range(8)]
        return np.concatenate([(part + 2 * number) % 16 for number, part in enumerate(parts)])
    if name == "phrases":
        return np.concatenate([np.tile(generator.integers(0, 64, 6), 20) for _ in range(50)])
    if name == "text":
        return np.array([ord(letter) for letter in corpora.load("python").splits["train"][:8000]])
    raise ValueError(f"tokens: expected drift, text or phrases, got {name!r}")


FUNCTIONS: dict[str, Callable[..., float]] = {
    function.__name__: function for function in (
        collision_rate, divergence_bound, token_bits, bits_of_alphabet, quantisation, language,
    )
}  # fmt: skip
