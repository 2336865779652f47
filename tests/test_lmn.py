"""The Logarithmic Memory Network against the published formulation, its parameter counts and its own two modes."""

import pytest
import torch
from hmlab_kernels import default_impl
from hmlab_kernels.tree_attention import Level, tree_attention

from hmlab.memories import lmn
from hmlab.memories.lmn.authors import published_forward
from hmlab.model import parameters
from hmlab.record import record
from hmlab.registry import model_config

LENGTHS = (1, 2, 3, 31, 32, 33, 1000)
PUBLISHED = {  # LMN paper, table 1; the second GPT-2 count needs 256 positions
    ("logmem", 32): (71_489, {}),
    ("tinylogmem", 32): (42_305, {"ffn": "tied"}),
    ("expsum", 32): (71_489, {}),
    ("gpt2-paper", 32): (71_105, {}),
    ("logmem", 128): (1_072_193, {}),
    ("tinylogmem", 128): (677_441, {}),
    ("expsum", 128): (1_072_193, {}),
    ("gpt2-paper", 128): (841_281, {"context": "256"}),
}
VARIANTS = {
    "logmem": {},
    "one-bank": {"banks": 1},
    "expsum": {"banks": 1, "expansion": 1},
    "expsum-banks": {"banks": 2, "expansion": 2},
    "ternary": {"arity": 3},
    "branch-position": {"arity": 4, "depth": 2},
    "overlapping": {"kernel": 3},
    "overlapping-ternary-expsum": {"arity": 3, "kernel": 5, "expansion": 1},
    "depthwise": {"mixing": "depthwise"},
    "full": {"mixing": "full", "expansion": 1},
    "full-normalised": {"mixing": "full", "depth": 2, "normalise": True},
    "branch-position-expsum": {"arity": 4, "expansion": 1, "branch_position": True},
    "deep-normalised": {"depth": 3, "normalise": True},
}


def strong(config: lmn.Config, dtype: torch.dtype = torch.float64) -> lmn.LogarithmicMemory:
    """A memory whose summaries carry weight: at their start they are nearly zero and hide mistakes."""
    torch.manual_seed(0)
    memory = config.build().to(dtype)
    for parameter in memory.summarizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5 * config.dim**-0.5)
    return memory


