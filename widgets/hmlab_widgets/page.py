"""The look that all dashboards share: one page, light or dark, which asks nothing of any other host."""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import urlencode

import panel as pn

# The colours of `hmlab.plots`' themes: ink, paper, rules; and one further ink for what is secondary.
COLOURS = {
    "light": {"ink": "#1f2933", "faint": "#52606d", "paper": "#ffffff", "raised": "#f5f7fa", "rule": "#e4e7eb",
              "mark": "#0072B2", "on-mark": "#ffffff", "warn": "#a33b00"},
    "dark": {"ink": "#e4e7eb", "faint": "#9aa5b1", "paper": "#15191e", "raised": "#1d232a", "rule": "#323f4b",
             "mark": "#56B4E9", "on-mark": "#10151a", "warn": "#f0a06a"},
}  # fmt: skip

_PAGE = """
body { --bs-body-font-size: 14px; --bs-body-bg: var(--hm-paper); --bs-body-color: var(--hm-ink);
  font: 14px/1.45 Inter, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--hm-ink); background: var(--hm-paper); }
#header { box-shadow: none !important; border-bottom: 1px solid var(--hm-rule); padding: 0 20px; min-height: 48px;
  margin: 0; width: 100%; }
#header .title { font-size: 17px; font-weight: 600; color: var(--hm-ink); text-decoration: none; }
#header-items { margin-left: auto; }
.app-header { padding: 0; }
#sidebar { background: var(--hm-raised); border-right: 1px solid var(--hm-rule); padding: 12px 8px 24px 12px; }
#content { margin: 0; }
#container { padding: 0; }
#main { padding: 8px 16px 24px; overflow-y: auto; background: var(--hm-paper); }
.pn-busy-container { display: none; }
"""

# For the inside of panes, which the page's own rules do not reach.
PANE = """
:host { color: var(--hm-ink); font: 14px/1.45 Inter, "Segoe UI", Helvetica, Arial, sans-serif; }
h2 { font-size: 12px; font-weight: 600; letter-spacing: .04em; text-transform: uppercase; color: var(--hm-faint);
  margin: 4px 0 6px; }
p { margin: 0 0 6px; } p.faint, .faint { color: var(--hm-faint); } p.warn { color: var(--hm-warn); }
a { color: var(--hm-mark); }
a:focus-visible { outline: 2px solid var(--hm-mark); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th { text-align: left; font-weight: 500; color: var(--hm-faint); border-bottom: 1px solid var(--hm-rule); }
th, td { padding: 3px 12px 3px 0; white-space: nowrap; } td.wide { white-space: normal; }
th.n, td.n { text-align: right; }
tbody tr + tr td { border-top: 1px solid var(--hm-rule); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
dt { color: var(--hm-faint); font-weight: 400; } dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; border: 1px solid var(--hm-rule); border-radius: 4px; }
.tiles > div { flex: 1 1 auto; min-width: 80px; padding: 6px 9px; }
.tiles > div + div { border-left: 1px solid var(--hm-rule); }
.tiles b { display: block; font-size: 16px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles span { color: var(--hm-faint); font-size: 11px; white-space: nowrap; }
.bar { height: 4px; background: var(--hm-rule); border-radius: 2px; } .bar i { display: block; height: 4px;
  background: var(--hm-mark); border-radius: 2px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; vertical-align: -1px; }
"""


def theme() -> str:
    """light or dark, as this session's address asks (`?theme=dark`)."""
    return "dark" if pn.config.theme == "dark" else "light"


def page(title: str, *, sidebar: list, main: list, other: tuple[str, str]) -> pn.template.BootstrapTemplate:
    """A page with a link to another dashboard, `other` = (name in addresses, title), and one that turns the theme."""
    colours = ";".join(f"--hm-{name}: {value}" for name, value in COLOURS[theme()].items())
    turned = "light" if theme() == "dark" else "dark"
    kept = {key: values[0].decode("utf-8", "replace") for key, values in pn.state.session_args.items()}
    turn = "?" + urlencode({**kept, "theme": "dark" if turned == "dark" else "default"})
    links = html(
        f'<a href="{escape(address(other[0]))}">{escape(other[1])}</a> &emsp; '
        f'<a href="{escape(turn)}">{turned.capitalize()} theme</a>'
    )
    template = pn.template.BootstrapTemplate(
        title=title, sidebar_width=300, header_background="var(--hm-paper)", header_color="var(--hm-ink)",
        raw_css=[f":root {{ {colours}; color-scheme: {theme()} }}", _PAGE], busy_indicator=None,
    )  # fmt: skip
    template.header.append(links)
    template.sidebar.extend(sidebar)
    template.main.extend(main)
    return template


def html(text: str = "", **params: Any) -> pn.pane.HTML:
    """A pane of markup in the page's look. Whatever is not ours in `text` must be escaped."""
    return pn.pane.HTML(text, stylesheets=[PANE], **{"margin": (4, 8), **params})


def figure(height: int, **params: Any) -> pn.pane.Plotly:
    """An empty pane for a plotly figure, as wide as there is room."""
    config = {"displaylogo": False, "responsive": True, "displayModeBar": "hover"}
    return pn.pane.Plotly(None, height=height, sizing_mode="stretch_width", config=config, margin=(4, 8), **params)


def address(name: str, **query: str) -> str:
    """Where another dashboard is, seen from this page: beside it, and behind JupyterLab a folder of its own."""
    path = pn.state.location.pathname if pn.state.location else ""
    query = {**query, **({"theme": "dark"} if theme() == "dark" else {})}
    beside = f"../{name}/" if (path or "").endswith("/") else name
    return beside + ("?" + urlencode(query) if query else "")


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:,.{digits}f}"


def size(value: float) -> str:
    """Bytes for reading."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds for reading."""
    if seconds is None or seconds != seconds:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
