"""Figures draw the numbers of the Datasets they are given: recordings and metrics of real models and runs."""

import numpy as np
import pytest
import torch
import xarray as xr

from hmlab import plots
from hmlab.record import record
from hmlab.registry import model_config

TEXT = "the tree of summaries remembers what the window forgets"


@pytest.fixture(scope="module")
def recordings():
    torch.manual_seed(0)
    found = {}
    for name in ("logmem", "attention"):
        model = model_config(name, dim=16, vocab=128, layers=2).build()
        with torch.no_grad(), record(model) as recording:
            model(torch.tensor([list(TEXT.encode())]))
        found[name] = recording.dataset()
    return found


def test_tree_draws_every_visible_node_over_its_span(recordings):
    data = recordings["logmem"]
    figure = plots.tree(data, 20, layer=1, head=2, pieces=list(TEXT))
    brackets = figure.data[:-1]
    assert len(brackets) == 1 + 2 * 4  # the token, and two banks of the levels that 21 tokens fill
    row = data.sel(layer=1, time=20).isel(batch=0, heads=2)
    for node, bracket in enumerate(brackets):
        start, end = int(row["span_start"][node]), int(row["span_end"][node])
        assert bracket.x[0] == start - 0.5 and bracket.x[-1] == end - 0.5
        assert f"weight {float(row['attention'][node]):.3f}" in bracket.text[0]
        assert TEXT[start:end].strip()[:8] in bracket.text[0]


def test_levels_and_tokens_share_all_attention(recordings):
    share = plots.level_share(recordings["logmem"], layer=1)
    np.testing.assert_allclose(share.sum("level"), 1, atol=1e-5)
    figure = plots.attention_levels(recordings["logmem"], layer=1)
    np.testing.assert_allclose(figure.data[0].z, share.transpose("level", "time").values)
    for name in recordings:
        assert plots.token_share(recordings[name], 40, layer=1, head=0).sum() == pytest.approx(1, abs=1e-5)
        assert len(plots.received(recordings[name], 40, layer=1).data[0].y) == 41


def test_losses_smooth_batches_and_mark_evaluations():
    loss = np.array([4.0, 3.0, np.nan, 1.0])
    valid = np.array([np.nan, 3.5, np.nan, 2.5])
    one = xr.Dataset({"loss": ("step", loss), "train_loss": ("step", valid - 0.1), "valid_loss": ("step", valid)},
                     coords={"step": [1, 2, 3, 4]})  # fmt: skip
    figure = plots.losses(one)
    batches, _, evaluated = figure.data
    assert batches.y[0] == 4 and np.isnan(batches.y[2])
    assert batches.y[1] == pytest.approx((0.95 * 0.05 * 4 + 0.05 * 3) / (0.95 * 0.05 + 0.05))
    assert list(evaluated.x) == [2, 4] and list(evaluated.y) == [3.5, 2.5]
    two = xr.concat([one, one + 1], xr.Variable("run", ["a", "b"]))
    assert [trace.name for trace in plots.losses(two).data if trace.name.endswith("valid")] == ["a valid", "b valid"]


def test_next_tokens_shows_the_likeliest_with_their_text():
    odds = xr.DataArray([0.1, 0.6, 0.3], dims="token", coords={"piece": ("token", ["a", "\n", "<b>"])})
    bar = plots.next_tokens(odds, most=2).data[0]
    assert list(bar.x) == [0.3, 0.6] and list(bar.y) == ["“&lt;b>”", "“⏎”"]


def test_shares_stack_to_one_along_time():
    share = np.random.default_rng(0).dirichlet([1, 2, 3], (1, 1, 10, 2)).transpose(0, 1, 2, 3, 4)
    data = xr.Dataset({"hit_share": (("layer", "batch", "time", "heads", "tiers"), share)},
                      {"layer": [3], "tiers": ["sinks", "window", "slots"]})  # fmt: skip
    figure = plots.shares(data.assign_coords(time=np.arange(10)), layer=3, points=5)
    assert [trace.name for trace in figure.data] == ["sinks", "window", "slots"]
    np.testing.assert_allclose(sum(np.array(trace.y) for trace in figure.data), np.ones(5))
    np.testing.assert_allclose(figure.data[2].y, share[0, 0, :, :, 2].mean(1).reshape(5, 2).mean(1))
    assert list(figure.data[0].x) == [0.5, 2.5, 4.5, 6.5, 8.5]
    with pytest.raises(ValueError, match="over: expected one of"):
        plots.shares(data, over="tables", layer=3)


def test_a_tradeoff_has_a_curve_for_each_and_its_points_in_order():
    work = np.array([[[0.3, 0.1], [0.5, np.nan]], [[0.2, 0.4], [0.1, 0.3]]])
    data = xr.Dataset({"work": (("family", "tables", "probes"), work), "recall": (("family", "tables", "probes"),
                      1 - work)}, {"family": ["a", "b"]})  # fmt: skip
    one, two = plots.tradeoff(data, "work", "recall", by="family").data
    assert list(one.x) == [0.1, 0.3, 0.5] and list(one.y) == [0.9, 0.7, 0.5] and one.name == "a"
    assert list(two.x) == [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError, match="x: expected one of"):
        plots.tradeoff(data, "works", "recall", by="family")
    with pytest.raises(ValueError, match="by: expected one of"):
        plots.tradeoff(data, "work", "recall", by="bits")


def test_ribbons_show_ranks_and_lines_their_values():
    data = xr.Dataset({"bits": ("segment", [3.0, 1.0, 2.0]), "slots": ("segment", [16, 1, 4])})
    figure = plots.ribbons(data, lines=["slots"], texts=["<a>", "b", "c"])
    ribbon, line = figure.data
    np.testing.assert_allclose(ribbon.z, [[1, 0, 0.5]])
    assert ribbon.customdata[0][0] == "“&lt;a>”" and list(line.y) == [16, 1, 4]
    with pytest.raises(ValueError, match="lines: expected some of"):
        plots.ribbons(data, lines=["slot"])


def test_what_cannot_be_drawn_is_named(recordings):
    with pytest.raises(ValueError, match="dim 'node'"):
        plots.level_share(recordings["attention"])
    with pytest.raises(ValueError, match="name: expected one of"):
        plots.metric(xr.Dataset({"loss": ("step", [1.0])}), "los")
    with pytest.raises(ValueError, match="theme"):
        plots.themed(plots.go.Figure(), "blue")


def test_a_heat_map_draws_each_number_where_its_labels_say():
    values = xr.DataArray(
        [[0.1, np.nan, 0.3], [0.4, 0.5, 0.6]], dims=("segment", "source"), name="recall_weight",
        coords={"segment": ("segment", [4, 7], {"units": "segments"}), "source": [0, 1, 2]},
        attrs={"long_name": "recall weight", "units": "1"},
    )  # fmt: skip
    figure = plots.heat(values, limits=(0.0, 1.0))
    (map_,) = figure.data
    np.testing.assert_array_equal(map_.z, values.values)
    assert list(map_.y) == [4, 7] and list(map_.x) == [0, 1, 2] and (map_.zmin, map_.zmax) == (0, 1)
    assert map_.colorbar.title.text == "recall weight" and figure.layout.title.text == "Recall weight"
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("segment [segments]", "source")
    assert figure.layout.yaxis.autorange == "reversed"
    assert plots.heat(values.T).data[0].zmax is None
    with pytest.raises(ValueError, match=r"values: expected two dims, got \['source'\]"):
        plots.heat(values[0])
