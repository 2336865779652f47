"""The baseline memories against their equations, written out token by token, document by document."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmlab.memories import (
    attention,
    gated_linear,
    linear_attention,
    recurrent,
    strided,
    transformer_xl,
    window,
)
from hmlab.record import record
from hmlab.testing import check_memory

LENGTH = 29
CONFIGS = {
    "attention": attention.Config(dim=12, heads=3),
    "attention-paper": attention.Config(dim=10, heads=2, rotary=False, scale="dim", qkv_bias=False),
    "window": window.Config(dim=12, heads=3, window=5),
    "window-sinks": window.Config(dim=8, heads=2, window=4, sinks=3),
    "window-short": window.Config(dim=8, heads=2, window=2, sinks=5),
    "window-one": window.Config(dim=8, heads=1, window=1),
    "strided": strided.Config(dim=12, heads=3, stride=5),
    "strided-one": strided.Config(dim=8, heads=2, stride=1),
    "linear-attention": linear_attention.Config(dim=9, heads=3, chunk=6),
    "gated-linear": gated_linear.Config(dim=12, heads=3, chunk=8, temperature=1.0),
    "gru": recurrent.Config(dim=7, layers=2),
    "lstm": recurrent.Config(dim=7, cell="lstm", layers=2),
    "transformer-xl": transformer_xl.Config(dim=12, heads=3, segment=4, memory=6),
    "transformer-xl-short": transformer_xl.Config(dim=8, heads=2, segment=7, memory=2),
}


def build(name, dtype=torch.float64):
    memory = CONFIGS[name].build().to(dtype)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return memory


# One document, x [time, dim], token by token.


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
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + config.epsilon).sqrt()
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


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "packed-and-padded"])
def test_equation(name, masked, default_float64):
    memory = build(name)
    reset, valid = torch.zeros(2, LENGTH, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
    if masked:
        reset[0, [1, 13]] = reset[1, [0, 20, 21]] = True
        valid[0, [0, 5, 17]] = valid[1, [20, 27, 28]] = False
    x = torch.randn(2, LENGTH, memory.dim, requires_grad=True)
    want = by_document(memory, x, reset, valid)
    masks = {"reset": reset, "valid": valid} if masked else {}
    whole, _ = memory(x, **masks)
    first, state = memory(x[:, :11], **{key: mask[:, :11] for key, mask in masks.items()})
    last, _ = memory(x[:, 11:], state, **{key: mask[:, 11:] for key, mask in masks.items()})
    wanted, weights = [x, *memory.parameters()], torch.randn_like(want)
    gradients = torch.autograd.grad((want * weights).sum(), wanted)
    for got in (whole, torch.cat((first, last), 1)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        found = torch.autograd.grad((got * weights).sum(), wanted)
        torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["window-short", "window-one", "strided-one", "transformer-xl-short"])
def test_contract_at_the_edges(name):
    exact = not isinstance(CONFIGS[name], transformer_xl.Config)
    check_memory(CONFIGS[name], dtypes=[torch.float32], compile=False, exact_gradients=exact)


@pytest.mark.parametrize("name", ["transformer-xl", "transformer-xl-short"])
def test_gradient_stops_at_the_segment(name):
    memory = build(name)
    segment = memory.config.segment
    x = torch.randn(1, 2 * segment, memory.dim, dtype=torch.float64, requires_grad=True)
    _, state = memory(x[:, :-1])
    for last in (memory(x[:, -1:], state)[0], memory.step(x[:, -1], state)[0]):
        gradient = torch.autograd.grad(last.sum(), x, retain_graph=True)[0][0]
        assert gradient[:segment].abs().max() == 0
        assert gradient[segment:].abs().amin() > 0


@pytest.mark.parametrize(
    ("name", "fixed", "per_token"),
    [
        ("attention", 0, 2 * 12),
        ("window", 2 * 12 * 4, 0),
        ("window-sinks", 2 * 8 * (3 + 3), 0),
        ("strided", 2 * 4 * 5, 2 * 8),
        ("linear-attention", 9 * (3 + 1), 0),
        ("gated-linear", 12 * 12 // 6, 0),
        ("gru", 2 * 7, 0),
        ("lstm", 2 * 2 * 7, 0),
        ("transformer-xl", 12 * (6 + 4 - 1), 0),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_state_bytes(name, fixed, per_token, tokens):
    memory = build(name, torch.float32)
    _, state = memory(torch.randn(3, tokens, memory.dim))
    counter = 8 if hasattr(state, "position") else 0
    assert memory.state_bytes(state) == 3 * (4 * (fixed + per_token * tokens) + counter)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = (t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.numbers = max(self.numbers, *made, 0)
        return result


@pytest.mark.parametrize(
    ("config", "masks"),
    [
        (attention.Config(dim=4, heads=1), ("valid",)),
        (window.Config(dim=4, heads=1, window=16, sinks=2), ("reset", "valid")),
        (strided.Config(dim=4, heads=2, stride=64), ("reset", "valid")),
        (linear_attention.Config(dim=4, heads=1), ("reset", "valid")),
        (gated_linear.Config(dim=4, heads=1), ("reset", "valid")),
        (transformer_xl.Config(dim=4, heads=1, segment=16, memory=16), ("reset", "valid")),
    ],
    ids=lambda value: type(value).__module__.rpartition(".")[2] if hasattr(value, "dim") else "",
)
def test_nothing_is_quadratic_in_the_length(config, masks):
    memory, time = config.build(), 4096
    x = torch.randn(1, time, 4, requires_grad=True)
    mask = {"reset": torch.zeros(1, time, dtype=torch.bool), "valid": torch.ones(1, time, dtype=torch.bool)}
    with Largest() as largest:
        memory(x)[0].sum().backward()
        memory(x, **{name: mask[name] for name in masks})[0].sum().backward()
    assert largest.numbers <= time * time // 16


def test_closed_gates_neither_overflow_nor_leak(default_float64):
    memory = build("gated-linear", torch.float32)
    with torch.no_grad():
        memory.gate_up.bias.copy_(torch.linspace(-500, 20, len(memory.gate_up.bias)))
    x = torch.randn(2, LENGTH, memory.dim, dtype=torch.float32, requires_grad=True)
    y, _ = memory(x)
    gradients = torch.autograd.grad(y.sum(), [x, *memory.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    exact = memory.double()
    want = torch.stack([gated(exact, row) for row in x.double()])
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["attention", "window-sinks", "window-short", "strided", "transformer-xl"])
def test_recorded_attention_is_what_is_read(name, default_float64):
    """The weights, applied to each head's values, give y; packed documents see themselves alone."""
    memory = build(name)
    x = torch.randn(2, LENGTH, memory.dim)
    reset = torch.zeros(2, LENGTH, dtype=torch.bool)
    reset[1, 9] = True
    with record(memory) as recording:
        y, _ = memory(x, reset=reset)
    weights = torch.from_numpy(recording.dataset()["attention"].values[0]).double()
    assert weights.shape == (2, LENGTH, memory.heads, LENGTH)
    v = memory.kv(x).chunk(2, -1)[1] if name == "transformer-xl" else memory.qkv(x).chunk(3, -1)[2]
    read = torch.einsum("bthk,bkhd->bthd", weights, v.unflatten(-1, (memory.heads, -1)))
    torch.testing.assert_close(memory.output(read.flatten(2)), y, rtol=0, atol=1e-5)
    assert weights[1, 9:, :, :9].max() == 0
    assert weights.triu(1).max() >= 0 and weights.transpose(1, 2).triu(1).max() == 0


