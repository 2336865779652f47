"""What is measured beside what, where one starts to win, and the pictures of it."""

import time

import numpy as np
import pytest
import xarray as xr
from hmlab_kernels import OPS, _machine
from hmlab_kernels.bench import Case, crossovers, measure

from hmlab import bench, plots


@pytest.fixture(scope="module")
def measured():
    def wait(seconds):
        return lambda: time.sleep(seconds)

    cases = [
        Case("op, L 1,024, E 8", {"ours": wait(0.002), "theirs": wait(0.001)}, 1e3, 1e6, "op", 1024, 1024),
        Case("op, L 4,096, E 8", {"ours": wait(0.002), "theirs": wait(0.004)}, 4e3, 4e6, "op", 4096, 4096),
        Case("op, L 16,384, E 8", {"ours": wait(0.002)}, 2e4, 2e7, "op", 16384, 16384),
    ]
    return measure(cases, seconds=0.0, least=8)


def test_every_figure_stands_beside_its_noise_and_its_floor(measured):
    assert dict(measured.sizes) == {"case": 3, "candidate": 2, "repeat": 8}
    assert np.isnan(measured["median"].sel(candidate="theirs").values[2])
    assert (measured["low"] <= measured["median"]).values[~np.isnan(measured["median"])].all()
    of = measured.sel(case="op, L 1,024, E 8", candidate="ours")
    assert of["median"] == pytest.approx(0.002, rel=0.5)
    even, odd = (np.median(of["seconds"].values[i::2]) for i in (0, 1))
    assert float(of["noise"]) == pytest.approx(abs(even / odd - 1))
    bandwidth, rate = measured.attrs["copy_bandwidth_bytes_per_s"], measured.attrs["matmul_flop_per_s_float32"]
    assert float(of["floor"]) == pytest.approx(max(1e3 / bandwidth, 1e6 / rate))


def made(medians, noise=0.0, lengths=(1024, 4096)):
    both = ("case", "candidate")
    return xr.Dataset(
        {"median": (both, medians), "noise": (both, [[noise, 0.0]] * len(lengths)), "length": ("case", list(lengths))},
        coords={"case": [f"op, L {length:,}, E 8" for length in lengths], "candidate": ["ours", "theirs"]},
    )


def test_crossover_lies_where_the_lines_cross():
    (found,) = crossovers(made([[2.0, 1.0], [2.0, 4.0]]))
    assert (found["kind"], found["candidate"], found["against"]) == ("op, L n, E 8", "ours", "theirs")
    assert found["length"] == pytest.approx(2048)


@pytest.mark.parametrize("rival, noise, expected", [(0.5, 0.0, np.inf), (2.0, 0.0, 0.0), (1.05, 0.1, np.inf)])
def test_no_win_inside_the_noise(rival, noise, expected):
    assert [c["length"] for c in crossovers(made([[1.0, rival], [1.0, rival]], noise))] == [expected]


def test_without_a_meter_energy_is_unknown_and_with_one_it_is_per_call():
    assert np.isnan(_machine.joules(lambda: None, "cpu", None))
    used = iter(range(1000))
    assert 0 < _machine.joules(lambda: time.sleep(0.01), "cpu", lambda: float(next(used)), least=0.05) <= 1


def test_pictures_are_the_same_from_a_table_that_was_kept(measured, tmp_path):
    from hmlab import results

    results.save("kept", measured.drop_vars("seconds"), {"device": "this one", **measured.attrs}, folder=tmp_path)
    kept = results._read(tmp_path, "kept").assign_attrs(measured.attrs)
    for draw in (plots.bench, plots.scaling, plots.roofline):
        lines = {trace.name: trace for trace in draw(kept).data}
        for trace in draw(measured).data:
            np.testing.assert_allclose(np.sort(lines[trace.name].y), np.sort(trace.y), rtol=1e-6)


def test_pictures_show_what_was_measured(measured):
    lines = {trace.name: trace for trace in plots.scaling(measured).data}
    assert set(lines) == {"ours", "theirs", "floor"}
    np.testing.assert_array_equal(lines["floor"].y, measured["floor"].values)
    points = {trace.name: trace for trace in plots.roofline(measured).data}
    assert set(points) == {"roof, float32", "ours", "theirs"}
    np.testing.assert_allclose(points["ours"].y, (measured["flops"] / measured["median"].sel(candidate="ours")).values)


@pytest.mark.parametrize("op", OPS)
def test_every_operator_has_benchmarks_that_name_their_floor(op):
    names = []
    for case in bench.suites()[op]("cpu"):
        names.append(case.name)
        assert case.bytes > 0 and case.flops >= 0 and case.length > 0 and case.tokens > 0, case.name
        assert "reference" not in case.runs and "fused" not in case.runs, case.name
    assert names and len(set(names)) == len(names)
