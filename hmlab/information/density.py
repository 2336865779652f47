"""Information density of the segments of token sequences, in bits, from the past and the segment alone.

Each row counts its tokens, and its pairs of neighbours, per document. Let n be the count so far of a token x in the
document, n' of its pair with the token before, n* of pairs that begin with that token, m of x among the last S tokens
before the segment; N and M the sums of n and m, K the buckets and c the concentration. The predictive distributions are
Dirichlet means, each with the next simpler one as its prior (MacKay & Peto 1995, A Hierarchical Dirichlet Language
Model):

    q(x) = (n + c / K) / (N + c)           q(x | previous token) = (n' + c q(x)) / (n* + c)
                                           q(x | previous segment) = (m + c q°(x)) / (M + c)

where q° leaves the previous segment out. Over the tokens of a segment with empirical distribution p:

    surprisal            mean of - log2 q(x), counts up to the token
    conditional_entropy  mean of - log2 q(x | previous token), counts up to the token
    mutual_information   mean of log2 q(x | previous segment) / q°(x), counts up to the segment: what the previous
                         segment tells of this one beyond what the document before both tells; may be negative
    kl, js               D(p ‖ q) and JS(p, q), counts up to the segment
    cross_entropy        mean of a head's - log2 softmax(logits), over the segment's tokens but the first
    spectral             `spectral_entropy` of the segment's keys, mean over heads: per segment, the others per token

Tokens are hashed into buckets: id modulo `table`, exact for no more ids than that; beyond it all is said of buckets.
Pairs are hashed as well; since a collision can only add to a count, a pair counts no more than either of its tokens.
Counts are int64. With a `horizon` they are forgotten: of two generations of that many tokens, the older weighs as much
of 1 as still lies within the last `horizon` tokens. Generations change between segments. Results have the default
dtype.
Errors: `ValueError` naming the field or the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmlab.information.measures import prediction_bits, spectral_entropy
from hmlab.information.statistics import Occurrences, Statistics, Stream, hash_pair


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """densities: names from `DENSITIES`. segment: S, tokens per segment. table: K, buckets of tokens; bigram_table: of
    pairs. concentration: c, how many tokens the prior weighs; 64 is near the shortest code of books, in bytes and in
    words, of 4K to 64K tokens. horizon: tokens until counts are forgotten, at least a segment; None: never.
    spectral_order: `order` of the spectral entropy."""

    densities: tuple[str, ...] = ("surprisal", "conditional_entropy", "mutual_information", "kl", "js")
    segment: int = 64
    table: int = 4096
    bigram_table: int = 65536
    concentration: float = 64.0
    horizon: int | None = None
    spectral_order: int = 1

    def __post_init__(self) -> None:
        for name in ("segment", "table", "bigram_table"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.densities or not set(self.densities) <= set(DENSITIES):
            raise ValueError(f"densities: expected some of {', '.join(DENSITIES)}, got {self.densities}")
        if not self.concentration > 0:
            raise ValueError(f"concentration: expected more than 0, got {self.concentration}")
        if self.horizon is not None and self.horizon < self.segment:
            raise ValueError(f"horizon: expected at least a segment ({self.segment}) or None, got {self.horizon}")
        if self.spectral_order not in (1, 2):
            raise ValueError(f"spectral_order: expected 1 or 2, got {self.spectral_order}")

    def init_statistics(self, batch: int, *, device: torch.device | str | None = None) -> Statistics:
        """Before the first token of `batch` rows."""
        generations = 1 if self.horizon is None else 2

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=torch.int64, device=device)

        return Statistics(zeros(generations, self.table), zeros(generations, self.bigram_table), zeros(),
                          zeros(self.segment) - 1)  # fmt: skip


def segment_density(
    tokens: Int[Tensor, "batch time"], statistics: Statistics, config: DensityConfig, *,
    keys: Float[Tensor, "batch heads time dim"] | None = None,
    logits: Float[Tensor, "batch time classes"] | None = None,
    reset: Bool[Tensor, "batch time"] | None = None, valid: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch segments densities"], Statistics]:
    """The densities that `config` names, for every segment of `time` tokens, and the statistics after the last.

    tokens: ids of at least 0; time: a multiple of the segment. keys: for "spectral". logits: for "cross_entropy", at
    each token the prediction of the next; with fewer classes than ids, of the id modulo the classes. reset: True where
    a document starts, at padding too. valid: False at padding, which counts nowhere; a row of nothing else keeps its
    statistics. A segment that documents share has the density of the last of them; one without tokens has density 0.
    """
    segments = Segments(tokens, statistics, config, keys=keys, logits=logits, reset=reset, valid=valid)
    return torch.stack([DENSITIES[name](segments) for name in config.densities], -1), segments.statistics()


def _once(compute: Callable[[Segments], Any]) -> property:
    """A property computed once; `functools.cached_property` holds a lock in Python 3.11, which no graph can."""

    def get(self: Segments) -> Any:
        if compute.__name__ not in self._known:
            self._known[compute.__name__] = compute(self)
        return self._known[compute.__name__]

    return property(get, doc=compute.__doc__)


class Segments:
    """What is known of the segments of a call: the argument of every function in `DENSITIES`.

    Arguments are those of `segment_density`. Only what is asked for is computed, and once.
    """

    def __init__(
        self, tokens: Int[Tensor, "batch time"], statistics: Statistics, config: DensityConfig, *,
        keys: Float[Tensor, "batch heads time dim"] | None = None,
        logits: Float[Tensor, "batch time classes"] | None = None,
        reset: Bool[Tensor, "batch time"] | None = None, valid: Bool[Tensor, "batch time"] | None = None,
    ) -> None:
        _check(tokens, statistics, config, keys, logits, reset, valid)
        self.config, self.tokens, self.keys, self.logits = config, tokens, keys, logits
        self._known: dict[str, Any] = {}
        self._stream = Stream(tokens, statistics, config.horizon, reset, valid)
        self._present = self._stream.present[:, config.segment :]
        self.counted = self._stream.cut(self._stream.counted)

    def mean(self, bits: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments"]:
        """Mean of bits per token over the tokens of each segment that count."""
        bits = torch.where(self.counted, self._stream.cut(bits), 0)
        return bits.sum(-1) / self.counted.sum(-1).clamp(min=1)

    @_once
    def _bucket(self) -> Int[Tensor, "batch time"]:
        return self.tokens % self.config.table

    @_once
    def _unigrams(self) -> Occurrences:
        return Occurrences(self._stream.tokens % self.config.table, self._stream.present)

    def _prior(self, n: Tensor, total: Tensor) -> Float[Tensor, "batch time"]:
        """q(x) from counts."""
        c = self.config.concentration
        return (n + c / self.config.table) / (total + c)

    def _count(self, end: Tensor) -> Tensor:
        """n up to a time."""
        return self._stream.running(self._unigrams, self._stream.held.unigrams, self._bucket, end)

    @_once
    def _count_at_token(self) -> Tensor:
        return self._count(self._stream.time)

    @_once
    def probability(self) -> Float[Tensor, "batch time"]:
        """q(x) of each token, counts up to it."""
        return self._prior(self._count_at_token, self._stream.running_total(self._stream.time))

    @_once
    def _pair(self) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        """Bucket of each token's pair with the one before it, and whether there is one."""
        bucket = hash_pair(self._stream.previous_tokens(), self.tokens, self.config.bigram_table)
        return bucket, self._present & (self._stream.previous >= 0)

    @_once
    def conditional_probability(self) -> Float[Tensor, "batch time"]:
        """q(x | previous token) of each token, counts up to it."""
        stream, size = self._stream, self.config.segment
        bucket, present = self._pair
        padded = torch.nn.functional.pad(bucket, (size, 0)), torch.nn.functional.pad(present, (size, 0))
        n = stream.running(Occurrences(*padded), stream.held.bigrams, bucket, stream.time)
        previous = stream.previous_tokens() % self.config.table
        context = stream.running(self._unigrams, stream.held.unigrams, previous, stream.time) - stream.previous_weight()
        n, context = (torch.where(present, t, 0) for t in (n, context))
        n = torch.minimum(torch.minimum(n, self._count_at_token), context)
        c = self.config.concentration
        return (n + c * self.probability) / (context + c)

    @_once
    def _before(self) -> tuple[Tensor, Tensor]:
        """n and N up to the segment."""
        return self._count(self._stream.part), self._stream.running_total(self._stream.part)

    @_once
    def global_probability(self) -> Float[Tensor, "batch time"]:
        """q(x) of each token, counts up to its segment."""
        return self._prior(*self._before)

    @_once
    def _local_count(self) -> Int[Tensor, "batch time"]:
        """Occurrences of each token in its segment."""
        stream = self._stream
        end = stream.at_segment_end(stream.time) + 1
        return self._unigrams.count(self._bucket, stream.part, end).clamp(min=1)

    @_once
    def local_probability(self) -> Float[Tensor, "batch time"]:
        """p(x) of each token in its segment."""
        size = self.counted.sum(-1, keepdim=True).clamp(min=1).expand(self.counted.shape).flatten(1)
        return self._local_count / size

    @_once
    def information_gain(self) -> Float[Tensor, "batch time"]:
        """log2 q(x | previous segment) / q°(x) of each token."""
        stream, c = self._stream, self.config.concentration
        start = stream.recent_start()
        m, size = self._unigrams.count(self._bucket, start, stream.part), stream.number(start, stream.part)
        n, total = self._before
        # Forgetting weighs what is left of the older generation less than it weighs here.
        older = self._prior((n - m).clamp(min=0), (total - size).clamp(min=0))
        return ((m + c * older) / ((size + c) * older)).log2()

    def statistics(self) -> Statistics:
        """After the last segment."""
        held = self._stream.held
        return self._stream.after(self._stream.update(held.unigrams, self._bucket, self._present),
                                  self._stream.update(held.bigrams, *self._pair))  # fmt: skip


