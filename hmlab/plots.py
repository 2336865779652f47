"""Figures from Datasets: of a recording (`hmlab.record`), of a run's metrics (`hmlab.runs`), of a benchmark.

A function reads labelled arrays and returns a plotly figure; what a model is called or made of it does not know.
Axis titles come from the arrays' `long_name` and `units`. Colours are told apart by people who see few (Okabe and
Ito for lines, cividis for amounts), and lines differ in dash as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
AMOUNT = "Cividis"
_THEMES = {"light": ("#1f2933", "#ffffff", "#e4e7eb"), "dark": ("#e4e7eb", "#15191e", "#323f4b")}


def themed(figure: go.Figure, theme: str = "light") -> go.Figure:
    """Give a figure the look of all others, light or dark."""
    if theme not in _THEMES:
        raise ValueError(f"theme: expected one of {list(_THEMES)}, got {theme!r}")
    ink, paper, rule = _THEMES[theme]
    axis = {"gridcolor": rule, "zeroline": False, "linecolor": rule, "ticks": "outside", "tickcolor": rule}
    figure.update_layout(
        font={"color": ink, "size": 13, "family": "Inter, Segoe UI, Helvetica, Arial, sans-serif"}, colorway=COLOURS,
        paper_bgcolor=paper, plot_bgcolor=paper,
        title={"x": 0, "xref": "paper", "y": 0.97, "yanchor": "top", "font": {"size": 15}},
        margin={"l": 64, "r": 16, "t": 52, "b": 52},
        legend={"y": 1, "yanchor": "top", "x": 1, "xanchor": "right", "bgcolor": "rgba(0,0,0,0)"},
        hoverlabel={"font": {"family": "ui-monospace, Menlo, Consolas, monospace"}},
    )  # fmt: skip
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def losses(metrics: xr.Dataset, *, x: str = "step", title: str = "Loss", theme: str = "light") -> go.Figure:
    """Losses of one run (dims step) or several (dims run, step): every batch smoothed, and each evaluation.

    x: `step`, or a variable of the same dims: `tokens`, `elapsed`.
    """
    figure = go.Figure()
    for number, (name, run) in enumerate(_runs(metrics)):
        colour = COLOURS[number % len(COLOURS)]
        along = run[x].values
        batch = run["loss"].values
        group = {"legendgroup": name, "line": {"color": colour}, "x": along}
        figure.add_scatter(**group | {"line": {"color": colour, "width": 1}}, y=_smooth(batch), opacity=0.55,
                           name=f"{name} training batches".strip(), mode="lines")  # fmt: skip
        for split, dash in (("train_loss", "dot"), ("valid_loss", "solid")):
            at = np.flatnonzero(np.isfinite(run[split].values))
            if len(at):
                label = f"{name} {split.removesuffix('_loss')}".strip()
                figure.add_scatter(x=along[at], y=run[split].values[at], name=label, legendgroup=name,
                                   mode="lines+markers", line={"color": colour, "dash": dash, "width": 2})  # fmt: skip
    figure.update_layout(title=title, xaxis_title=axis_title(metrics[x]), yaxis_title="loss [nats/token]")
    return themed(figure, theme)


def metric(metrics: xr.Dataset, name: str, *, x: str = "step", title: str = "", theme: str = "light") -> go.Figure:
    """One variable of one run or several."""
    if name not in metrics:
        raise ValueError(f"name: expected one of {sorted(map(str, metrics.data_vars))}, got {name!r}")
    figure = go.Figure()
    for number, (label, run) in enumerate(_runs(metrics)):
        style = {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)], "width": 1.5}
        figure.add_scatter(x=run[x].values, y=run[name].values, name=label or name, mode="lines", line=style)
    figure.update_layout(title=title or axis_title(metrics[name]).split(" [")[0].capitalize(),
                         xaxis_title=axis_title(metrics[x]), yaxis_title=axis_title(metrics[name]))  # fmt: skip
    return themed(figure, theme)


def attention_levels(recording: xr.Dataset, *, layer: int = 0, head: int | None = None, batch: int = 0,
                     title: str = "Attention over levels", theme: str = "light") -> go.Figure:
    """Heat map of the share of attention that each level receives at each position (head None: their mean)."""
    share = level_share(recording, layer=layer, head=head, batch=batch)
    figure = go.Figure(go.Heatmap(
        x=share["time"].values, y=share["level"].values, z=share.transpose("level", "time").values, zmin=0, zmax=1,
        colorscale=AMOUNT, colorbar={"title": "share"},
        hovertemplate="position %{x}<br>level %{y}<br>share %{z:.3f}<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(title=title, xaxis_title=axis_title(recording["time"]), yaxis_title="level")
    figure.update_yaxes(dtick=1)
    return themed(figure, theme)


def level_share(recording: xr.Dataset, *, layer: int = 0, head: int | None = None, batch: int = 0) -> xr.DataArray:
    """Attention per position and level, the nodes of a level added: dims time, level."""
    weights = _weights(recording, layer, head, batch)
    if "node" not in weights.dims:
        raise ValueError("recording: expected attention over nodes (dim 'node'), got dims " + str(weights.dims))
    return weights.fillna(0).groupby("level").sum("node")


def attention_heads(recording: xr.Dataset, time: int, *, layer: int = 0, batch: int = 0,
                    title: str | None = None, theme: str = "light") -> go.Figure:
    """What each head reads at one position: heads against levels, or against keys where there are no levels."""
    weights = recording["attention"].sel(layer=layer, time=time).isel(batch=batch).fillna(0)
    across = "level" if "node" in weights.dims else "key"
    if across == "level":
        weights = weights.groupby("level").sum("node")
    shown = weights.transpose("heads", across)
    figure = go.Figure(go.Heatmap(
        x=shown[across].values, y=shown["heads"].values, z=shown.values, zmin=0, zmax=1, colorscale=AMOUNT,
        colorbar={"title": "share"}, hovertemplate=f"head %{{y}}, {across} %{{x}}: %{{z:.3f}}<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(title=title or f"Heads at position {time}", xaxis_title=across, yaxis_title="head")
    figure.update_xaxes(dtick=1 if across == "level" else None)
    figure.update_yaxes(dtick=1)
    return themed(figure, theme)


def observation(recording: xr.Dataset, name: str, *, layer: int = 0, batch: int = 0, title: str = "",
                theme: str = "light") -> go.Figure:
    """Any observation along time: the mean over its other dims, and its range."""
    array = recording[name].sel(layer=layer).isel(batch=batch)
    others = [dim for dim in array.dims if dim != "time"]
    figure = go.Figure()
    for label, values in (("largest", array.max(others)), ("mean", array.mean(others)), ("least", array.min(others))):
        if others or label == "mean":
            style = {"color": COLOURS[0], "dash": "solid" if label == "mean" else "dot"}
            figure.add_scatter(x=array["time"].values, y=values.values, name=label, mode="lines", line=style)
    figure.update_layout(title=title or axis_title(array).split(" [")[0].capitalize(),
                         xaxis_title=axis_title(recording["time"]), yaxis_title=axis_title(array))  # fmt: skip
    return themed(figure, theme)


def shares(recording: xr.Dataset, name: str = "hit_share", *, over: str = "tiers", layer: int = 0,
           head: int | None = None, batch: int = 0, points: int = 400, title: str = "", theme: str = "light"
           ) -> go.Figure:
    """Areas of an observation whose values along `over` sum to one, stacked along time (head None: mean of heads).

    points: means over neighbouring positions, at most so many, are drawn.
    """
    array = recording[name].sel(layer=layer).isel(batch=batch)
    if over not in array.dims:
        raise ValueError(f"over: expected one of {sorted(map(str, array.dims))}, got {over!r}")
    if "heads" in array.dims:
        array = array.mean("heads") if head is None else array.isel(heads=head)
    width = -(-array.sizes["time"] // points)
    array = array.coarsen(time=width, boundary="trim").mean()
    figure = go.Figure()
    for number, label in enumerate(array[over].values):
        colour = COLOURS[number % len(COLOURS)]
        figure.add_scatter(x=array["time"].values, y=array.sel({over: label}).values, name=str(label), mode="lines",
                           stackgroup="all", line={"width": 0.5, "color": colour}, fillcolor=colour)  # fmt: skip
    figure.update_layout(title=title or f"{axis_title(array).capitalize()}, layer {layer}", yaxis_title="share",
                         xaxis_title=axis_title(recording["time"]))  # fmt: skip
    figure.update_yaxes(range=[0, 1])
    return _legend_outside(themed(figure, theme))


def tradeoff(measured: xr.Dataset, x: str, y: str, *, by: str, log_x: bool = False, log_y: bool = False,
             title: str = "", theme: str = "light") -> go.Figure:
    """One measured quantity over another: a curve for each value along `by`, its points those along all other dims, in
    the order of x. Points that were not measured are left out."""
    for name in (x, y):
        if name not in measured:
            raise ValueError(f"{'x' if name == x else 'y'}: expected one of {sorted(map(str, measured.data_vars))}, "
                             f"got {name!r}")  # fmt: skip
    across, up = xr.broadcast(measured[x], measured[y])
    if by not in across.dims:
        raise ValueError(f"by: expected one of {sorted(map(str, across.dims))}, got {by!r}")
    figure = go.Figure()
    for number, label in enumerate(across[by].values):
        along = across.sel({by: label}).values.ravel()
        values = up.sel({by: label}).values.ravel()
        there = np.isfinite(along) & np.isfinite(values)
        order = np.argsort(along[there], kind="stable")
        style = {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)], "width": 1.5}
        figure.add_scatter(x=along[there][order], y=values[there][order], name=str(label), mode="lines+markers",
                           line=style)  # fmt: skip
    figure.update_layout(title=title, xaxis_title=axis_title(measured[x]), yaxis_title=axis_title(measured[y]))
    figure.update_xaxes(type="log" if log_x else "linear")
    figure.update_yaxes(type="log" if log_y else "linear")
    return _legend_outside(themed(figure, theme))


def heat(values: xr.DataArray, *, limits: tuple[float, float] | None = None, title: str = "", theme: str = "light"
         ) -> go.Figure:
    """Heat map of an array of two dims: the first from top to bottom, the second across; what is missing stays blank.

    limits: the values at the ends of the colour scale, None for the least and the largest.
    """
    if values.ndim != 2:
        raise ValueError(f"values: expected two dims, got {list(map(str, values.dims))}")
    down, across = (values[dim] for dim in values.dims)
    name = axis_title(values)
    figure = go.Figure(go.Heatmap(
        x=across.values, y=down.values, z=values.values, colorscale=AMOUNT, hoverongaps=False,
        zmin=None if limits is None else limits[0], zmax=None if limits is None else limits[1],
        colorbar={"title": {"text": name, "side": "right"}},
        hovertemplate=f"{down.name} %{{y}}, {across.name} %{{x}}<br>{name} %{{z:.4g}}<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(title=title or name.split(" [")[0].capitalize(), xaxis_title=axis_title(across),
                         yaxis_title=axis_title(down))  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return themed(figure, theme)


def ribbons(values: xr.Dataset, *, lines: Sequence[str] = (), title: str = "", texts: Sequence[str] | None = None,
            theme: str = "light") -> go.Figure:
    """Variables of one dim as ribbons, one below the other, coloured by rank: what stands high where, whatever its
    units. lines: the variables that are drawn as lines beneath, in their own units. texts: shown on hovering."""
    for name in lines:
        if name not in values:
            raise ValueError(f"lines: expected some of {sorted(map(str, values.data_vars))}, got {name!r}")
    names = [str(name) for name in values.data_vars if name not in lines]
    (dim,) = values.dims
    along, shown = values[dim].values, [_quoted(text, 80) for text in texts] if texts is not None else None
    rank = np.stack([np.argsort(np.argsort(values[name].values, kind="stable")) for name in names]) if names else None
    figure = make_subplots(rows=2 if lines else 1, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    if names:
        figure.add_heatmap(
            x=along, y=names, z=rank / max(len(along) - 1, 1), zmin=0, zmax=1, colorscale=AMOUNT, row=1, col=1,
            text=np.stack([values[name].values for name in names]), ygap=2,
            customdata=None if shown is None else [shown] * len(names),
            hovertemplate="%{y}, %{x}: %{text:.3f}<br>%{customdata}<extra></extra>",
            colorbar={"title": "rank", "len": 0.5 if lines else 1, "y": 0.75 if lines else 0.5, "tickvals": [0, 1],
                      "ticktext": ["least", "most"]},
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", row=1, col=1)
    for number, name in enumerate(lines):
        style = {"color": COLOURS[number % len(COLOURS)], "shape": "hvh", "dash": DASHES[number % len(DASHES)]}
        figure.add_scatter(x=along, y=values[name].values, name=axis_title(values[name]), mode="lines", line=style,
                           customdata=shown, hovertemplate="%{y}<br>%{customdata}<extra></extra>", row=2,
                           col=1)  # fmt: skip
    figure.update_layout(title=title)
    figure.update_xaxes(title=axis_title(values[dim]), row=2 if lines else 1, col=1)
    return _legend_outside(themed(figure, theme)).update_layout(legend={"y": 0.4} if lines else {})


def tree(recording: xr.Dataset, time: int, *, layer: int = 0, head: int | None = None, batch: int = 0,
         pieces: Sequence[str] | None = None, title: str | None = None, theme: str = "light") -> go.Figure:
    """What a position reads: each visible node as the span of tokens that it summarises, at its level.

    time: position, as on the recording's time axis. pieces: the text of each position, for hovering. Colour and
    width tell the weight that the head gives to the node.
    """
    weights = _weights(recording, layer, head, batch).sel(time=time)
    spans = recording[["span_start", "span_end"]].sel(layer=layer, time=time).isel(batch=batch)
    starts, ends = spans["span_start"].values.astype(int), spans["span_end"].values.astype(int)
    seen = [n for n in range(len(starts)) if ends[n] > 0]
    levels, banks = recording["level"].values, recording["bank"].values
    weight = np.nan_to_num(weights.values)
    most = max(float(weight[seen].max()), 1e-9)
    figure = go.Figure()
    for n in seen:
        share = weight[n] / most
        height = levels[n] + 0.16 * banks[n]
        left, right = starts[n] - 0.5, ends[n] - 0.5
        text = _quoted("".join(pieces[starts[n] : ends[n]])) if pieces is not None else ""
        told = (f"level {levels[n]}, bank {banks[n]}<br>tokens {starts[n]} to {ends[n] - 1}<br>"
                f"weight {weight[n]:.3f}<br>{text}")  # fmt: skip
        colour = sample_colorscale(AMOUNT, [share])[0]
        figure.add_scatter(
            x=[left, left, right, right], y=[height - 0.12, height, height, height - 0.12], mode="lines",
            line={"color": colour, "width": 2 + 8 * share}, hoverinfo="text", text=[told] * 4, showlegend=False,
            customdata=[[int(starts[n]), int(ends[n])]] * 4, name=f"level {levels[n]} bank {banks[n]}",
        )  # fmt: skip
    figure.add_scatter(
        x=[time], y=[0], mode="markers", showlegend=False, hoverinfo="skip",
        marker={"symbol": "diamond", "size": 11, "color": [weight[0]], "cmin": 0, "cmax": most, "colorscale": AMOUNT,
                "colorbar": {"title": "weight"}, "line": {"width": 1, "color": _THEMES[theme][0]}},
    )  # fmt: skip
    where = f"layer {layer}, " + ("mean of heads" if head is None else f"head {head}")
    figure.update_layout(title=title or f"What position {time} reads ({where})", yaxis_title="level",
                         xaxis_title=axis_title(recording["time"]))  # fmt: skip
    figure.update_xaxes(range=[-1, max(1.02 * time + 1, 8)])
    figure.update_yaxes(dtick=1, range=[-0.5, max(int(levels[seen].max()), 1) + 0.6])
    return themed(figure, theme)


def received(recording: xr.Dataset, time: int, *, layer: int = 0, head: int | None = None, batch: int = 0,
             title: str | None = None, pieces: Sequence[str] | None = None, theme: str = "light") -> go.Figure:
    """The attention that each past token receives at a position; a summary's weight is shared by its tokens."""
    share = token_share(recording, time, layer=layer, head=head, batch=batch)
    shown = [_quoted(piece) for piece in pieces[: len(share)]] if pieces is not None else None
    figure = go.Figure(go.Bar(x=np.arange(len(share)), y=share, customdata=shown, marker_color=COLOURS[0],
                              hovertemplate="token %{x} %{customdata}<br>%{y:.4f}<extra></extra>"))  # fmt: skip
    figure.update_layout(title=title or f"Attention that each token receives at position {time}", bargap=0,
                         xaxis_title=axis_title(recording["time"]), yaxis_title="weight per token")  # fmt: skip
    figure.update_yaxes(type="log")
    return themed(figure, theme)


