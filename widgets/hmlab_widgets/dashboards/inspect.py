"""Memory inspector.

Reads a text with a trained model and shows, token by token, what its memories hold and what each head reads.
"""

from __future__ import annotations

import asyncio
from html import escape

import panel as pn
import param
from hmlab_widgets.page import figure, html, number, page, size, theme
from hmlab_widgets.reading import MOST, Reading, load, read, sources
from panel.custom import JSComponent

from hmlab import plots
from hmlab.runs import Store

START = "ROMEO:\nWhat light is this that breaks upon the hill? I know the hand that wrote it, and the heart.\n\n" \
        "JULIET:\nThen say no more of it; the night is long, and what we summarise we may forget."  # fmt: skip
AROUND = 420  # characters of text shown before the position


class Arrows(JSComponent):
    """Left and right arrow keys anywhere on the page, but in fields of text: `moved` counts them, right positive."""

    moved = param.Integer(0)
    _esm = """
    export function render({model}) {
      document.addEventListener('keydown', (event) => {
        const at = event.composedPath()[0];
        if (['INPUT', 'TEXTAREA', 'SELECT'].includes(at.tagName) || (at.className || '').includes('noUi')) return;
        if (event.key === 'ArrowRight') model.moved += 1;
        if (event.key === 'ArrowLeft') model.moved -= 1;
      });
      return document.createElement('span');
    }
    """


