"""From whole segments to slots: how dense a segment is, how many slots it gets, and what they are.

    rule       log2 wanted = log2 budget - z,   z: standard deviations of the segment's density above the mean of those
               before it in the document
    policy     p_r = softmax_r(MLP(mean and variance of keys and values, densities) - |log2 wanted - log2 r|)
               ratio = argmax p, in training a Gumbel sample
    slots      k̂, v̂, mass = `compress_segments` with segment / ratio slots
    loss       weight · (Σ_r p_r (D_r + price · slots_r · budget / segment) - 0.05 · entropy(p) + mean_r D_r)
    price      += rate · (slots of the likeliest ratio · budget / segment - 1), never below 0

D_r: share of the variance of a segment's keys and values that r tokens per slot lose; its gradient goes to what
compresses alone, or keys would learn to be few. D needs no reconstruction: a token hands out mass 1, so Σ_i A_ij
|v_i - v̂_j|² summed over j is Σ_i |v_i|² - Σ_j mass_j |v̂_j|². A sampled ratio's slots carry the gradient of its
probability.

Source: Akbar 2025, HARMONY, `CompressionPolicy`; gradients through samples: Jang et al. 2017 (arXiv 1611.01144). The
rule is ours; alone, as policy "density", it serves without training, and what is learned begins as it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hmlab_kernels.compress_segments import Slots, compress_segments
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab import auxiliary
from hmlab.information import Statistics, segment_density
from hmlab.memories.harmony.config import HierarchyConfig

HIDDEN = 32  # of the policy's network
CLASSES = 64  # of the head that predicts tokens for the density "cross_entropy"; ids are taken modulo them
ENTROPY = 0.05  # keeps the policy from deciding before it has seen what a decision costs
BITS = 8.0  # what densities are divided by, so that the network sees numbers about 1


class Compressed(NamedTuple):
    """slots: nothing beyond `count`. density: the policy's first one, in bits. moments: sums of it and its square."""

    slots: Slots
    count: Int[Tensor, "rows segments"]
    ratio: Int[Tensor, "rows segments"]
    density: Float[Tensor, "rows segments"] | None
    statistics: Statistics | None
    moments: Float[Tensor, "rows 2"]