def token_share(recording: xr.Dataset, time: int, *, layer: int = 0, head: int | None = None, batch: int = 0
                ) -> np.ndarray:
    """Attention per token 0 .. time; sums to one where all that is read summarises tokens of the recording."""
    weights = _weights(recording, layer, head, batch).sel(time=time).fillna(0)
    if "key" in weights.dims:
        return weights.values[: time + 1]
    spans = recording[["span_start", "span_end"]].sel(layer=layer, time=time).isel(batch=batch)
    share = np.zeros(time + 1)
    for weight, start, end in zip(weights.values, spans["span_start"].values, spans["span_end"].values, strict=True):
        if end > 0:
            share[max(int(start), 0) : int(end)] += weight / (end - start)
    return share


def next_tokens(probabilities: xr.DataArray, *, most: int = 10, title: str = "Next token", theme: str = "light"
                ) -> go.Figure:
    """The likeliest next tokens. probabilities: dim token, with the coordinate `piece` (their text)."""
    top = probabilities.isel(token=np.argsort(-probabilities.values)[:most][::-1])
    figure = go.Figure(go.Bar(x=top.values, y=[_quoted(p) for p in top["piece"].values], orientation="h",
                              marker_color=COLOURS[0], hovertemplate="%{y} %{x:.3f}<extra></extra>"))  # fmt: skip
    figure.update_layout(title=title, xaxis_title="probability", yaxis_title="")
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(type="category")
    return themed(figure, theme)