class Inspector:
    """One visitor's reading."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.reading: Reading | None = None
        options = sources(store)
        asked = pn.state.session_args.get("run", [b""])[0].decode("utf-8", "replace")
        chosen = f"run:{asked}" if f"run:{asked}" in options.values() else next(iter(options.values()), None)
        self.source = pn.widgets.Select(name="Model", options=options, value=chosen)
        self.text = pn.widgets.TextAreaInput(name=f"Text (at most {MOST:,} tokens)", value=START, height=220,
                                             max_length=4 * MOST)  # fmt: skip
        self.go = pn.widgets.Button(name="Read", button_type="primary")
        self.layer = pn.widgets.Select(name="Layer", options=[0])
        self.head = pn.widgets.Select(name="Head", options={"mean": -1})
        self.position = pn.widgets.IntSlider(name="Position", start=0, end=1, value=0, sizing_mode="stretch_width")
        self.back = pn.widgets.Button(name="◀", width=44, align="end", description="previous token (left arrow)")
        self.on = pn.widgets.Button(name="▶", width=44, align="end", description="next token (right arrow)")
        self.play = pn.widgets.Toggle(name="Play", width=70, align="end")
        self.arrows = Arrows()
        self.message, self.tiles = html(), html(sizing_mode="stretch_width")
        self.ribbon, self.table = html(sizing_mode="stretch_width"), html(sizing_mode="stretch_width")
        self.memory, self.heads, self.next = figure(340), figure(300), figure(300)

        self.go.on_click(self._read)
        self.source.param.watch(self._read, "value")
        self.back.on_click(lambda _: self._move(-1))
        self.on.on_click(lambda _: self._move(1))
        self.arrows.param.watch(lambda event: self._move(event.new - event.old), "moved")
        for control in (self.position, self.layer, self.head):
            control.param.watch(lambda _: self._show(), "value")
        self.memory.param.watch(self._select, "click_data")

    def page(self) -> pn.viewable.Viewable:
        """The whole page."""
        for field in (self.source, self.text, self.layer, self.head, self.go):
            field.param.update(sizing_mode="stretch_width", margin=(4, 5))
        sidebar = [html("<h2>Reading</h2>"), self.source, self.text, self.go,
                   html("<h2>View</h2>"), self.layer, self.head, self.arrows]  # fmt: skip
        main = pn.Column(
            pn.Row(self.back, self.on, self.play, self.position, sizing_mode="stretch_width"),
            self.message, self.tiles, self.ribbon, self.memory,
            pn.Row(self.heads, self.next, sizing_mode="stretch_width"),
            html("<h2>What this position can read</h2>"), self.table, sizing_mode="stretch_width",
        )  # fmt: skip
        return page("Memory inspector", sidebar=sidebar, main=[main], other=("train", "Training monitor"))

    async def _read(self, _=None) -> None:
        if self.source.value is None:
            self.message.object = "<p>There is no model to inspect yet: train one with <code>hmlab train</code>.</p>"
            return
        self.go.disabled = True
        try:
            self.reading = await asyncio.to_thread(self._load, self.source.value, self.text.value)
        except (ValueError, OSError) as error:
            self.message.object = f"<p class=warn>{escape(str(error))}</p>"
            return
        finally:
            self.go.disabled = False
        self.message.object = ""
        seen, last = self.reading.recording, len(self.reading.pieces) - 1
        if seen is not None:
            self.layer.options = [int(n) for n in seen["layer"].values]
            self.head.options = {"mean": -1, **{str(n): n for n in range(seen.sizes.get("heads", 0))}}
        with param.parameterized.discard_events(self.position):
            self.position.param.update(end=max(last, 1), value=last)
        self.position.param.trigger("end", "value")
        self._show()

    def _load(self, key: str, text: str) -> Reading:
        return read(load(key, self.store), text)

    def tick(self) -> None:
        """Go on while playing."""
        if self.play.value and self.reading:
            if self.position.value >= self.position.end:
                self.play.value = False
            self._move(1)

    def _move(self, by: int) -> None:
        if self.reading:
            self.position.value = min(max(self.position.value + by, 0), len(self.reading.pieces) - 1)

    def _select(self, event) -> None:
        points = (event.new or {}).get("points") or [{}]
        span = points[0].get("customdata")
        if span is not None and self.reading:
            self._text(self.position.value, (int(span[0]), int(span[1])))

    def _show(self) -> None:
        if not self.reading:
            return
        head = None if self.head.value == -1 else self.head.value
        reading, time = self.reading, min(self.position.value, len(self.reading.pieces) - 1)
        seen, view = reading.recording, {"layer": self.layer.value, "theme": theme()}
        tight = {"margin": {"l": 56, "r": 8, "t": 36, "b": 44}}
        observed = set() if seen is None else set(seen.data_vars)
        self.heads.visible = "attention" in observed
        self.table.object = ""
        if {"attention", "span_start"} <= observed:
            self.memory.object = plots.tree(
                seen, time, head=head, pieces=reading.pieces, **view
            ).update_layout(**tight, clickmode="event")  # fmt: skip
            self.table.object = self._nodes(time)
        elif "attention" in observed:
            drawn = plots.received(seen, time, head=head, pieces=reading.pieces, **view)
            self.memory.object = drawn.update_layout(**tight)
        elif observed:
            self.memory.object = plots.observation(seen, min(observed), **view).update_layout(**tight)
        else:
            self.memory.object = None
        if self.heads.visible:
            self.heads.object = plots.attention_heads(seen, time, **view).update_layout(**tight)
        odds = reading.probabilities.isel(time=time)
        self.next.object = plots.next_tokens(odds, theme=theme()).update_layout(**tight)
        self._tiles(time)
        self._text(time, None)

    def _tiles(self, time: int) -> None:
        reading = self.reading
        surprise = reading.surprise(time)
        tiles = {
            "position": f"{time:,} of {len(reading.pieces) - 1:,}",
            "token": escape(repr(reading.pieces[time])),
            "state": size(reading.state_bytes(time)),
            "per token read": size(reading.state_bytes(time) / (time + 1)),
            "surprise of the next token [bits]": number(surprise, 2),
        }
        inner = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
        self.tiles.object = f"<div class=tiles>{inner}</div>"

    def _text(self, time: int, span: tuple[int, int] | None) -> None:
        """The text up to a little after the position: the token outlined, the selected span marked."""
        low, high = max(0, min(time - AROUND, span[0] if span else time)), min(time + 60, len(self.reading.pieces))
        shown = []
        for n in range(low, high):
            piece = escape(self.reading.pieces[n]).replace("\n", "⏎\n")
            style = "background:#E69F0066;" if span and span[0] <= n < span[1] else ""
            style += "outline:2px solid var(--hm-mark);border-radius:2px;" if n == time else ""
            style += "opacity:.4;" if n > time else ""
            name = ' class="now"' if n == time else ""
            shown.append(f'<span{name} style="{style}">{piece}</span>' if style else piece)
        told = f"tokens {span[0]} to {span[1] - 1}" if span else "click a bracket to mark its tokens"
        text = f"{'… ' if low else ''}{''.join(shown)}"
        self.ribbon.object = (
            '<div style="font-family:ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;line-height:1.55;'
            f'max-height:11em;overflow:auto">{text}</div><p class=faint>{told}</p>'
        )

    def _nodes(self, time: int) -> str:
        seen = self.reading.recording.sel(layer=self.layer.value, time=time).isel(batch=0)
        heads = range(seen.sizes["heads"])
        rows = []
        for n in range(seen.sizes["node"]):
            start, end = int(seen["span_start"][n]), int(seen["span_end"][n])
            if end <= 0:
                continue
            text = "".join(self.reading.pieces[start:end])
            text = text if len(text) <= 64 else f"{text[:30]} … {text[-30:]}"
            weights = "".join(f"<td class=n>{float(seen['attention'][h, n]):.3f}</td>" for h in heads)
            rows.append(f"<tr><td class=n>{int(seen['level'][n])}</td><td class=n>{int(seen['bank'][n])}</td>"
                        f"<td>{start:,} to {end - 1:,}</td><td class=wide>{escape(repr(text))}</td>{weights}</tr>")
        head = "".join(f"<th class=n>head {h}</th>" for h in heads)
        return (f"<table><thead><tr><th class=n>level</th><th class=n>bank</th><th>tokens</th><th>text</th>{head}"
                f"</tr></thead><tbody>{''.join(rows)}</tbody></table>")  # fmt: skip


pn.extension("plotly")
inspector = Inspector(Store())
inspector.page().servable()
pn.state.onload(inspector._read)
pn.state.add_periodic_callback(inspector.tick, 350)
