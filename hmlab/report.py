"""Pages that need nothing but themselves: executed notebooks and the report over many of them.

No page asks another host for anything: figures carry plotly.js inline (once a page), formulas become MathML,
and what a notebook viewer usually loads from outside (MathJax, require.js, mermaid) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

PLOTLY = "application/vnd.plotly.v1+json"

_TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block extra_css %}{{ resources.plotly_js | safe }}{% endblock %}
"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
code { font: 13px ui-monospace, monospace }
.ok { color: #106b32 } .failed { color: #b00020 }
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One notebook of a report. page: relative to the report. error: the one line that said why it failed."""

    title: str
    name: str
    seconds: float
    parameters: Mapping[str, Any]
    page: str = ""
    error: str = ""
    datasets: Sequence[str] = field(default=())


def notebook_html(path: Path, *, title: str) -> str:
    """An executed notebook as one self-contained page."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return _mathml(body, "block")

        def inline_math(self, body: str) -> str:
            return _mathml(body, "inline")

        def latex_environment(self, name: str, body: str) -> str:
            return _mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def markdown(source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["title"] = title
    notebook.metadata.pop("widgets", None)  # megabytes that only a running front end could use
    figures = _plotly_to_html(notebook)
    exporter = HTMLExporter(raw_template=_TEMPLATE, filters={"markdown2html": markdown})
    page, _ = exporter.from_notebook_node(notebook, resources={"plotly_js": _plotly_js() if figures else ""})
    return page


def index_html(title: str, entries: Sequence[Entry], provenance: Mapping[str, Any]) -> str:
    """The report: one row a notebook, and under which conditions all of it ran."""
    failed = sum(bool(entry.error) for entry in entries)
    verdict = f"{failed} of {len(entries)} failed" if failed else f"all {len(entries)} went through"
    rows = "\n".join(_row(entry) for entry in entries)
    facts = "\n".join(_fact(name, value) for name, value in provenance.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<p class="{"failed" if failed else "ok"}">Notebooks: {verdict}.</p>
<table><thead><tr><th>Notebook</th><th>Status</th><th>Seconds</th><th>Parameters</th><th>Results</th></tr></thead>
<tbody>
{rows}
</tbody></table>
<h2>Provenance</h2>
<table>{facts}</table>
</body></html>
"""


def _row(entry: Entry) -> str:
    title = escape(entry.title)
    if entry.page:
        title = f'<a href="{escape(entry.page)}">{title}</a>'
    status = '<span class="ok">ok</span>'
    if entry.error:
        status = f'<span class="failed">failed</span><br>{_code(entry.error)}'
    parameters = "<br>".join(_code(f"{name} = {value!r}") for name, value in entry.parameters.items())
    results = "<br>".join(_code(name) for name in entry.datasets)
    return f"""<tr><td>{title}<br>{_code(entry.name)}</td><td>{status}</td>
<td class="number">{entry.seconds:.1f}</td><td>{parameters}</td><td>{results}</td></tr>"""


def _fact(name: str, value: Any) -> str:
    return f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _mathml(source: str, display: str) -> str:
    from latex2mathml.converter import convert

    try:
        return convert(source.strip().replace("{aligned}", "{align*}"), display=display)
    except Exception:  # formulas it cannot read raise many kinds; TeX is readable as it stands
        return f"<code>{escape(source)}</code>"


def _plotly_to_html(notebook) -> int:
    """Give every plotly figure an HTML form, and drop empty displays; returns how many figures there are."""
    from plotly.io import to_html

    figures = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        # A display that was only kept for a later update has no data.
        cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}):
                figure = {name: output.data[PLOTLY].get(name, empty) for name, empty in (("data", []), ("layout", {}))}
                html = to_html(figure, include_plotlyjs=False, full_html=False, validate=False)
                output.data = {"text/html": html}
                figures += 1
    return figures


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"
