"""Notebook views: a Dataset goes in, controls move the picture, a selection comes out."""

import pytest
import torch
from hmlab_widgets import TreeExplorer

from hmlab.record import record
from hmlab.registry import model_config

TEXT = "a summary stands for its tokens"


@pytest.fixture(scope="module")
def recording():
    torch.manual_seed(0)
    model = model_config("logmem", dim=16, vocab=128, layers=2).build()
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([list(TEXT.encode())]))
    return recording.dataset()


def test_controls_move_the_picture(recording):
    explorer = TreeExplorer(recording, list(TEXT))
    drawn = explorer._figure
    assert explorer.position.value == len(TEXT) - 1
    explorer.position.value, explorer.layer.value, explorer.head.value = 15, 1, 3
    assert drawn.layout.title.text == "What position 15 reads (layer 1, head 3)"
    weight = float(recording["attention"].sel(layer=1, time=15).isel(batch=0, heads=3)[1])
    assert f"weight {weight:.3f}" in drawn.data[1].text[0]
    assert len(drawn.data) == len(explorer.static().data) == 1 + 2 * 4 + 1


def test_a_bracket_selects_its_tokens(recording):
    explorer = TreeExplorer(recording, list(TEXT), time=15)
    chosen = []
    explorer.observe(lambda change: chosen.append(change["new"]), "selection")
    level_2 = next(trace for trace in explorer._figure.data if trace.name == "level 2 bank 0")
    explorer._select(level_2, type("Points", (), {"point_inds": [0]}), None)
    assert chosen == [(12, 16)] and explorer.selection == (12, 16)
    assert explorer._text.value.count("background:#E69F0055") == 4 and "tokens 12 to 15" in explorer._text.value
    explorer.position.value = 16
    assert explorer.selection is None


def test_without_a_front_end_there_is_a_figure(recording):
    bundle = TreeExplorer(recording, list(TEXT))._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert len(bundle["application/vnd.plotly.v1+json"]["data"]) == 1 + 2 * 4 + 1


def test_missing_text_is_named(recording):
    with pytest.raises(ValueError, match="pieces: expected the text of 31 positions, got 5"):
        TreeExplorer(recording, list("short"))
