"""Compressed segments in vectorised PyTorch on any device, some segments at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers in the keys, or the shares, of the segments held at once; on a CPU they then stay in its caches.
_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ELSEWHERE = 1 << 25


def forward(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: Tensor, segment: int,
            scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    shape = (batch, len(starts), queries.shape[1], heads)
    sums = torch.promote_types(k.dtype, torch.float32)
    all_k, all_v = (k.new_empty(*shape, dim) for _ in range(2))
    all_mass, position = (k.new_empty(shape, dtype=sums) for _ in range(2))
    for b, some, keys, values, unread in _segments(k, v, queries, count, first, starts, segment):
        _, mean, mass, spare, _ = _shares(keys, queries.to(sums), count[b, some], unread, scale)
        place = torch.arange(segment, dtype=sums, device=k.device)
        # Filled, as no weight is small enough to take a NaN away.
        all_k[b, some] = (mean @ keys).masked_fill_(spare, 0).transpose(1, 2)
        all_v[b, some] = (mean @ values).masked_fill_(spare, 0).transpose(1, 2)
        all_mass[b, some] = mass.mT
        position[b, some] = (mean @ place).mT
    return all_k, all_v, all_mass, position


def backward(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: Tensor, segment: int,
             scale: float, grad_k: Tensor, grad_v: Tensor, grad_mass: Tensor, grad_position: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.promote_types(k.dtype, torch.float32)
    into_k, into_v = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    rows = queries.to(sums)
    into_queries = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    place = torch.arange(segment, dtype=sums, device=k.device)
    for b, some, keys, values, unread in _segments(k, v, queries, count, first, starts, segment):
        share, mean, _, spare, identity = _shares(keys, rows, count[b, some], unread, scale)
        from_k, from_v = (g[b, some].transpose(1, 2).to(sums).masked_fill(spare, 0) for g in (grad_k, grad_v))
        from_mass, from_position = (
            g[b, some].mT[..., None].to(sums).masked_fill(spare, 0) for g in (grad_mass, grad_position)
        )
        pull = from_k @ keys.mT + from_v @ values.mT + from_position * place
        # by log A, through the softmax over tokens and the mass; then through the softmax over slots
        by_log = mean * (pull - (mean * pull).sum(-1, keepdim=True)) + share * from_mass
        by_log.masked_fill_(spare, 0)
        by_logit = scale * (by_log - share * by_log.sum(-2, keepdim=True)).masked_fill(spare | identity, 0)
        tokens = _tokens(starts[some], segment)
        for into, by in ((into_k, mean.mT @ from_k + by_logit.mT @ rows), (into_v, mean.mT @ from_v)):
            into[b].index_copy_(0, tokens, by.transpose(1, 2).flatten(0, 1).to(k.dtype))
        into_queries += (by_logit @ keys).masked_fill_(spare | identity, 0).sum(0)
    return into_k, into_v, into_queries.to(queries.dtype)


def _shares(keys: Tensor, queries: Tensor, count: Tensor, unread: Tensor, scale: float
            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of segments `[segments, heads, segment, dim]`: A and A / mass `[segments, heads, most, segment]`, the mass,
    which slots `[segments, heads, most, 1]` hold nothing, which segments `[segments, heads, 1, 1]` stay as they are."""
    segment, most = keys.shape[2], queries.shape[1]
    count = count[:, :, None, None]
    slot = torch.arange(most, device=keys.device)[:, None]
    spare = slot >= count
    identity = (count >= segment) & (most == segment)
    if most == segment:
        spare = spare | (identity & unread)  # slots are tokens there
    logits = torch.einsum("hmd,ghid->ghmi", queries, keys) * scale
    log_share = logits.masked_fill_(spare, -torch.inf)
    total = log_share.logsumexp(2, keepdim=True)
    log_share = (log_share - total).masked_fill_(spare | unread.mT, -torch.inf)
    share = log_share.exp()
    top = log_share.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    mean = (log_share - top).exp()
    total = mean.sum(-1, keepdim=True)
    mean /= torch.where(total > 0, total, 1)
    mass = (total * top.exp())[..., 0]
    if most == segment:
        tokens = torch.eye(segment, dtype=mean.dtype, device=mean.device)
        mean = torch.where(identity, tokens, mean).masked_fill_(spare, 0)
        mass = torch.where(identity[..., 0], 1, mass).masked_fill_(spare[..., 0], 0)
    return share, mean, mass, spare, identity


def _segments(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: Tensor, segment: int
              ) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Row, which segments, their keys and values `[segments, heads, segment, dim]` in at least float32, and which of
    their tokens are not read `[segments, heads, segment or 1, 1]`: zeros there."""
    batch, _, heads, dim = k.shape
    sums = torch.promote_types(k.dtype, torch.float32)
    most = _ELEMENTS.get(k.device.type, _ELEMENTS_ELSEWHERE)
    place = torch.arange(segment, device=k.device)[:, None]
    step = max(1, most // (heads * segment * max(dim, queries.shape[1])))
    for b in range(batch):
        for begin in range(0, len(starts), step):
            some = slice(begin, min(begin + step, len(starts)))
            tokens = _tokens(starts[some], segment)
            unread = (count[b, some] <= 0)[:, :, None, None]
            if first is not None:
                unread = unread | (place < first[b, some, None, None, None])
            # index_select copies whole rows, several times as fast as an index does
            keys, values = (
                x[b].index_select(0, tokens).unflatten(0, (-1, segment)).transpose(1, 2).to(sums)
                .masked_fill_(unread, 0) for x in (k, v)
            )  # fmt: skip
            yield b, some, keys, values, unread


def _tokens(starts: Tensor, segment: int) -> Tensor:
    return (starts[:, None] + torch.arange(segment, device=starts.device)).flatten()
