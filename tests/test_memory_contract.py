"""Every memory keeps the contract: the library's own in several configurations, others' as they are, the template."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from hmlab.registry import memory_configs
from hmlab.templates import my_memory
from hmlab.testing import POINTS, check_memory

# Small enough that every chunk, window, segment and stride is crossed several times by 33 tokens.
HARMONY = {"heads": 2, "window": 6, "segment": 4, "ratios": (1, 2, 4), "budget": 2.0, "capacity": 64, "picks": 3,
           "tables": 2, "bits": 3, "probes": 2, "candidates": 16, "sinks": 2, "query_block": 2, "table": 16,
           "bigram_table": 16}  # fmt: skip
FIELDS = {
    "lmn": {
        "logmem": {},
        "one-bank": {"banks": 1, "heads": 1},
        "expsum": {"banks": 1, "expansion": 1},
        "ternary": {"arity": 3, "banks": 1},
        "overlapping": {"kernel": 3},
        "conv": {"mixing": "full", "depth": 2, "normalise": True},
        "depthwise-branch": {"mixing": "depthwise", "arity": 4},
    },
    "attention": {"rotary": {}, "plain": {"rotary": False, "scale": "dim"}},
    "window": {"sinks": {"window": 5, "sinks": 2}, "no-sinks": {"window": 8}},
    "strided": {"": {"stride": 4}},
    "linear-attention": {"": {"chunk": 8}},
    "transformer-xl": {"": {"segment": 8, "memory": 6}},
    "recurrent": {"gru": {"cell": "gru", "layers": 2}, "lstm": {"cell": "lstm"}},
    "gated-linear": {"": {"chunk": 8}},
    "harmony": {
        "none": HARMONY,
        "heads": {**HARMONY, "sharing": "heads", "kv_heads": 1},
        "block": {**HARMONY, "sharing": "block"},
        "all": {**HARMONY, "retrieval": "all", "capacity": 7},
        "window-alone": {**HARMONY, "retrieval": "none"},
    },
}
# What a memory is checked with: RNN layers under compile; the paper's stop-gradient between segments.
OPTIONS = {
    "recurrent": {"allow_rnn": True},
    "transformer-xl": {"exact_gradients": False},
}
CASES = [
    pytest.param(config_class(dim=16, **fields), OPTIONS.get(name, {}), id=f"{name}-{variant}".strip("-"))
    for name, config_class in memory_configs().items()
    for variant, fields in FIELDS.get(name, {"": {}}).items()
] + [pytest.param(my_memory.Config(dim=16), {}, id="template")]


# Forms that pass through every annotated function; these run under the annotations' checks, the rest without.
ANNOTATED = ("step", "split", "recording", "packed_and_padded", "gradients")


@pytest.fixture(scope="module")
def plain():
    """A process without the annotations' checks, which torch.compile cannot trace."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process


def test_every_built_in_memory_is_here():
    assert set(FIELDS) <= set(memory_configs())


@pytest.mark.parametrize(("config", "options"), CASES)
def test_contract(config, options, plain):
    report = plain.submit(check_memory, config, **options).result()
    assert {line.point for line in report.lines} == set(POINTS)


def test_codecs_that_choose_tokens_are_compiled_too(plain):
    """Their choice among tokens is not continuous, so the other points hold but for ties."""
    config = memory_configs()["harmony"](dim=16, **{**HARMONY, "codec": "landmarks", "sinks": 0})
    report = plain.submit(check_memory, config, only=["compiled"], dtypes=[torch.float32]).result()
    assert [line.point for line in report.lines] == ["compiled"]


@pytest.mark.parametrize(("config", "options"), CASES)
def test_annotations_hold(config, options):
    check_memory(config, lengths=(0, 1, 13), dtypes=[torch.float32], only=ANNOTATED, **options)
