"""Training monitor.

Follows the runs in the run store (HMLAB_RUNS, or ./runs) while they train, and starts small ones.
"""

from __future__ import annotations

import asyncio
from html import escape

import panel as pn
from hmlab_widgets.page import address, duration, figure, html, number, page, size, theme
from hmlab_widgets.tail import LIVE, Listing, Standing, Tail, side_by_side, standing

from hmlab import plots, registry
from hmlab import run as experiments
from hmlab.control import Request
from hmlab.runs import Run, Store, StoreError
from hmlab.tasks import language
from hmlab.train import Config as Training

PERIOD_MS = 400
SHOWN = 100
STATES = ["running", "paused", "finished", "interrupted", "failed"]
GLYPHS = {"running": "▶", "paused": "⏸", "finished": "✓", "interrupted": "◼", "failed": "✕"}
SMALL = ("tokens_per_second", "gradient_norm", "memory_bytes")


class Monitor:
    """One visitor's view of the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.listing = Listing(store)
        self.tails: dict[str, Tail] = {}
        self._started: list = []
        self._drawn: object = None
        self._busy = False

        self.text = pn.widgets.TextInput(placeholder="name, hash or corpus", name="Filter")
        self.states = pn.widgets.MultiChoice(options=STATES, name="States", placeholder="any state")
        self.chosen = pn.widgets.CheckBoxGroup(options={}, name="Runs", css_classes=["runs"])
        self.listed = html()
        self.detail = pn.widgets.Select(options={}, name="Run in detail", width=320)
        self.along = pn.widgets.RadioButtonGroup(
            options={"steps": "step", "tokens": "tokens", "time": "elapsed"}, value="step", align="end",
            button_style="outline", margin=(5, 8),
        )  # fmt: skip
        self.buttons = {
            request: pn.widgets.Button(name=request.capitalize(), disabled=True, align="end", width=84)
            for request in ("pause", "resume", "stop")
        }
        self.open = html(align="end", margin=(5, 8, 12, 8))
        self.message = html()
        self.tiles, self.facts, self.table = html(sizing_mode="stretch_width"), html(width=330), html()
        self.losses = figure(350)
        self.small = {name: figure(210) for name in SMALL}

        self.form = {
            "model": pn.widgets.Select(name="Model", options=registry.model_names(), value="logmem"),
            "dim": pn.widgets.IntInput(name="Width", value=32, start=8, end=512, step=8),
            "layers": pn.widgets.IntInput(name="Layers", value=2, start=1, end=12),
            "steps": pn.widgets.IntInput(name="Steps", value=300, start=1, end=20_000, step=100),
            "seed": pn.widgets.IntInput(name="Seed", value=0, start=0),
        }
        self.begin = pn.widgets.Button(name="Start training", button_type="primary")

        for control in (self.text, self.states, self.chosen, self.detail, self.along):
            control.param.watch(self._changed, "value")
        self.text.param.watch(self._changed, "value_input")
        for request, button in self.buttons.items():
            button.on_click(lambda _, request=request: self._request(request))
        self.begin.on_click(self._begin)

    def page(self) -> pn.viewable.Viewable:
        """The whole page."""
        for field in (*self.form.values(), self.text, self.states):
            field.param.update(width=None, sizing_mode="stretch_width", margin=(4, 5))
        short = [pn.Row(*(self.form[n] for n in pair), sizing_mode="stretch_width", margin=0)
                 for pair in (("dim", "layers"), ("steps", "seed"))]  # fmt: skip
        sidebar = [
            html("<h2>Runs</h2>"), self.text, self.states, self.listed,
            pn.Column(self.chosen, max_height=330, scroll="y-auto", sizing_mode="stretch_width"),
            html("<h2>New run</h2><p class=faint>On the text that comes with Python.</p>"),
            self.form["model"], *short, self.begin,
        ]  # fmt: skip
        main = pn.Column(
            pn.Row(self.detail, *self.buttons.values(), self.open, pn.Spacer(sizing_mode="stretch_width"), self.along),
            self.message, self.tiles,
            pn.Row(self.losses, self.facts, sizing_mode="stretch_width"),
            pn.Row(*self.small.values(), sizing_mode="stretch_width"),
            html("<h2>Runs compared</h2>"), self.table, sizing_mode="stretch_width",
        )  # fmt: skip
        return page("Training monitor", sidebar=sidebar, main=[main], other=("inspect", "Memory inspector"))

    async def refresh(self) -> None:
        """Look at the disk, and draw again if what is shown has changed."""
        if self._busy:
            return
        self._busy = True
        try:
            if await asyncio.to_thread(self.listing.poll) or self._drawn is None:
                self._list()
            self._ended()
            ids = list(self.chosen.value)
            changed = await asyncio.to_thread(self._poll, ids)
            wanted = (ids, self.along.value, self.detail.value)
            if changed or wanted != self._drawn:
                self._drawn = wanted
                shown = {id: self.tails[id] for id in ids if id in self.tails}
                self._draw(shown, await asyncio.to_thread(self._figures, shown))
        finally:
            self._busy = False

    def _poll(self, ids: list[str]) -> bool:
        changed = False
        for id in ids:
            tail = self.tails.setdefault(id, Tail(Run(self.store.folder / id)))
            try:
                changed |= tail.poll()
            except FileNotFoundError:  # deleted
                del self.tails[id]
        return changed

    def _changed(self, event) -> None:
        if event.obj in (self.text, self.states):
            self._list()
        if event.obj is self.chosen:
            self._offer()

    def _list(self) -> None:
        """Offer the runs that the filter lets through, and those that are chosen already."""
        text = (self.text.value_input or self.text.value or "").lower()
        infos = {info["id"]: info for info in self.listing.infos}
        chosen = [id for id in self.chosen.value if id in infos]
        fits = [
            info for info in self.listing.infos
            if text in f"{info['id']} {info['corpus']['corpus']}".lower()
            and (not self.states.value or info["state"] in self.states.value)
        ]  # fmt: skip
        shown = [infos[id] for id in chosen if infos[id] not in fits] + fits[:SHOWN]
        if not chosen and not self.tails and shown:
            chosen = [shown[0]["id"]]
        self.chosen.param.update(options={_label(info): info["id"] for info in shown}, value=chosen)
        kept = f"the newest {SHOWN} of " if len(fits) > SHOWN else ""
        self.listed.object = f"<p class=faint>{kept}{len(fits)} of {len(infos)} runs</p>"
        self._offer()

    def _offer(self) -> None:
        infos = {info["id"]: info for info in self.listing.infos}
        options = {_label(infos[id], glyph=False): id for id in self.chosen.value if id in infos}
        ids = list(options.values())
        value = self.detail.value if self.detail.value in ids else ids[-1] if ids else None
        if options != self.detail.options or value != self.detail.value:
            self.detail.param.update(options=options, value=value)

    def _figures(self, shown: dict[str, Tail]) -> dict:
        if not shown:
            return {}
        labels = {id: _label(tail.info, glyph=False) for id, tail in shown.items()}
        metrics = side_by_side({labels[id]: tail.metrics for id, tail in shown.items()})
        drawn = {"losses": plots.losses(metrics, x=self.along.value, title="", theme=theme())}
        for name in SMALL:
            drawn[name] = plots.metric(metrics, name, x=self.along.value, theme=theme())
            drawn[name].update_layout(showlegend=False, margin={"l": 56, "r": 8, "t": 32, "b": 40}, yaxis_title="")
        several = len(shown) > 1
        for trace in drawn["losses"].data:
            # One entry per run; with a single run, one per curve.
            trace.showlegend = not several or trace.name.endswith("training batches")
            trace.name = trace.name.removesuffix("training batches").strip() if several else (
                trace.name.removeprefix(next(iter(labels.values()))).strip())
        drawn["losses"].update_layout(margin={"l": 56, "r": 8, "t": 28, "b": 40}, uirevision=self.along.value)
        for drawing in drawn.values():
            drawing.update_traces(connectgaps=True)
        return drawn

    def _draw(self, shown: dict[str, Tail], drawn: dict) -> None:
        self.losses.object = drawn.get("losses")
        for name, pane in self.small.items():
            pane.object = drawn.get(name)
        standings = {id: standing(tail.info, tail.metrics) for id, tail in shown.items()}
        self.table.object = _table(shown, standings)
        tail = shown.get(self.detail.value)
        state = tail.info["state"] if tail else ""
        self.buttons["pause"].disabled = state != "running"
        self.buttons["resume"].disabled = state != "paused"
        self.buttons["stop"].disabled = state not in LIVE
        if tail is None:
            self.tiles.object = self.facts.object = self.open.object = ""
            if not self.listing.infos:
                self.tiles.object = (
                    "<p>There are no runs yet: start one at the left, or with <code>hmlab train</code>.</p>"
                )
            return
        self.tiles.object = _tiles(tail, standings[self.detail.value])
        self.facts.object = _facts(tail.info)
        link = escape(address("inspect", run=self.detail.value))
        self.open.object = f'<a href="{link}" target="_blank">Open in the inspector</a>'

    def _say(self, text: str, kind: str = "faint") -> None:
        self.message.object = f"<p class={kind}>{escape(text)}</p>" if text else ""

    def _request(self, request: Request) -> None:
        try:
            self.store.request(self.detail.value, request)
            self._say(f"Asked {self.detail.value} to {request}.")
        except StoreError as error:
            self._say(str(error), "warn")

    async def _begin(self, _) -> None:
        self.begin.disabled = True
        try:
            experiment, process = await asyncio.to_thread(self._start, {n: f.value for n, f in self.form.items()})
        except (OSError, ValueError, StoreError) as error:
            self._say(str(error), "warn")
            return
        finally:
            self.begin.disabled = False
        self._say(f"Starting {experiment.id} …")
        self._started.append((experiment, process))

    def _start(self, given: dict):
        task = language.Config(batch=8, context=128)
        model = registry.model_config(
            given["model"], dim=given["dim"], layers=given["layers"], vocab=task.open().vocab_size
        )
        every = max(given["steps"] // 10, 1)
        training = Training(steps=given["steps"], evaluate_every=every, evaluate_batches=4)
        experiment = experiments.Experiment(
            name=given["model"], model=model, task=task, training=training, seed=given["seed"]
        )
        return experiment, experiments.start(experiment, self.store)

    def _ended(self) -> None:
        """Choose what was started here as soon as it is there; say why where it came to nothing."""
        for experiment, process in list(self._started):
            run = self.store.find(experiment.hash(), experiment.seed)
            code = process.poll()
            if run is not None and run.id in self.chosen.options.values() and run.id not in self.chosen.value:
                self.chosen.value = [*self.chosen.value, run.id]
                self.detail.value = run.id
                self._say("")
            if code is not None:
                self._started.remove((experiment, process))
                if code and not (run and run.info["state"] == "interrupted"):
                    output = self.store.folder / (run.id if run else experiment.id) / "output.txt"
                    lines = output.read_text("utf-8", "replace").splitlines() if output.exists() else []
                    self._say(f"{experiment.id}: {lines[-1] if lines else f'exit code {code}'}", "warn")


def _label(info: dict, glyph: bool = True) -> str:
    label = f"{info['name']} {info['hash'][:6]} seed {info['seed']}"
    return f"{GLYPHS[info['state']]} {label}" if glyph else label


def _tiles(tail: Tail, now: Standing) -> str:
    share = 100 * now.step / now.steps
    tiles = {
        f"{escape(tail.info['state'])} · step": f"{now.step:,} / {now.steps:,}<div class=bar>"
        f'<i style="width:{share:.1f}%"></i></div>',
        "training loss [nats/token]": number(now.loss),
        "validation loss [nats/token]": number(now.valid_loss),
        "speed [tokens/s]": number(now.tokens_per_second, 0),
        "gradient norm": number(now.gradient_norm),
        "memory": size(now.memory_bytes),
        "time in training": duration(now.elapsed),
        "time left": duration(now.seconds_left),
    }
    inner = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    error = f"<p class=warn>{escape(tail.info['error'])}</p>" if tail.info["error"] else ""
    return f"<div class=tiles>{inner}</div>{error}"


def _facts(info: dict) -> str:
    corpus, versions = info["corpus"], info["versions"]
    commit = (info["commit"] or "–")[:12] + (" (changed)" if info["dirty"] else "")
    model = info["experiment"]["model"]
    facts = {
        "Parameters": f"{info['parameters']:,} ({size(info['parameter_bytes'])})",
        "State": f"{size(info['state_bytes'])} after one window",
        "Model": f"{model['memory']['name']}, width {model['dim']}, {model['layers']} layers, {model['ffn']}",
        "Implementations": ", ".join(f"{op}: {impl}" for op, impl in info.get("implementations", {}).items()) or "–",
        "Corpus": f"{corpus['corpus']} ({corpus['licence']}), {corpus['tokens']['train']:,} tokens to train on",
        "Encoding": f"{corpus['encoding']}, {corpus['vocab_size']} ids",
        "Device": f"{info['device']}, {info['threads']} threads",
        "Commit": commit,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Started": info["started"][:19].replace("T", " ") + " UTC",
        "Run": info["id"],
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<h2>Facts</h2><dl>{rows}</dl>"


def _table(shown: dict[str, Tail], standings: dict[str, Standing]) -> str:
    rows = []
    for place, (id, tail) in enumerate(shown.items()):
        now, info = standings[id], tail.info
        swatch = f'<span class=swatch style="background:{plots.COLOURS[place % len(plots.COLOURS)]}"></span>'
        cells = [
            f"{now.step:,} / {now.steps:,}", number(now.loss), number(now.valid_loss), number(now.best_valid_loss),
            number(now.tokens_per_second, 0), size(now.memory_bytes), duration(now.elapsed), duration(now.seconds_left),
            f"{info['parameters']:,}", size(info["state_bytes"]),
        ]  # fmt: skip
        numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
        name = f"{swatch} {escape(_label(info, glyph=False))}"
        rows.append(f"<tr><td>{name}</td><td>{GLYPHS[info['state']]} {info['state']}</td>{numbers}</tr>")
    heads = ["step", "loss", "validation", "best", "tokens/s", "memory", "time", "left", "parameters", "state"]
    head = "<th>run</th><th>state</th>" + "".join(f"<th class=n>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""


pn.extension("plotly")
monitor = Monitor(Store())
monitor.page().servable()
pn.state.add_periodic_callback(monitor.refresh, PERIOD_MS)
