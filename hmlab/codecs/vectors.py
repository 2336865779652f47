"""Codecs that keep every token and spend fewer numbers on it: low rank, principal components, sparse codes.

Sources: truncated SVD: Eckart and Young 1936, The Approximation of One Matrix by Another of Lower Rank; PCA: Hotelling
1933; sparse codes: Pati, Rezaiifar and Krishnaprasad 1993, Orthogonal Matching Pursuit, over a dictionary updated by
the method of optimal directions of Engan, Aase and Husøy 1999.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from hmlab.codecs.codec import Code, Codec, Segments, check_heads
from hmlab.codecs.packing import pack, unpack, width_of
from hmlab.layers import check_positive


class TruncatedSVD(Codec):
    """X ≈ (U √Σ)(V √Σ)^T with the first m singular values of each segment and head. slots: m, the rank.

    A code's rows are those of the two factors, S + dim of m numbers: smaller than the tokens for m < S·dim / (S + dim).
    A lower rank is a prefix of the columns. side: S.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to choose."""

        def build(self) -> TruncatedSVD:
            return TruncatedSVD()

    def most(self, segment, kv_heads, dim):
        return min(segment, dim)

    def _encode(self, k, v, slots):
        return Code(self._factors(k, slots), self._factors(v, slots), (k.shape[2],))

    def _factors(self, x: Tensor, rank: int) -> Float[Tensor, "batch segments rows kv_heads rank"]:
        precise = x.transpose(2, 3).to(torch.promote_types(x.dtype, torch.float32))
        left, values, right = torch.linalg.svd(precise, full_matrices=False)
        factors = torch.cat((left, right.mT), -2)[..., :rank] * values[..., None, :rank].sqrt()
        return factors.transpose(2, 3).to(x.dtype)

    def reconstruct(self, code):
        (segment,) = code.side
        return tuple(torch.einsum("bsthr,bsdhr->bsthd", x[:, :, :segment], x[:, :, segment:]) for x in code[:2])


class PCA(Codec):
    """Each token by its first m coordinates in a basis of principal components that all segments share.

    slots: m, components. Fewer are a prefix. `fit` computes basis and mean of each head; before it, they are the
    channels themselves and 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """dim: of a head."""

        dim: int
        kv_heads: int

        def __post_init__(self) -> None:
            check_positive(self, "dim", "kv_heads")

        def build(self) -> PCA:
            return PCA(self)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        basis = torch.eye(config.dim).repeat(2, config.kv_heads, 1, 1)
        self.basis = nn.Parameter(basis, requires_grad=False)  # [keys and values, kv_heads, dim, components]
        self.mean = nn.Parameter(basis.new_zeros(basis.shape[:-1]), requires_grad=False)

    @torch.no_grad()
    def fit(self, k: Segments, v: Segments) -> PCA:
        """Set basis and mean to those of these tokens."""
        self.most(*k.shape[2:])
        tokens = torch.stack((k, v)).flatten(1, 3).transpose(1, 2).double()
        mean = tokens.mean(2)
        centred = tokens - mean[:, :, None]
        self.basis.copy_(torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(-1))
        self.mean.copy_(mean)
        return self

    def most(self, segment, kv_heads, dim):
        check_heads(self.config, kv_heads, dim)
        return dim

    def _encode(self, k, v, slots):
        parts = zip((k, v), self.basis.to(k.dtype), self.mean.to(k.dtype), strict=True)
        return Code(*(torch.einsum("bsthd,hdm->bsthm", x - mean, basis[..., :slots]) for x, basis, mean in parts))

    def reconstruct(self, code):
        parts = zip(code[:2], self.basis.to(code.k.dtype), self.mean.to(code.k.dtype), strict=True)
        return tuple(torch.einsum("bsthm,hdm->bsthd", x, basis[..., : x.shape[-1]]) + mean for x, basis, mean in parts)