@pytest.mark.parametrize(("name", "dim"), PUBLISHED)
def test_published_parameter_counts(name, dim):
    count, settings = PUBLISHED[name, dim]
    assert parameters(model_config(name, dim=dim, vocab=65, settings=settings).build()) == count


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("impl", ["reference", "eager", default_impl("tree_attention", "cpu")])
def test_agrees_with_the_published_formulation(length, impl):
    if impl == "reference" and length > 100:
        length = 100  # one position at a time
    memory = strong(lmn.Config(dim=32, impl=impl), torch.float32)
    x = torch.randn(2, length, 32)
    torch.testing.assert_close(memory(x)[0], published_forward(memory, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parallel_chunked_and_sequential_agree(variant):
    memory = strong(lmn.Config(dim=12, heads=3, **VARIANTS[variant]))
    generator = torch.Generator().manual_seed(1)
    for length in (1, 2, 3, 31, 32, 33, 130):
        x = torch.randn(2, length, 12, dtype=torch.float64, generator=generator)
        whole, final = memory(x)
        state, stepped = memory.init_state(2), []
        for token in x.unbind(1):
            y, state = memory.step(token, state)
            stepped.append(y)
        torch.testing.assert_close(torch.stack(stepped, 1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)
        state, chunks, at = None, [], 0
        while at < length:
            size = int(torch.randint(1, 9, (), generator=generator))
            y, state = memory(x[:, at : at + size], state)
            chunks.append(y)
            at += size
        torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_modes_agree_in_float32(length):
    memory = strong(lmn.Config(dim=32), torch.float32)
    x = torch.randn(1, length, 32)
    with torch.no_grad():
        whole, _ = memory(x)
        state, stepped = memory.init_state(1), []
        for token in x.unbind(1):
            y, state = memory.step(token, state)
            stepped.append(y)
        first, middle = memory(x[:, : length // 3])
        second, _ = memory(x[:, length // 3 :], middle)
    torch.testing.assert_close(torch.stack(stepped, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_state_holds_one_node_per_level_and_bank(length):
    memory = lmn.Config(dim=32, banks=2).build()
    _, state = memory(torch.randn(3, length, 32))
    nodes = 1 + 2 * (length.bit_length() - 1)
    counter = 8
    assert memory.state_bytes(state) == 3 * (nodes * 32 * 4 + counter)


@pytest.mark.parametrize("settings", [{}, {"expansion": 1, "banks": 1}, {"arity": 3}])
def test_gradients_agree_between_implementations(settings):
    results = []
    for impl in ("reference", "eager", "native"):
        memory = strong(lmn.Config(dim=12, heads=3, impl=impl, **settings))
        x = torch.randn(2, 37, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        weight = torch.linspace(-1, 1, 12, dtype=torch.float64)
        memory(x)[0].mul(weight).square().sum().backward()
        results.append([x.grad, *(p.grad for p in memory.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-11)


def test_native_gradients_are_the_same_bits_for_any_number_of_threads():
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = torch.randn(2, 700, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
            # Only the reading: matrix products may add up in another order.
            own, nodes = x.new_ones(2, 700, 3, 4, 4) * x.unflatten(-1, (1, 4, 4)), x.flatten(0, 1)
            levels = [Level(offset=0, batch=350, node=1, slot=700, slots=1, carry=0)]
            position = torch.arange(1, 701, dtype=torch.int32).expand(2, -1)
            y, _ = tree_attention(own, nodes.view(1400, 1, 4, 4).expand(-1, 2, -1, -1), position, levels, impl="native")
            found.append(torch.autograd.grad(y.square().sum(), x)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_recorded_nodes_summarise_the_tokens_they_name():
    """The last complete node of level i at 1-based position t spans [(t // 2^i - 1)·2^i, (t // 2^i)·2^i)."""
    memory = strong(lmn.Config(dim=12, heads=3))
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    with torch.no_grad(), record(memory) as recording:
        _, state = memory(x[:, :13])
        _, state = memory(x[:, 13:20], state)
        memory.step(x[:, 20], state)
    data = recording.dataset().isel(layer=0, batch=1)
    levels = data["level"].values
    assert list(levels) == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    for time in range(21):
        for node, level in enumerate(levels):
            complete = (time + 1) // 2**level
            expected = ((complete - 1) * 2**level, complete * 2**level) if complete else (-1, -1)
            at = data.isel(time=time, node=node)
            assert (int(at["span_start"]), int(at["span_end"])) == expected
            assert bool((at["attention"].fillna(0) > 0).all()) == (complete > 0)
    assert float(abs(data["attention"].sum("node") - 1).max()) < 1e-6


def test_authors_checkpoint_layout_loads():
    torch.manual_seed(0)
    E, K, layers, vocab = 16, 2, 2, 11
    ends = {"token_embedding_table.weight": (vocab, E), "lm_head.weight": (vocab, E), "lm_head.bias": (vocab,),
            "ln_f.weight": (E,), "ln_f.bias": (E,)}  # fmt: skip
    state = {key: torch.randn(shape) for key, shape in ends.items()}
    shapes = {"norm1.weight": (E,), "norm2.weight": (E,), "summarizer.weight": (K, 2 * E, E),
              "summarizer.bias": (1, K, 1, E), "qkv.weight": (3 * E, E), "qkv.bias": (3 * E,),
              "out_proj.weight": (E, E), "out_proj.bias": (E,), "feedforward.0.weight": (4 * E, E),
              "feedforward.0.bias": (4 * E,), "feedforward.2.weight": (E, 4 * E),
              "feedforward.2.bias": (E,)}  # fmt: skip
    for n in range(layers):
        state |= {f"blocks.{n}.{key}": 0.3 * torch.randn(shape) for key, shape in shapes.items()}
    model = lmn.load_authors_state(state).double()
    state = {key: value.double() for key, value in state.items()}
    tokens = torch.randint(vocab, (2, 45))

    x = state["token_embedding_table.weight"][tokens]
    for n, block in enumerate(model.blocks):
        at = {key: state[f"blocks.{n}.{key}"] for key in shapes}
        x = x + published_forward(block.memory, torch.nn.functional.rms_norm(x, (E,), at["norm1.weight"]))
        z = torch.nn.functional.rms_norm(x, (E,), at["norm2.weight"])
        z = torch.nn.functional.silu(z @ at["feedforward.0.weight"].T + at["feedforward.0.bias"])
        x = x + z @ at["feedforward.2.weight"].T + at["feedforward.2.bias"]
    x = torch.nn.functional.layer_norm(x, (E,), state["ln_f.weight"], state["ln_f.bias"])
    logits = x @ state["lm_head.weight"].T + state["lm_head.bias"]
    torch.testing.assert_close(model(tokens)[0], logits, rtol=1e-10, atol=1e-10)

    with pytest.raises(ValueError, match=r"blocks\.0\.gate"):
        lmn.load_authors_state(state | {"blocks.0.gate": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 5}, "dim: expected a multiple of heads"), ({"arity": 1}, "arity: expected at least 2"),
     ({"kernel": 1}, "kernel: expected at least arity"), ({"banks": 0}, "banks: expected at least 1")],
)  # fmt: skip
def test_configuration_errors_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        lmn.Config(dim=32, **settings)
