"""A figure that keeps its place in a notebook while its numbers come in."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import display


class LiveFigure:
    """Shows an empty place where it is made; `show(figure)` draws there, again and again.

    Headless runs keep the last figure.
    """

    def __init__(self) -> None:
        self._place = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, figure: go.Figure) -> None:
        # A figure displays itself past the handle, as a new output; its data alone goes where it belongs.
        self._place.update(pio.renderers["plotly_mimetype"].to_mimebundle(figure.to_dict()), raw=True)
