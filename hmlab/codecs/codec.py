"""What a codec of segments is, what a code weighs, and how far it is from what it stands for.

A segment of S tokens goes in as keys and values; a `Code` comes out, which alone gives back

    `decode`       slots to attend to: score of a slot = scale · q·k̂ + log mass, masses sum to the tokens represented
    `reconstruct`  every token of the segment again, as well as the code knows it

    codec = MeanPool.Config().build()
    code = codec.encode(k, v, slots=4)      # k, v [batch, segments, segment, kv_heads, dim]
    k_hat, v_hat, mass, position = codec.decode(code)
    bits(code), codec.distortion(k, v, code).values

Units: bits, tokens (mass, position), shares of 1 (distortions). Errors: `ValueError` naming the argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hmlab_kernels.compress_segments import Slots
from jaxtyping import Float, Shaped
from torch import Tensor, nn

Segments = Float[Tensor, "batch segments segment kv_heads dim"]
Queries = Float[Tensor, "batch queries heads dim"]


class Code(NamedTuple):
    """k, v: the vectors that stand for a segment's keys and values, which a further codec may code in turn. side: what
    else it takes to read them, tensors and the sizes of tensors."""

    k: Shaped[Tensor, "batch segments rows code_heads width"]
    v: Shaped[Tensor, "batch segments rows code_heads width"]
    side: Any = ()


class Distortion(NamedTuple):
    """keys, values: squared error of the reconstruction over the variance. attention: squared error of the outputs of
    the probe queries over their square. mass: mean |`Codec.mass_error`|."""

    keys: Float[Tensor, ""]
    values: Float[Tensor, ""]
    attention: Float[Tensor, ""]
    mass: Float[Tensor, ""]


def bits(code: Any) -> int:
    """Size of a code: that of all tensors in it. Sizes of tensors, and what a codec learned, are not part of it."""
    if isinstance(code, Tensor):
        return 8 * code.element_size() * code.numel()
    return sum(map(bits, code)) if isinstance(code, tuple) else 0


class Codec(nn.Module):
    """Base of all: a codec gives `most`, `_encode` and `reconstruct`, and `decode` where slots are not tokens."""

    def most(self, segment: int, kv_heads: int, dim: int) -> int:
        """The greatest number of slots (ranks, heads, … as the codec says) that a segment can be coded with."""
        raise NotImplementedError

    def encode(self, k: Segments, v: Segments, slots: int | None = None) -> Code:
        """Code every segment with this many slots; None takes as many as there can be."""
        check_segments(k, v)
        most = self.most(*k.shape[2:])
        slots = most if slots is None else slots
        if not 1 <= slots <= most:
            raise ValueError(f"slots: expected 1 to {most} for segments of shape {list(k.shape[2:])}, got {slots}")
        return self._encode(k, v, slots)

    def _encode(self, k: Tensor, v: Tensor, slots: int) -> Code:
        raise NotImplementedError

    def reconstruct(self, code: Code) -> tuple[Segments, Segments]:
        """Keys and values of all tokens of the segments, from the code alone."""
        raise NotImplementedError

    def decode(self, code: Code) -> Slots:
        """k̂, v̂ `[batch, segments, slots, kv_heads, dim]`, mass and mean place in the segment without `dim`."""
        k, v = self.reconstruct(code)
        return Slots(k, v, *_tokens(k))

    def mass_error(self, q: Queries, k: Segments, code: Code) -> Float[Tensor, "batch queries heads segments"]:
        """Ẑ/Z - 1, Z = Σ_i exp(scale · q·k_i) over a segment's tokens and Ẑ = Σ_j mass_j exp(scale · q·k̂_j).

        -0.1: a tenth of the segment's attention mass is missing. Slots that are means never have too much (Jensen).
        scale: dim^-0.5. heads: a multiple of kv_heads.
        """
        exact, coded = (torch.logsumexp(_scores(q, slots), -1) for slots in (_identity(k, k), self.decode(code)))
        return torch.expm1(coded - exact)

    def distortion(self, k: Segments, v: Segments, code: Code, q: Queries | None = None) -> Distortion:
        """How far a code is from k and v. q: probes, each attends to all segments of its row; None takes k itself.

        Differentiable in what the codec learns. NaN where keys, values or outputs are all the same.
        """
        q = k.flatten(1, 2) if q is None else q
        keys, values = (_relative_error(x, y) for x, y in zip((k, v), self.reconstruct(code), strict=True))
        exact, coded = _attend(q, _identity(k, v)), _attend(q, self.decode(code))
        attention = (coded - exact).square().sum() / exact.square().sum()
        return Distortion(keys, values, attention, self.mass_error(q, k, code).abs().mean())


def _relative_error(x: Segments, y: Segments) -> Float[Tensor, ""]:
    x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
    return (x - y).square().sum() / (x - x.mean((0, 1, 2))).square().sum()


def _tokens(k: Segments) -> tuple[Tensor, Tensor]:
    """Mass and position of slots that are the tokens themselves."""
    mass = k.new_ones(k.shape[:-1], dtype=torch.promote_types(k.dtype, torch.float32))
    return mass, torch.arange(k.shape[2], device=k.device, dtype=mass.dtype)[:, None].expand_as(mass)


def _identity(k: Segments, v: Segments) -> Slots:
    return Slots(k, v, *_tokens(k))


def _scores(q: Queries, slots: Slots) -> Float[Tensor, "batch queries heads segments slots"]:
    """scale · q·k̂ + log mass; heads that share keys are neighbours."""
    kv_heads, heads = slots.k.shape[3], q.shape[2]
    if q.ndim != 4 or q.shape[0] != len(slots.k) or q.shape[3] != slots.k.shape[4] or heads % kv_heads:
        raise ValueError(f"q: expected [{len(slots.k)}, queries, a multiple of {kv_heads}, {slots.k.shape[4]}], "
                         f"got {list(q.shape)}")  # fmt: skip
    q, k = q.to(slots.mass.dtype).unflatten(2, (kv_heads, -1)), slots.k.to(slots.mass.dtype)
    scores = torch.einsum("bthgd,bsmhd->bthgsm", q, k) * q.shape[-1] ** -0.5
    # Written so that a mass of 0, which is a score of -inf, passes no NaN back.
    log_mass = torch.where(slots.mass > 0, slots.mass, 1).log().masked_fill(slots.mass <= 0, -torch.inf)
    log_mass = log_mass.permute(0, 3, 1, 2)[:, None, :, None]
    return (scores + log_mass).flatten(2, 3)


def _attend(q: Queries, slots: Slots) -> Float[Tensor, "batch queries heads dim"]:
    """Attention of every query to all slots of its row; zero where nothing has mass."""
    scores = _scores(q, slots).flatten(-2)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    share = torch.where(empty, 0, scores.masked_fill(empty, 0).softmax(-1))
    share = share.unflatten(2, (slots.v.shape[3], -1))
    return torch.einsum("bthgn,bnhd->bthgd", share, slots.v.flatten(1, 2).to(share.dtype)).flatten(2, 3)


class WholeSegment(Codec):
    """A codec with nothing to choose at a call: slots are the tokens, all of them."""

    def most(self, segment, kv_heads, dim):
        return segment

    def encode(self, k, v, slots=None):
        check_segments(k, v)
        if slots is not None and slots != k.shape[2]:
            raise ValueError(f"slots: expected all {k.shape[2]} tokens of the segment, got {slots}")
        return super().encode(k, v, slots)


class Identity(WholeSegment):
    """Ratio 1: the tokens as they are."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to choose."""

        def build(self) -> Identity:
            return Identity()

    def _encode(self, k, v, slots):
        return Code(k, v)

    def reconstruct(self, code):
        return code.k, code.v


def check_segments(k: Tensor, v: Tensor) -> None:
    """Refuse keys and values that are no segments of each other's shape."""
    if k.ndim != 5 or not k.is_floating_point():
        raise ValueError(f"k: expected floats [batch, segments, segment, kv_heads, dim], "
                         f"got {k.dtype} of shape {list(k.shape)}")  # fmt: skip
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: expected {k.dtype} {list(k.shape)} as k is, got {v.dtype} {list(v.shape)}")
    if 0 in k.shape[2:]:
        raise ValueError(f"k: expected at least one token, head and channel, got shape {list(k.shape)}")


def check_heads(config: object, kv_heads: int, dim: int) -> None:
    """Refuse keys of another shape than the one a codec was built for."""
    if (kv_heads, dim) != (config.kv_heads, config.dim):
        raise ValueError(f"k: expected {config.kv_heads} heads of {config.dim}, got {kv_heads} of {dim}")
