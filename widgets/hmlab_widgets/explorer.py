"""The memory tree of a recording, position by position: what a head reads, and which tokens a summary stands for."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import plotly.io as pio
import traitlets
import xarray as xr

from hmlab import plots


class TreeExplorer(ipywidgets.VBox):
    """Move through a recording with spans (`span_start`, `span_end`) and attention over nodes.

    recording: from `hmlab.record`, as for `hmlab.plots.tree`. pieces: the text of each position. The slider, the
    menus and the play button work by keyboard. A click on a bracket selects it: `selection` is then its
    `(start, end)` in tokens, else None. Without a front end the picture of the present position is shown.
    """

    selection = traitlets.Tuple(default_value=None, allow_none=True)

    def __init__(self, recording: xr.Dataset, pieces: Sequence[str], *, time: int | None = None, batch: int = 0,
                 theme: str = "light") -> None:
        times = recording["time"].values
        if len(pieces) <= int(times[-1]):
            raise ValueError(f"pieces: expected the text of {int(times[-1]) + 1} positions, got {len(pieces)}")
        self._recording, self._pieces, self._batch, self._theme = recording, list(pieces), batch, theme
        first, last = int(times[0]), int(times[-1])
        self.position = ipywidgets.IntSlider(last if time is None else time, first, last, description="position",
                                             continuous_update=True, layout={"width": "60%"})  # fmt: skip
        self.layer = ipywidgets.Dropdown(options=[int(n) for n in recording["layer"].values], description="layer",
                                         layout={"width": "150px"})  # fmt: skip
        heads = [("mean", None), *((str(n), n) for n in range(recording.sizes["heads"]))]
        self.head = ipywidgets.Dropdown(options=heads, description="head", layout={"width": "160px"})
        play = ipywidgets.Play(min=first, max=last, value=self.position.value, interval=250)
        ipywidgets.jslink((play, "value"), (self.position, "value"))
        self._text = ipywidgets.HTML()
        self._figure = go.FigureWidget()
        controls = ipywidgets.HBox([play, self.position, self.layer, self.head])
        super().__init__([controls, self._figure, self._text])
        for control in (self.position, self.layer, self.head):
            control.observe(self._move, "value")
        self.observe(lambda _: self._show_text(), "selection")
        self._move()

    def static(self) -> go.Figure:
        """The picture of the present position, as a figure without controls."""
        return plots.tree(
            self._recording, self.position.value, layer=self.layer.value, head=self.head.value, batch=self._batch,
            pieces=self._pieces, theme=self._theme,
        ).update_layout(height=380)  # fmt: skip

    def _move(self, _: Any = None) -> None:
        drawn = self.static()
        with self._figure.batch_update():
            self._figure.data = ()
            self._figure.add_traces(drawn.data)
            self._figure.layout = drawn.layout
        for trace in self._figure.data[:-1]:
            trace.on_click(self._select)
        self.selection = None
        self._show_text()

    def _select(self, trace: Any, points: Any, _: Any) -> None:
        if points.point_inds:
            start, end = trace.customdata[points.point_inds[0]]
            self.selection = (int(start), int(end))

    def _show_text(self, around: int = 120) -> None:
        """The text up to the position: the token itself marked, and what the selected summary stands for."""
        now = self.position.value
        start, end = self.selection or (now, now + 1)
        low = max(0, min(start, now - around))
        shown = []
        for n in range(low, now + 1):
            piece = html.escape(self._pieces[n]).replace("\n", "⏎<br>")
            style = "background:#E69F0055;" if self.selection and start <= n < end else ""
            style += "outline:2px solid #0072B2;" if n == now else ""
            shown.append(f'<span style="{style}">{piece}</span>' if style else piece)
        told = f"tokens {start} to {end - 1}" if self.selection else "click a bracket to see its tokens"
        lead = "… " if low else ""
        self._text.value = (
            f'<div style="font-family:ui-monospace,monospace;white-space:pre-wrap;line-height:1.5;max-height:12em;'
            f'overflow:auto">{lead}{"".join(shown)}</div><small>{told}</small>'
        )

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        # What has no front end for widgets (a headless run, a page) takes the figure.
        return {**data, **pio.renderers["plotly_mimetype"].to_mimebundle(self.static().to_dict())}