def surprisal(segments: Segments) -> Float[Tensor, "batch segments"]:
    return segments.mean(-segments.probability.log2())


def conditional_entropy(segments: Segments) -> Float[Tensor, "batch segments"]:
    return segments.mean(-segments.conditional_probability.log2())


def mutual_information(segments: Segments) -> Float[Tensor, "batch segments"]:
    return segments.mean(segments.information_gain)


def kl(segments: Segments) -> Float[Tensor, "batch segments"]:
    return segments.mean((segments.local_probability / segments.global_probability).log2())


def js(segments: Segments) -> Float[Tensor, "batch segments"]:
    # What lies outside the segment has p = 0, and gives q log2(q / ½q) = q without being looked at.
    p, q = segments.local_probability, segments.global_probability
    mean = (p + q) / 2
    inside = segments.mean((p / mean).log2() + q / p * (q / mean).log2() - q / p)
    return torch.where(segments.counted.any(-1), (inside + 1) / 2, 0)


def spectral(segments: Segments) -> Float[Tensor, "batch segments"]:
    if segments.keys is None:
        raise ValueError("keys: expected [batch, heads, time, dim] for spectral, got None")
    counted = segments.counted
    keys = segments.keys.unflatten(2, counted.shape[1:])
    # Rows of zeros leave the spectrum as it is.
    keys = torch.where(counted[:, None, :, :, None], keys, 0)
    return spectral_entropy(keys, segments.config.spectral_order).mean(1)


