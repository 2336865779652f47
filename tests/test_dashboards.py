"""The dashboards and the tour in a real browser: opened, clicked, and compared with the numbers behind them."""

import re

import pytest
import torch
from playwright.sync_api import Page, expect

from hmlab import pretrained, run
from hmlab.record import record
from hmlab.registry import model_config
from hmlab.runs import Store
from hmlab.tasks import language
from hmlab.train import Config as Training

SLOW = 60_000  # ms, on a busy machine
TEXT = "Then say no more of it"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def dashboards(store, start_server):
    return start_server("start_serve", env={"HMLAB_RUNS": store.folder})


def experiment(steps: int, name: str = "logmem") -> run.Experiment:
    task = language.Config(batch=2, context=32)
    model = model_config(name, dim=16, layers=2, vocab=task.open().vocab_size)
    training = Training(steps=steps, evaluate_every=50, evaluate_batches=1)
    return run.Experiment(name=name, model=model, task=task, training=training)


def traces(page: Page, title: str) -> list[list]:
    """The y values of every trace of the plotly figure whose title holds `title`."""
    return page.evaluate(
        """(title) => {
          const found = [];
          const visit = (root) => root.querySelectorAll('*').forEach((element) => {
            if (element.shadowRoot) visit(element.shadowRoot);
            const shown = element.layout && element.layout.title && element.layout.title.text || '';
            const axis = element.layout && element.layout.yaxis && element.layout.yaxis.title || {};
            if (element.data && (shown.includes(title) || (axis.text || '').includes(title)))
              found.push(element.data.map((trace) => Array.from(trace.y || [])));
          });
          visit(document);
          return found[0] || [];
        }""",
        title,
    )


def test_inspector_shows_what_the_model_reads(page: Page, dashboards):
    page.goto(f"{dashboards.url}/inspect")
    expect(page.get_by_text("surprise of the next token")).to_be_visible(timeout=SLOW)
    page.locator("textarea").fill(TEXT)
    page.locator("textarea").blur()
    page.get_by_role("button", name="Read").click()
    last = len(TEXT) - 1
    expect(page.get_by_text(f"{last} of {last}", exact=True)).to_be_visible(timeout=SLOW)
    expect(page.get_by_text(f"What position {last} reads (layer 0, mean of heads)")).to_be_visible(timeout=SLOW)

    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text(f"{last - 2} of {last}", exact=True)).to_be_visible(timeout=SLOW)
    expect(page.locator(".now")).to_have_text(TEXT[last - 2])
    page.get_by_role("button", name="▶").click()
    expect(page.locator(".now")).to_have_text(TEXT[last - 1])

    model, encoding, _ = pretrained.load("logmem-32")
    tokens = torch.tensor(encoding.encode(TEXT)).long()[None]
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    seen = recording.dataset().sel(layer=0, time=last - 1).isel(batch=0)
    visible = int((seen["span_end"] > 0).sum())
    expect(page.get_by_text(f"What position {last - 1} reads")).to_be_visible(timeout=SLOW)
    assert len(traces(page, f"What position {last - 1} reads")) == visible + 1
    row = page.locator("tbody tr").nth(1)
    for head in range(seen.sizes["heads"]):
        expect(row).to_contain_text(f"{float(seen['attention'][head, 1]):.3f}")


def test_inspector_says_what_it_cannot_read(page: Page, dashboards):
    page.goto(f"{dashboards.url}/inspect?theme=dark")
    expect(page.get_by_text("surprise of the next token")).to_be_visible(timeout=SLOW)
    page.locator("textarea").fill("café")
    page.locator("textarea").blur()
    page.get_by_role("button", name="Read").click()
    expect(page.get_by_text(re.compile("found 'é'"))).to_be_visible(timeout=SLOW)


def test_monitor_follows_a_run_that_trains_and_stops_it(page: Page, dashboards, store):
    wanted = experiment(steps=20_000)
    process = run.start(wanted, store)
    try:
        page.goto(f"{dashboards.url}/train")
        expect(page.get_by_text("training loss [nats/token]")).to_be_visible(timeout=SLOW)
        page.wait_for_function("() => true")
        before = len(traces(page, "loss [nats/token]")[0])
        for _ in range(100):
            page.wait_for_timeout(300)
            now = len(traces(page, "loss [nats/token]")[0])
            if now > before > 0:
                break
            before = before or now
        assert now > before > 0
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_text(re.compile("interrupted · step"))).to_be_visible(timeout=SLOW)
        assert store.find(wanted.hash(), wanted.seed).info["state"] == "interrupted"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_inspector_opens_a_run_of_another_kind_of_memory(page: Page, dashboards, store):
    finished = run.run(experiment(steps=3, name="attention"), store)
    page.goto(f"{dashboards.url}/inspect?run={finished.id}")
    expect(page.get_by_text("Attention that each token receives at position")).to_be_visible(timeout=SLOW)
    expect(page.get_by_text("Heads at position")).to_be_visible(timeout=SLOW)


def test_tour_runs_in_jupyterlab_and_its_explorer_moves(page: Page, lab):
    page.goto(f"{lab.url}/lab/tree/00_tour.ipynb?token={lab.token}")
    expect(page.get_by_role("heading", name="A tour").first).to_be_visible(timeout=SLOW)
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first).to_be_attached(timeout=SLOW)
    smoke = "steps, repeats, context, batch, dim = 4, 1, 64, 2, 16"
    cell = page.locator(".jp-CodeCell .cm-content").first
    cell.click()
    page.keyboard.press("Control+End")
    page.keyboard.type(f"\n{smoke}")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.get_by_text(re.compile("a reading at this size and length, not a law")).last).to_be_visible(
        timeout=240_000
    )
    explorer = page.locator(".jp-OutputArea-output:has(.widget-slider)").first
    explorer.scroll_into_view_if_needed()
    expect(explorer.get_by_text("What position 63 reads")).to_be_visible(timeout=SLOW)
    explorer.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    expect(explorer.get_by_text("What position 62 reads")).to_be_visible(timeout=SLOW)
