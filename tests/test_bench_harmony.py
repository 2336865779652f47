"""Exponents that are right where they are known, processor time that is not the clock's, memory that stops growing."""

import dataclasses
import functools
import time

import numpy as np
import pytest
import torch
import xarray as xr
from hmlab_kernels.bench import Case, crossovers, measure
from scipy import stats

from hmlab import bench, bench_harmony, results
from hmlab.bench_harmony import Layer, Meter, Text, exponents


def grown(seconds, spread=0.0, lengths=(1024, 4096, 16384, 65536)):
    """A table of one op and one candidate; spread: of repeats, as a standard deviation of log time."""
    reach = 1.349 / 2 * spread
    times = {"cpu_low": np.multiply(seconds, np.exp(-reach)), "cpu_seconds": np.array(seconds),
             "cpu_high": np.multiply(seconds, np.exp(reach))}  # fmt: skip
    return xr.Dataset(
        {name: (("case", "candidate"), x[:, None]) for name, x in times.items()}
        | {"op": ("case", ["read"] * len(lengths)), "length": ("case", list(lengths))},
        coords={"candidate": ["ours"]},
    )


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_has_its_exponent_and_no_doubt(power):
    lengths = np.array([1024, 4096, 16384, 65536])
    (found,) = exponents(grown(3e-6 * lengths**power))
    assert (found.op, found.candidate) == ("read", "ours")
    assert found.exponent == pytest.approx(power, abs=1e-9)
    assert found.high - found.low == pytest.approx(0, abs=1e-6)


def test_scatter_of_the_medians_widens_the_interval_as_in_any_regression():
    lengths = np.array([1024, 4096, 16384, 65536])
    seconds = lengths * np.array([1.0, 1.3, 0.9, 1.1])
    (found,) = exponents(grown(seconds))
    line = stats.linregress(np.log(lengths), np.log(seconds))
    assert found.exponent == pytest.approx(line.slope)
    assert found.high - found.exponent == pytest.approx(stats.t.ppf(0.975, 2) * line.stderr, rel=1e-3)


def test_scatter_of_the_repeats_is_in_the_interval():
    """Of many tables with noise, the interval holds the truth in about 95 of 100."""
    lengths, noise = np.array([1024, 4096, 16384, 65536]), 0.2
    generator = np.random.default_rng(0)
    (found,) = exponents(grown(lengths * 1.0, spread=noise))
    drawn = [np.polyfit(np.log(lengths), np.log(lengths) + noise * generator.standard_normal(4), 1)[0]
             for _ in range(4000)]  # fmt: skip
    assert np.mean((found.low < np.array(drawn)) & (np.array(drawn) < found.high)) == pytest.approx(0.95, abs=0.015)


def test_two_lengths_have_no_exponent_and_no_table_no_guess():
    assert exponents(grown([1.0, 2.0], lengths=(1024, 2048))) == []
    with pytest.raises(ValueError, match="cpu_seconds"):
        exponents(grown([1.0, 2.0, 3.0], lengths=(1, 2, 3)).drop_vars("cpu_seconds"))


def test_processor_time_does_not_pass_while_nothing_is_done():
    def sleep():
        time.sleep(0.05)
        return 7

    readings = {}
    cases = bench_harmony.metered([Case("idle", {"metered": Meter(sleep), "plain": lambda: None}, 1, 1)], readings)
    measured = bench_harmony.with_readings(measure(cases, seconds=0.0), readings).sel(case="idle")
    assert measured["median"].sel(candidate="metered") >= 0.05
    assert measured["cpu_seconds"].sel(candidate="metered") < 0.01
    assert measured["held_bytes"].sel(candidate="metered") == 7
    assert np.isnan(measured["held_bytes"].sel(candidate="plain"))


@pytest.fixture
def small(monkeypatch):
    """A tier of 64 slots."""
    config = dataclasses.replace(bench_harmony.CONFIG, window=64, capacity=64)
    monkeypatch.setattr(bench_harmony, "CONFIG", config)
    return config


def test_what_is_held_grows_until_the_tier_is_full_and_then_no_more(small):
    torch.manual_seed(0)
    text = Text.random(8192, "cpu")
    held = {}
    for length in (512, 4096, 8192):
        meter = bench_harmony.forward("cpu", text.cut(0, length), rival=False).runs["harmony"]
        meter()
        held[length] = meter.held
    assert held[512] < held[4096] == held[8192]
    assert held[8192] == Layer("cpu").read(text, 1000).bytes  # however the text is fed


def test_the_suite_measures_both_and_its_exponents_survive_being_kept(small, monkeypatch, tmp_path):
    cases = functools.partial(bench_harmony.cases, lengths=(128, 256, 512, 1024), quadratic=512, read=(256,))
    monkeypatch.setattr(bench_harmony, "cases", cases)
    measured = bench.run(["harmony"], seconds=0.0)
    attention = measured.sel(candidate="attention")
    longest = measured["case"].values[measured["length"].values == 1024]
    assert np.isnan(attention["cpu_seconds"].sel(case=longest)).all()
    assert attention["held_bytes"].sel(case="harmony, 512 tokens") == 512 * 2 * 4 * bench_harmony.DIM
    assert (measured["floor"] > 0).all()
    assert {c["kind"] for c in crossovers(measured)} == {"harmony, n tokens"}  # decoding was measured once
    found = exponents(measured)
    assert [one[:2] for one in found] == [("harmony forward", "harmony"), ("harmony forward", "attention")]
    results.save("kept", measured.drop_vars("seconds"), {"device": "this one"}, folder=tmp_path)
    kept = exponents(results._read(tmp_path, "kept"))
    assert sorted(one[:2] for one in kept) == sorted(one[:2] for one in found)
    for one in found:
        (same,) = [other for other in kept if other[:2] == one[:2]]
        assert same[2:] == pytest.approx(one[2:])