def cross_entropy(segments: Segments) -> Float[Tensor, "batch segments"]:
    if segments.logits is None:
        raise ValueError("logits: expected [batch, time, classes] for cross_entropy, got None")
    counted = segments.counted
    logits = segments.logits.unflatten(1, counted.shape[1:])[:, :, :-1]
    targets = segments.tokens.unflatten(1, counted.shape[1:])[:, :, 1:]
    # The prediction of a segment's first token was made before it.
    pairs = counted[:, :, 1:] & counted[:, :, :-1]
    bits = prediction_bits(torch.where(pairs[..., None], logits, 0), targets)
    return torch.where(pairs, bits, 0).sum(-1) / pairs.sum(-1).clamp(min=1)


# Each maps `Segments` to bits `[batch, segments]`.
DENSITIES: dict[str, Callable[[Segments], Tensor]] = {
    f.__name__: f for f in (surprisal, conditional_entropy, mutual_information, kl, js, spectral, cross_entropy)
}


def _check(tokens: Tensor, statistics: Statistics, config: DensityConfig, keys: Tensor | None, logits: Tensor | None,
           reset: Tensor | None, valid: Tensor | None) -> None:
    if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] % config.segment:
        raise ValueError(f"tokens: expected integers [batch, a multiple of {config.segment}], "
                         f"got {tokens.dtype} {list(tokens.shape)}")  # fmt: skip
    batch, time = tokens.shape
    generations = 1 if config.horizon is None else 2
    expected = ([batch, generations, config.table], [batch, generations, config.bigram_table], [batch],
                [batch, config.segment])  # fmt: skip
    for name, held, shape in zip(Statistics._fields, statistics, expected, strict=True):
        if list(held.shape) != shape:
            raise ValueError(f"statistics: expected {name} {shape}, got {list(held.shape)}")
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape):
            raise ValueError(f"{name}: expected bool {[batch, time]}, got {mask.dtype} {list(mask.shape)}")
    if keys is not None and (keys.ndim != 4 or (keys.shape[0], keys.shape[2]) != (batch, time)):
        raise ValueError(f"keys: expected [{batch}, heads, {time}, dim], got {list(keys.shape)}")
    if logits is not None and (logits.ndim != 3 or logits.shape[:2] != tokens.shape):
        raise ValueError(f"logits: expected [{batch}, {time}, classes], got {list(logits.shape)}")