def bench(measured: xr.Dataset, *, title: str = "Time beside the floor", theme: str = "light") -> go.Figure:
    """Median and quartiles of each candidate per case, with the floor as a line. measured: `hmlab bench`."""
    figure = go.Figure()
    cases = [str(case) for case in measured["case"].values]
    for number, candidate in enumerate(measured["candidate"].values):
        of = measured.sel(candidate=candidate)
        error = {"array": (of["high"] - of["median"]).values, "arrayminus": (of["median"] - of["low"]).values}
        figure.add_bar(x=cases, y=of["median"].values, error_y={"type": "data", **error}, name=str(candidate),
                       marker_color=COLOURS[number % len(COLOURS)])  # fmt: skip
    mark = {"symbol": "line-ew-open", "size": 26, "color": COLOURS[6], "line": {"width": 2}}
    figure.add_scatter(x=cases, y=_of_case(measured, "floor"), mode="markers", name="floor", marker=mark)
    figure.update_layout(title=title, yaxis_title=axis_title(measured["median"]), barmode="group")
    figure.update_yaxes(type="log")
    return _legend_outside(themed(figure, theme))


def scaling(measured: xr.Dataset, *, title: str = "Time over length", theme: str = "light") -> go.Figure:
    """Median time of each candidate over the length, with quartiles, and the floor. measured: `hmlab bench`, the cases
    of one operator that differ in length."""
    figure = go.Figure()
    measured = measured.isel(case=np.argsort(_of_case(measured, "length")))
    length = _of_case(measured, "length")
    for number, candidate in enumerate(measured["candidate"].values):
        of = measured.sel(candidate=candidate)
        if not np.isfinite(of["median"]).any():
            continue
        error = {"array": (of["high"] - of["median"]).values, "arrayminus": (of["median"] - of["low"]).values}
        figure.add_scatter(x=length, y=of["median"].values, error_y={"type": "data", **error}, name=str(candidate),
                           line={"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)]},
                           mode="lines+markers")  # fmt: skip
    figure.add_scatter(x=length, y=_of_case(measured, "floor"), name="floor", mode="lines",
                       line={"color": COLOURS[6], "width": 1})  # fmt: skip
    figure.update_layout(title=title, xaxis_title="length [tokens]", yaxis_title=axis_title(measured["median"]),
                         legend={"x": 0.02, "xanchor": "left"})  # fmt: skip
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return themed(figure, theme)


def roofline(measured: xr.Dataset, *, title: str = "Roofline", theme: str = "light") -> go.Figure:
    """What each candidate reaches of what the machine could, by how many flops a case has for every byte it must move.
    measured: `hmlab bench`; the roofs are the copy bandwidth and the matrix-product rates measured with it."""
    figure = go.Figure()
    bandwidth = measured.attrs["copy_bandwidth_bytes_per_s"]
    rates = {k.removeprefix("matmul_flop_per_s_"): v for k, v in measured.attrs.items() if k.startswith("matmul_")}
    flops = _of_case(measured, "flops")
    intensity = flops / _of_case(measured, "bytes")
    low, high = float(intensity.min()) / 4, max(float(intensity.max()), max(rates.values()) / bandwidth) * 4
    for number, (dtype, rate) in enumerate(rates.items()):
        figure.add_scatter(x=[low, rate / bandwidth, high], y=[low * bandwidth, rate, rate], mode="lines",
                           name=f"roof, {dtype}", line={"color": COLOURS[6], "dash": DASHES[number]})  # fmt: skip
    for number, candidate in enumerate(measured["candidate"].values):
        reached = flops / measured["median"].sel(candidate=candidate).values
        if np.isfinite(reached).any():
            figure.add_scatter(x=intensity, y=reached, mode="markers", name=str(candidate),
                               text=measured["case"].values,
                               marker={"color": COLOURS[number % 6], "size": 9, "symbol": number},
                               hovertemplate="%{text}<br>%{y:.3s}flop/s<extra></extra>")  # fmt: skip
    figure.update_layout(title=title, xaxis_title="flops of a case per byte it must move", yaxis_title="flop/s")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="SI")
    return _legend_outside(themed(figure, theme))