def test_long_sequences_record_no_attention_map():
    memory = attention.Config(dim=4, heads=1).build()
    with record(memory) as recording:
        memory(torch.randn(1, 2049, 4))
    assert "attention" not in recording.names_seen


@pytest.mark.parametrize("name", ["linear-attention", "gated-linear", "gru"])
def test_recorded_state_norm(name):
    memory = build(name, torch.float32)
    x = torch.randn(2, 9, memory.dim)
    with record(memory) as recording:
        memory(x)
    norms = torch.from_numpy(recording.dataset()["state_norm"].values[0])
    for t in (0, 4, 8):
        state = memory(x[:, : t + 1])[1]
        last = state.hidden[:, -1:] if name == "gru" else state.total
        torch.testing.assert_close(norms[:, t], last.flatten(1).norm(dim=1))


def test_recorded_gate():
    memory = build("gated-linear", torch.float32)
    x = torch.randn(2, 9, memory.dim)
    with record(memory) as recording:
        memory(x)
    alpha = torch.exp(F.logsigmoid(memory.gate_up(memory.gate_down(x))) / memory.config.temperature)
    gate = torch.from_numpy(recording.dataset()["gate"].values[0])
    torch.testing.assert_close(gate, alpha.detach().unflatten(-1, (3, -1)))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (attention.Config, {"dim": 10, "heads": 3}, "dim: expected a positive multiple of heads (3), got 10"),
        (attention.Config, {"dim": 9, "heads": 3}, "dim: expected an even number per head"),
        (attention.Config, {"dim": 8, "scale": "model"}, "scale: expected head or dim, got 'model'"),
        (attention.Config, {"dim": 8, "rotary_base": 1.0}, "rotary_base: expected more than 1, got 1.0"),
        (window.Config, {"dim": 8, "window": 0}, "window: expected at least 1, got 0"),
        (window.Config, {"dim": 8, "sinks": -1}, "sinks: expected at least 0, got -1"),
        (strided.Config, {"dim": 8, "heads": 1}, "heads: expected at least 2"),
        (strided.Config, {"dim": 8, "stride": 0}, "stride: expected at least 1, got 0"),
        (linear_attention.Config, {"dim": 8, "chunk": 0}, "chunk: expected at least 1, got 0"),
        (gated_linear.Config, {"dim": 8, "chunk": 48}, "chunk: expected a power of two, got 48"),
        (gated_linear.Config, {"dim": 12, "heads": 4}, "dim: expected an even number per head, got 12 for 4 heads"),
        (gated_linear.Config, {"dim": 8, "temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
        (recurrent.Config, {"dim": 8, "cell": "rnn"}, "cell: expected gru or lstm, got 'rnn'"),
        (recurrent.Config, {"dim": 8, "layers": 0}, "layers: expected at least 1, got 0"),
        (transformer_xl.Config, {"dim": 9, "heads": 3}, "dim: expected an even number for sines and cosines, got 9"),
        (transformer_xl.Config, {"dim": 8, "segment": 0}, "segment: expected at least 1, got 0"),
    ],
)
@pytest.mark.unchecked
def test_configuration_errors(config, fields, message):
    with pytest.raises(ValueError) as error:
        config(**fields)
    assert message in str(error.value)