class Compressor(nn.Module):
    """Policy and codec of the medium tier."""

    def __init__(self, config: HierarchyConfig, *, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.chooses = config, len(config.ratios) > 1
        self.learned = self.chooses and config.policy == "learned"
        self.register_buffer("counts", torch.tensor(config.counts), persistent=False)
        self.measures = config.density() if self.chooses and config.densities else None
        features = 2 * kv_heads * head_dim
        if config.codec == "learned":
            # Keys have unit norm or so: this long, a query tells their directions apart from the beginning.
            self.queries = nn.Parameter(4 * torch.randn(kv_heads, config.most, head_dim))
        else:
            self.codec = _codec(config, kv_heads, head_dim)
        if self.measures and "cross_entropy" in config.densities:
            self.head = nn.Linear(features, CLASSES)
        if self.learned:
            last = nn.Linear(HIDDEN, len(config.ratios))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            seen = features + 2 * kv_heads + len(config.densities)
            self.policy = nn.Sequential(nn.Linear(seen, HIDDEN), nn.SiLU(), last)
            self.register_buffer("price", torch.tensor(0.1))

    def init_statistics(self, batch: int, device: torch.device | str | None) -> Statistics:
        """Before the first token; of no size where nothing is counted."""
        if self.measures is None:
            none = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            return Statistics(none, none.clone(), torch.zeros(batch, dtype=torch.int64, device=device), none.clone())
        return self.measures.init_statistics(batch, device=device)

    def forward(
        self, k: Float[Tensor, "rows time kv_heads dim"], v: Float[Tensor, "rows time kv_heads dim"],
        tokens: Int[Tensor, "rows time"] | None, complete: Bool[Tensor, "rows segments"],
        first: Int[Tensor, "rows segments"], number: Int[Tensor, "rows segments"], statistics: Statistics,
        moments: Float[Tensor, "rows 2"],
    ) -> Compressed:
        """k, unrotated, and v of aligned segments. complete: the others become nothing, and count nowhere. first:
        tokens of a segment that are left out, as sinks. number: of the segment in its document."""
        density = None
        if self.measures is not None:
            counted = complete.repeat_interleave(self.config.segment, 1)
            density, statistics = self._density(k, v, tokens, counted, statistics)
        choice, moments, logits = self._choose(k, v, density, complete, number, moments)
        count = torch.where(complete, self.counts.to(choice.device)[choice], 0)
        slots = self._slots(k, v, count, first)
        if logits is not None and self.training and auxiliary.collecting():
            auxiliary.add("compression", lambda: self._loss(k.detach(), v.detach(), first, complete, logits))
            gate = self._gate(logits, choice)[:, :, None, None]
            slots = slots._replace(v=slots.v * gate[..., None].to(v.dtype), mass=slots.mass * gate)
        ratio = self.config.segment // self.counts.to(choice.device)[choice]
        observed = None if density is None else density[..., 0]
        return Compressed(slots, count, ratio, observed, statistics, moments)

    def _density(self, k, v, tokens, counted, statistics
                 ) -> tuple[Float[Tensor, "rows segments densities"], Statistics]:
        logits = None
        if "cross_entropy" in self.config.densities:
            logits = self.head(torch.cat((k, v), 2).flatten(2).detach())
            if self.training:
                auxiliary.add("next_token", lambda: self._head_loss(logits, tokens, counted))
        if tokens is None:  # only the keys' spectrum is measured, and ids are not looked at
            tokens = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
        # A row that holds NaN must not stop the others' eigenvalues from being found.
        keys = k.detach().nan_to_num().transpose(1, 2)
        density, statistics = segment_density(
            tokens, statistics, self.measures, keys=keys, valid=counted,
            logits=None if logits is None else logits.detach())  # fmt: skip
        return density.to(torch.promote_types(k.dtype, torch.float32)), statistics

    def _head_loss(self, logits: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
        targets = torch.where(counted[:, 1:] & counted[:, :-1], tokens[:, 1:] % CLASSES, -100)
        if not (targets >= 0).any():
            return logits.sum() * 0
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())

    def _choose(self, k, v, density, complete, number, moments):
        """The ratio of each segment by its place among `ratios`; moments after; the policy's logits, if it has some."""
        if not self.chooses:
            return torch.zeros_like(number), moments, None
        wanted, moments = self._wanted(density, complete, number, moments)
        ratios = torch.tensor([math.log2(r) for r in self.config.ratios], device=k.device, dtype=wanted.dtype)
        logits = -(wanted[..., None] - ratios).abs()
        if not self.learned:
            return logits.argmax(-1), moments, None
        each = torch.cat((k, v), 2).detach().unflatten(1, (-1, self.config.segment))
        mean = each.mean(2)
        seen = [mean.flatten(2), each.square().sum(-1).mean(2) - mean.square().sum(-1)]
        if density is not None:
            seen.append((density / BITS).to(mean.dtype))
        logits = logits + self.policy(torch.cat(seen, -1))
        if self.training and auxiliary.collecting():
            # A Gumbel sample: every ratio is tried as often as it is thought likely.
            noise = -torch.empty_like(logits).exponential_().log()
            return (logits + noise).argmax(-1), moments, logits
        return logits.argmax(-1), moments, logits

    def _wanted(self, density, complete, number, moments) -> tuple[Float[Tensor, "rows segments"], Tensor]:
        """log2 of the ratio by the density alone: the budget's for a segment like those before it."""
        budget = math.log2(self.config.budget)
        if density is None:
            return moments.new_full(number.shape, budget), moments
        bits = torch.where(complete, density[..., 0], 0)
        sums = torch.stack((bits, bits.square()), -1).cumsum(1) + moments[:, None]
        before = torch.cat((moments[:, None], sums[:, :-1]), 1) / number.clamp(min=1)[..., None]
        deviation = (before[..., 1] - before[..., 0].square()).clamp(min=0).sqrt()
        z = torch.where((number > 1) & (deviation > 0), (bits - before[..., 0]) / deviation.clamp(min=1e-6), 0)
        return budget - z, sums[:, -1].to(moments.dtype).clone()

    def _slots(self, k, v, count, first) -> Slots:
        segment, most = self.config.segment, self.config.most
        if self.config.codec == "learned":
            return compress_segments(k, v, self.queries.to(k.dtype), count[..., None], segment=segment, first=first,
                                     scale=1.0)  # fmt: skip
        k, v = (x.unflatten(1, (-1, segment)) for x in (k, v))
        chosen: Slots | None = None
        for slots in self.config.counts:
            made = self.codec.decode(self.codec.encode(k, v, slots))
            made = Slots(*(_filled(x, most) for x in made))
            here = (count == slots)[:, :, None, None]
            made = Slots(*(torch.where(here[..., None] if x.ndim == 5 else here, x, 0) for x in made))
            chosen = made if chosen is None else Slots(*(a + b for a, b in zip(chosen, made, strict=True)))
        return chosen

    def _gate(self, logits: Tensor, choice: Tensor) -> Float[Tensor, "rows segments"]:
        """1, with the gradient of the probability of what was chosen: slots that help make their ratio likelier."""
        share = logits.float().softmax(-1).gather(-1, choice[..., None])[..., 0]
        return 1 + share - share.detach()

    def _distortion(self, k: Tensor, v: Tensor, slots: Slots) -> Float[Tensor, "rows segments"]:
        lost = []
        for x, made in ((k, slots.k), (v, slots.v)):
            x = x.float().unflatten(1, (-1, self.config.segment))
            total = (x - x.mean(2, keepdim=True)).square().sum((2, 3, 4))
            mean = (slots.mass[..., None] * made.float()).sum(2, keepdim=True) / self.config.segment
            kept = (slots.mass[..., None] * (made.float() - mean).square()).sum((2, 3, 4))
            lost.append(1 - kept / total.clamp(min=1e-6))
        return (lost[0] + lost[1]) / 2

    def _loss(self, k, v, first, complete, logits) -> Tensor:
        """What teaches the policy its price, and every number of slots to lose little; moves the price."""
        c, number, soft = self.config, complete.sum().clamp(min=1), logits.float().softmax(-1)
        distortion = torch.stack([
            self._distortion(k, v, self._slots(k, v, torch.where(complete, slots, 0), first))
            for slots in self.config.counts], -1)  # fmt: skip
        cost = self.counts.to(soft.device) * c.budget / c.segment
        entropy = -(soft * soft.clamp(min=1e-9).log()).sum(-1)
        expected = (soft * (distortion.detach() + self.price * cost)).sum(-1) - ENTROPY * entropy
        teaching = torch.is_grad_enabled()
        with torch.no_grad():
            spent = torch.where(complete, cost[logits.argmax(-1)], 0).sum() / number
            if teaching and complete.any():
                self.price.add_(c.controller_rate * (spent - 1)).clamp_(min=0)
        return c.distortion_weight * torch.where(complete, expected + distortion.mean(-1), 0).sum() / number


def _filled(x: Tensor, most: int) -> Tensor:
    """With empty slots behind, `most` in all."""
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, most - x.shape[2]))


def _codec(c: HierarchyConfig, kv_heads: int, dim: int) -> nn.Module:
    from hmlab import codecs

    match c.codec:
        case "mean_pool":
            return codecs.MeanPool.Config().build()
        case "strided_convolution":
            return codecs.StridedConvolution.Config(dim=dim, kv_heads=kv_heads, ratios=c.ratios).build()
        case "k_means":
            return codecs.KMeans.Config().build()
        case "landmarks":
            return codecs.Landmarks.Config().build()