def _of_case(measured: xr.Dataset, name: str) -> np.ndarray:
    """What belongs to a case; a table on disk repeats it for every candidate."""
    values = measured[name]
    return (values.max("candidate") if "candidate" in values.dims else values).values


def _legend_outside(figure: go.Figure) -> go.Figure:
    """Where marks may lie anywhere, beside the axes."""
    return figure.update_layout(legend={"x": 1.02, "xanchor": "left"})


def axis_title(array: xr.DataArray) -> str:
    """`long name [units]` of an array; its name where it has none."""
    name = array.attrs.get("long_name", str(array.name).replace("_", " "))
    units = array.attrs.get("units", "")
    return f"{name} [{units}]" if units not in ("", "1") else name


def _runs(metrics: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    if "run" not in metrics.dims:
        return [("", metrics)]
    return [(str(name), metrics.sel(run=name)) for name in metrics["run"].values]


def _smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Exponential moving mean, right from the first value on; what is missing stays missing."""
    smoothed, total, weight = np.full(len(values), np.nan), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = (1 - share) * total + share * value, (1 - share) * weight + share
            smoothed[i] = total / weight
    return smoothed


def _weights(recording: xr.Dataset, layer: int, head: int | None, batch: int) -> xr.DataArray:
    if "attention" not in recording:
        raise ValueError(f"recording: expected the variable 'attention', got {sorted(map(str, recording.data_vars))}")
    weights = recording["attention"].sel(layer=layer).isel(batch=batch)
    return weights.mean("heads") if head is None else weights.isel(heads=head)


def _quoted(text: Any, most: int = 60) -> str:
    """Text for a label: white space made visible, the middle of long text left out, no markup."""
    text = str(text).replace("\n", "⏎").replace("\t", "⇥").replace("&", "&amp;").replace("<", "&lt;")
    return f"“{text}”" if len(text) <= most else f"“{text[: most // 2]} … {text[-most // 2 :]}”"
