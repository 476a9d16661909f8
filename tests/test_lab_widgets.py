"""Widgets: their logic without a browser, and both of them in JupyterLab in a headless browser."""

import io
import json
import re
import secrets
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from chromium import Page, find_chromium
from PIL import Image

from bitflow_edu.data import Images
from bitflow_edu.editing import reconstruct
from bitflow_edu.io.files import BitflowError
from bitflow_edu.lab.widgets import Editor, connect, dial_png, editor, editor_png, guidance_dial
from conftest import small_flow, small_reverse

CHROMIUM = find_chromium()


@pytest.fixture(scope="module")
def pair():
    flow = small_flow()
    return flow, small_reverse(flow)


def small_images(n=3, side=6):
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (n, 1, side, side), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 3, ("a", "b", "c"))


def test_editor_logic_without_a_browser(pair):
    state = Editor(*pair, small_images(), cells=3)
    whole = reconstruct(*pair, state.images.x[:1], state.images.labels[:1])
    assert state.mask.all() and torch.equal(state.result(), whole)
    before = editor_png(state)
    state.toggle(1, 2)
    assert (~state.mask).nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    assert editor_png(state) != before
    assert Image.open(io.BytesIO(before)).size == (10 * (3 * 6 + 2), 60)
    noise = state.result()
    state.seed += 1
    assert not torch.equal(state.result(), noise)
    state.c, state.w = 2, 1.0
    assert state.result().isfinite().all()
    state.choose(1)
    assert state.mask.all() and (state.c, state.w) == (1, 0.0)
    with pytest.raises(BitflowError, match="4 cells"):
        Editor(*pair, small_images(), cells=4)
    with pytest.raises(BitflowError, match="num_blocks"):
        Editor(small_flow(blocks=2), pair[1], small_images())


def test_the_widget_calls_the_logic(pair):
    widgets = pytest.importorskip("ipywidgets")
    state = Editor(*pair, small_images(), cells=3)
    box = connect(widgets, state)
    (grid, inputs), picture = box.children[0].children, box.children[1]
    image, label, w, seed, clear = inputs.children
    seen = [picture.value]

    def changed():
        seen.append(picture.value)
        return seen[-1] != seen[-2]

    grid.children[4].click()
    assert state.hidden[1, 1] and changed() and grid.children[4].style.button_color == "#E69F00"
    seed.click()
    assert state.seed == 1 and changed()
    label.value = 2
    assert state.c == 2 and changed()
    w.value = 1.0
    assert state.w == 1.0 and changed()
    clear.click()
    assert not state.hidden.any() and changed() and grid.children[4].style.button_color != "#E69F00"
    image.value = 1
    assert state.index == 1 and label.value == 1 and w.value == 0 and changed()
    assert isinstance(editor(*pair, small_images(), cells=3), widgets.VBox)


def grey(level, n=2, side=4):
    """n images of one grey."""
    return torch.full((n, 1, side, side), level)


def test_the_dial_asks_every_way_for_the_scale_of_its_slider():
    widgets = pytest.importorskip("ipywidgets")
    asked = []

    def way(w):
        asked.append(w)
        return grey(w / 3)

    box = guidance_dial({"a": way, "b": lambda w: grey(0.0)})
    slider, picture, rows = box.children
    before = picture.value
    slider.value = 2.0
    assert asked == [0.0, 2.0] and picture.value != before and rows.value == "rows: a, b"
    assert picture.value == dial_png({"a": way, "b": lambda w: grey(0.0)}, 2.0)
    assert isinstance(box, widgets.VBox)


def test_a_dial_with_rows_that_differ_is_refused():
    with pytest.raises(BitflowError, match="rows of shape .* one shape"):
        dial_png({"a": lambda w: grey(0.0), "b": lambda w: grey(0.0, n=3)}, 0.0)
    with pytest.raises(BitflowError, match="rows of shape none"):
        dial_png({}, 0.0)


def test_a_missing_ipywidgets_is_named(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for make in (lambda: editor(*pair, small_images(), cells=3), lambda: guidance_dial({})):
        with pytest.raises(BitflowError, match="pip install ipywidgets"):
            make()


NOTEBOOK = """
import torch
from bitflow_edu.data import Images
from bitflow_edu.lab.widgets import editor, guidance_dial
from bitflow_edu.reverse_model import ReverseConfig, ReverseModel
from bitflow_edu.tarflow import TARFlow, TARFlowConfig
from bitflow_edu.transformer import TransformerConfig
tiny = TransformerConfig(16, 1, 16)
F = TARFlow(TARFlowConfig(8, 1, 4, 10, 2, transformer=tiny))
G = ReverseModel(ReverseConfig(8, 1, 4, 10, 2, transformer=tiny))
images = Images(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10), tuple("0123456789"))
display(editor(F, G, images, cells=4))
display(guidance_dial({"grey": lambda w: torch.full((1, 1, 8, 8), w / 3)}))
"""
KERNELS = "Array.from(window.jupyterapp?.serviceManager?.kernels?.running() ?? [])"
PICTURES = "Array.from(document.querySelectorAll('.widget-image')).map(e => e.src)"


@pytest.fixture
def lab(tmp_path):
    """The address of a notebook with both widgets in a running JupyterLab."""
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": [{**cell, "id": "one", "source": NOTEBOOK}], "nbformat": 4}
    notebook |= {"nbformat_minor": 5, "metadata": {"kernelspec": kernel}}
    (tmp_path / "play.ipynb").write_text(json.dumps(notebook))
    token, log = secrets.token_hex(16), tmp_path / "lab.log"
    options = "--no-browser --allow-root --port=0 --ServerApp.root_dir=. --expose-app-in-browser"
    command = [sys.executable, "-m", "jupyterlab", *options.split()]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, f"--IdentityProvider.token={token}"], cwd=tmp_path, stdout=out, stderr=out
        )
    try:
        for _ in range(600):
            if found := re.search(r"http://(?:127\.0\.0\.1|localhost):(\d+)/lab", log.read_text()):
                break
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{found[1]}/lab/tree/play.ipynb?reset&token={token}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.skipif(find_spec("jupyterlab") is None, reason="jupyterlab is not installed")
@pytest.mark.skipif(find_spec("ipywidgets") is None, reason="ipywidgets is not installed")
def test_both_widgets_answer_in_jupyterlab(lab, tmp_path):
    with Page(CHROMIUM, tmp_path / "profile") as page:
        page.look(1300, 1600)
        page.open(lab)
        page.wait_for(f"{KERNELS}[0]?.execution_state === 'idle'")
        page.value("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for(f"{PICTURES}.length === 2 && {PICTURES}.every(s => s.startsWith('blob:'))")
        before = page.value(PICTURES)
        page.click(".widget-gridbox button:nth-child(6)")  # row 1, column 1
        page.wait_for(f"{PICTURES}[0] !== {json.dumps(before[0])}")
        orange = "getComputedStyle(document.querySelector('.widget-gridbox button:nth-child(6)'))"
        page.wait_for(f"{orange}.backgroundColor === 'rgb(230, 159, 0)'")
        assert page.value(PICTURES)[1] == before[1], "the dial has not moved"
        handles = "document.querySelectorAll('.noUi-handle')"
        page.value(f"{handles}[{handles}.length - 1].focus()")
        page.key("ArrowRight", 39)
        page.wait_for(f"{PICTURES}[1] !== {json.dumps(before[1])}")