class SparseDictionary(Codec):
    """Each token as a combination of m atoms, found by orthogonal matching pursuit.

    slots: m, atoms of a token. The dictionary `[keys and values, kv_heads, atoms, dim]` is a parameter, drawn at
    random, learned by gradient or by `fit`; atoms are used at length 1.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """dim: of a head. atoms: of each head's dictionary."""

        dim: int
        kv_heads: int
        atoms: int

        def __post_init__(self) -> None:
            check_positive(self, "dim", "kv_heads", "atoms")

        def build(self) -> SparseDictionary:
            return SparseDictionary(self)

    class Side(NamedTuple):
        """keys, values: packed numbers of the tokens' atoms."""

        keys: UInt8[Tensor, "batch segments kv_heads bytes"]
        values: UInt8[Tensor, "batch segments kv_heads bytes"]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.atoms = nn.Parameter(torch.randn(2, config.kv_heads, config.atoms, config.dim))

    @torch.no_grad()
    def fit(self, k: Segments, v: Segments, *, slots: int, steps: int = 10) -> SparseDictionary:
        """Alternate codes of these tokens with the least-squares dictionary for them. Atoms nobody uses stay."""
        for _ in range(steps):
            code = self.encode(k, v, slots)
            for part, (tokens, weights, packed) in enumerate(zip((k, v), code[:2], code.side, strict=True)):
                atom = self._chosen(packed, weights)
                dense = weights.new_zeros(*weights.shape[:-1], self.config.atoms).scatter_(-1, atom, weights)
                dense, tokens = (rearrange(x, "b s t h w -> h (b s t) w").double() for x in (dense, tokens))
                best = torch.linalg.pinv(dense.mT @ dense, hermitian=True) @ (dense.mT @ tokens)
                used = dense.any(1)[..., None]
                self.atoms[part] = torch.where(used, best.to(self.atoms.dtype), self.atoms[part])
        return self

    def most(self, segment, kv_heads, dim):
        check_heads(self.config, kv_heads, dim)
        return min(dim, self.config.atoms)

    def _encode(self, k, v, slots):
        coded = [self._pursue(x, atoms, slots) for x, atoms in zip((k, v), self._dictionary(k.dtype), strict=True)]
        width = width_of(self.config.atoms)
        return Code(coded[0][0], coded[1][0], self.Side(*(pack(atom, width) for _, atom in coded)))

    def _chosen(self, packed: Tensor, weights: Tensor) -> Int[Tensor, "batch segments segment kv_heads slots"]:
        """The atoms of a code, one for each of its weights."""
        segment, slots = weights.shape[2], weights.shape[4]
        atom = unpack(packed, width_of(self.config.atoms), segment * slots).long()
        return rearrange(atom, "b s h (t m) -> b s t h m", m=slots)

    def _dictionary(self, dtype: torch.dtype) -> Float[Tensor, "two kv_heads atoms dim"]:
        return F.normalize(self.atoms, dim=-1).to(dtype)

    def _pursue(self, x: Tensor, atoms: Tensor, count: int
                ) -> tuple[Float[Tensor, "batch segments segment kv_heads slots"],
                           Int[Tensor, "batch segments kv_heads chosen"]]:
        """Weights and numbers of the atoms of every token: the atom nearest to what is left, then all weights anew."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        tokens, atoms = rearrange(x, "b s t h d -> h (b s t) d").to(dtype), atoms.to(dtype)
        left, head = tokens, torch.arange(len(atoms), device=x.device)[:, None, None]
        index = torch.empty(*tokens.shape[:2], 0, dtype=torch.int64, device=x.device)
        for _ in range(count):
            likeness = (left @ atoms.mT).abs().scatter(-1, index, -1)
            index = torch.cat((index, likeness.argmax(-1, keepdim=True)), -1)
            chosen = atoms[head, index]
            # Twice the same atom in a dictionary leaves the Gram matrix singular, and nothing for the second to do.
            gram = chosen @ chosen.mT + 4 * torch.finfo(dtype).eps * torch.eye(chosen.shape[2], device=x.device)
            weights = torch.linalg.solve(gram.to(dtype), chosen @ tokens[..., None])
            left = tokens - (weights.mT @ chosen)[..., 0, :]
        sizes = dict(zip("bst", x.shape[:3], strict=True))
        return (rearrange(weights[..., 0].to(x.dtype), "h (b s t) m -> b s t h m", **sizes),
                rearrange(index, "h (b s t) m -> b s h (t m)", **sizes))  # fmt: skip

    def reconstruct(self, code):
        head = torch.arange(self.config.kv_heads, device=code.k.device)[:, None]
        parts = zip(code[:2], self._dictionary(code.k.dtype), code.side, strict=True)
        return tuple(torch.einsum("bsthm,bsthmd->bsthd", x, atoms[head, self._chosen(packed, x)])
                     for x, atoms, packed in parts)  # fmt: skip
