"""The equations of the baseline memories written out: one document, x [time, dim], token by token."""

import math

import torch

from hmlab.memories import attention, gated_linear, linear_attention, recurrent, strided, transformer_xl, window


def attended(memory, x):
    """Softmax attention over the tokens that the configuration makes visible, one score at a time."""
    config, heads = memory.config, memory.heads
    width = memory.dim // heads
    q, k, v = (t.reshape(len(x), heads, width) for t in memory.qkv(x).split(memory.dim, -1))
    if getattr(config, "rotary", True):
        pairs = torch.arange(width // 2, dtype=x.dtype)
        turn = torch.exp(1j * torch.arange(len(x))[:, None, None] * config.rotary_base ** (-2 * pairs / width))
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        q, k = (torch.cat((t.real, t.imag), -1) for t in (q, k))
    scale = 1 / math.sqrt(memory.dim if getattr(config, "scale", "head") == "dim" else width)
    y = torch.zeros_like(v)
    for i in range(len(x)):
        for h in range(heads):
            seen = [j for j in range(i + 1) if visible(config, h, i, j)]
            weights = torch.softmax(torch.stack([q[i, h] @ k[j, h] * scale for j in seen]), 0)
            y[i, h] = sum(w * v[j, h] for w, j in zip(weights, seen, strict=True))
    return memory.output(y.flatten(1))


def visible(config, head, i, j):
    if isinstance(config, window.Config):
        return i - j < config.window or j < config.sinks
    if isinstance(config, strided.Config):
        near = head < config.heads // 2
        return i - j <= config.stride if near else (i - j) % config.stride == 0
    return True


def linearly_attended(memory, x):
    width = memory.dim // memory.heads
    q, k, v = (t.reshape(len(x), memory.heads, width) for t in memory.qkv(x).split(memory.dim, -1))
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    total, normaliser = torch.zeros(memory.heads, width, width), torch.zeros(memory.heads, width)
    y = []
    for t in range(len(x)):
        total = total + k[t][:, :, None] * v[t][:, None, :]
        normaliser = normaliser + k[t]
        y.append((q[t][:, :, None] * total).sum(1) / ((q[t] * normaliser).sum(1, keepdim=True) + 1e-6))
    return memory.output(torch.stack(y).flatten(1))


def gated(memory, x):
    heads, config = memory.heads, memory.config
    q, k = (t.unflatten(-1, (heads, -1)) for t in memory.qk(x).chunk(2, -1))
    v = memory.v(x).unflatten(-1, (heads, -1))
    alpha = torch.sigmoid(memory.gate_up(memory.gate_down(x))).unflatten(-1, (heads, -1)) ** (1 / config.temperature)
    total, y = torch.zeros(heads, q.shape[-1], v.shape[-1]), []
    for t in range(len(x)):
        total = alpha[t][:, :, None] * total + k[t][:, :, None] * v[t][:, None, :]
        o = (q[t][:, :, None] * total).sum(1)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + memory.norm.eps).sqrt()
        o = o * memory.norm.weight + memory.norm.bias
        swish = memory.swish(x[t])
        y.append(memory.output(o.flatten() * swish * torch.sigmoid(swish)))
    return torch.stack(y)


def recurred(memory, x):
    network = memory.network
    for layer in range(network.num_layers):
        w, u, b, c = (getattr(network, f"{part}_l{layer}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, cell, y = torch.zeros(memory.dim), torch.zeros(memory.dim), []
        for token in x:
            if memory.config.cell == "gru":
                (r, z, n), (hr, hz, hn) = (w @ token + b).chunk(3), (u @ h + c).chunk(3)
                r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
                h = (1 - z) * torch.tanh(n + r * hn) + z * h
            else:
                i, f, g, o = (w @ token + b + u @ h + c).chunk(4)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(cell)
            y.append(h)
        x = torch.stack(y)
    return x


def segmented(memory, x):
    config, heads = memory.config, memory.heads
    width, dim = memory.dim // heads, memory.dim
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    y = []
    for i in range(len(x)):
        begin = i // config.segment * config.segment
        seen = range(max(0, begin - config.memory), i + 1)
        hidden = torch.stack([x[j] if j >= begin else x[j].detach() for j in seen])
        k, v = (t.reshape(len(seen), heads, width) for t in memory.kv(hidden).split(dim, -1))
        angle = torch.tensor([i - j for j in seen])[:, None] * frequency
        r = memory.relative(torch.cat((angle.sin(), angle.cos()), -1)).reshape(len(seen), heads, width)
        q = memory.q(x[i]).reshape(heads, width)
        scores = ((q + memory.content_bias) * k + (q + memory.position_bias) * r).sum(-1) / math.sqrt(width)
        y.append(memory.output((scores.softmax(0)[..., None] * v).sum(0).flatten()))
    return torch.stack(y)


PLAIN = {
    attention.Attention: attended,
    window.WindowAttention: attended,
    strided.StridedAttention: attended,
    linear_attention.LinearAttention: linearly_attended,
    gated_linear.GatedLinear: gated,
    recurrent.Recurrent: recurred,
    transformer_xl.TransformerXL: segmented,
}


def by_document(memory, x, reset, valid):
    """The plain formulation, applied to each document by itself, without padding."""
    y = torch.zeros_like(x)
    for row in range(len(x)):
        documents, held = [], []
        for t in range(x.shape[1]):
            if reset[row, t]:
                documents, held = [*documents, held], []
            held = [*held, t] if valid[row, t] else held
        for tokens in filter(None, [*documents, held]):
            index = torch.tensor(tokens)
            y = y.index_put((torch.tensor(row), index), PLAIN[type(memory)](memory, x[row, index]))
    return y
