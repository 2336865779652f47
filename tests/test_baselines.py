"""The baseline memories against their equations, written out token by token, document by document."""

import pytest
import torch
import torch.nn.functional as F
from plain_baselines import by_document, gated
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


def test_gates_that_close_and_open_lose_no_digits(default_float64):
    """Nothing overflows, and a long-closed gate leaves the precision of an open one alone."""
    memory = build("gated-linear", torch.float32)
    keys = memory.gate_up.out_features
    x = torch.randn(2, LENGTH, memory.dim, dtype=torch.float32)
    x[..., :keys] = torch.where(torch.rand(2, LENGTH, keys) < 0.2, -2000.0, 0.5)  # the gates, and nothing else
    x.requires_grad_()
    with torch.no_grad():
        for layer in (memory.qk, memory.v, memory.swish):
            layer.weight[:, :keys] = 0
        memory.gate_down.weight.copy_(torch.eye(*memory.gate_down.weight.shape))
        memory.gate_up.weight.copy_(torch.eye(*memory.gate_up.weight.shape))
        memory.gate_up.bias.zero_()
    y, _ = memory(x)
    gradients = torch.autograd.grad(y.sum(), [x, *memory.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    exact = memory.double()
    want = torch.stack([gated(exact, row) for row in x.double()])
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5)


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
