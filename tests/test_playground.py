"""The playground: JavaScript that computes what PyTorch computes, in one page that works."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chromium import Page, find_chromium

from bitflow_edu.coupling import to_bits
from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import asset
from bitflow_edu.io.models import load_model
from bitflow_edu.tarflow import TARFlow

HERE = Path(__file__).resolve().parent.parent / "docs" / "playground"
NODE, CHROMIUM = shutil.which("node"), find_chromium()
SOURCES = [p for p in HERE.rglob("*") if p.suffix in {".js", ".html", ".css", ".py"}]
LOWER_HALF, TOKENS = 8, 16


def finished(*command):
    """A command that must succeed, and what it printed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_javascript_computes_what_pytorch_computes(tmp_path):
    """States, logdet, both inverses, guidance and edits of the shipped models, to 1e-5."""
    finished(sys.executable, HERE / "reference.py", tmp_path / "reference.json")
    printed = finished(NODE, HERE / "check.js", tmp_path / "reference.json")
    assert printed.count("\nok ") > 45 and "WRONG" not in printed
    assert "all within 0.00001" in printed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_are_short(path):
    assert all(len(line) <= 100 for line in path.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def build():
    """The build script as a module."""
    spec = importlib.util.spec_from_file_location("playground_build", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestBuild:
    def test_modules_come_after_what_they_import(self, build):
        order = build.modules_of(HERE / "page" / "main.js")
        assert len(order) == len(set(order)) and order[-1].name == "main.js"
        for i, path in enumerate(order):
            imported = build.IMPORT.findall(path.read_text(encoding="utf-8"))
            assert {(path.parent / name).resolve() for name in imported} <= set(order[:i])

    def test_every_module_is_used(self, build):
        used = set(build.modules_of(HERE / "page" / "main.js"))
        assert used == {*HERE.glob("model/*.js"), *HERE.glob("page/*.js")}

    def test_a_name_in_two_modules_is_refused(self, build, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "HERE", tmp_path)
        (tmp_path / "a.js").write_text("export function twice() {}\n")
        (tmp_path / "b.js").write_text('import { twice } from "./a.js";\nconst twice = 1;\n')
        with pytest.raises(SystemExit, match="twice"):
            build.bundle(tmp_path / "b.js")

    def test_colours_are_refused(self, build, tmp_path):
        with pytest.raises(SystemExit, match="3 channels"):
            build.main("cifar10-mini", tmp_path / "page.html")
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page, built."""
    path = tmp_path_factory.mktemp("playground") / "playground.html"
    finished(sys.executable, HERE / "build.py", "mnist-mini", path)
    return path


def test_one_file_without_addresses(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) <= 8e6
    assert "https://" not in text and "http://" not in text
    assert not re.search(r"^(import|export) ", text, re.MULTILINE)
    assert not re.search(r"/\* (STYLE|SCRIPT) \*/|<!-- DATA -->", text)


@pytest.fixture(scope="module")
def page(file, tmp_path_factory):
    """The page in a browser, ready."""
    with Page(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        page.look(1300, 900)
        page.open(file.as_uri())
        page.wait_for("!!document.documentElement.dataset.ready")
        yield page


def text(page, name):
    """What an element of an id says."""
    return page.value(f"document.getElementById({json.dumps(name)}).textContent")


def pixels(page, selector):
    """The canvases that a selector finds, each as the address of its picture."""
    return page.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(c => c.toDataURL())"
    )


def updates(page):
    """How often the panels have followed the digit."""
    return int(page.value("document.documentElement.dataset.updates"))


def wait_for_update(page, before):
    """Until the panels have followed the digit once more."""
    page.wait_for(f"Number(document.documentElement.dataset.updates) > {before}")


def wait_for_change(page, selector, before):
    """Until a canvas shows something else; all that is shown then."""
    was = json.dumps(before)
    page.wait_for(
        f"JSON.stringify([...document.querySelectorAll({json.dumps(selector)})]"
        f".map(c => c.toDataURL())) !== JSON.stringify({was})"
    )
    return pixels(page, selector)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH or in $CHROMIUM")
class TestPage:
    """In the order in which a visitor would try it: one page, one browser."""

    def test_starts_without_a_network(self, page):
        assert "Ready" in text(page, "status")
        assert page.problems() == []
        assert all(url.startswith(("file:", "data:")) for url in page.requested())

    def test_a_stroke_of_the_mouse_is_a_one(self, page):
        before = updates(page)
        page.drag("#pad", [(0.55, 0.15), (0.52, 0.4), (0.5, 0.6), (0.47, 0.85)])
        wait_for_update(page, before)
        assert text(page, "most-likely").startswith("F finds 1 most likely")
        assert len(set(pixels(page, "#states canvas"))) == 5
        assert len(set(pixels(page, "#labels canvas"))) == 10

    def test_a_finger_draws_a_zero(self, page):
        page.look(390, 844, touch=True)
        page.click("#clear")
        before = updates(page)
        angles = torch.linspace(0, 2 * torch.pi, 25)
        ring = [(0.5 + 0.2 * a.sin().item(), 0.5 - 0.3 * a.cos().item()) for a in angles]
        page.touch("#pad", ring)
        wait_for_update(page, before)
        assert text(page, "most-likely").startswith("F finds 0 most likely")
        page.look(1300, 900)

    def test_bits_are_those_of_the_package(self, page):
        """The first test digit, a 7 of the row of zeros to nines, picked with the keyboard."""
        before = updates(page)
        page.value("document.querySelectorAll('#picks button')[7].focus()")
        page.key("Enter", 13)
        wait_for_update(page, before)
        F = load_model(asset("mnist-mini/forward"), TARFlow)
        test = load_data(DataConfig("mnist-mini", image_size=16), "test")
        x = test.x[test.labels == 7][:1].expand(11, -1, -1, -1)
        with torch.no_grad():
            expected = to_bits(F.log_prob(x, torch.tensor([*range(10), -1])), 256)
        shown = page.value("[...document.querySelectorAll('td.value')].map(c => +c.textContent)")
        assert shown == pytest.approx(expected.tolist(), abs=6e-4)

    def test_a_label_of_ones_own(self, page):
        before = updates(page)
        page.value(
            "(() => { const s = document.getElementById('label'); s.value = '5';"
            "s.dispatchEvent(new Event('change')); })()"
        )
        wait_for_update(page, before)
        chosen = page.value("document.querySelector('#labels .chosen figcaption').textContent")
        assert chosen == "5"

    def test_inpainting_follows_the_brush(self, page):
        """A token is hidden by the mouse and kept again; with all known, ε plays no part."""
        fillings = pixels(page, "#filled canvas")
        assert len(set(fillings)) == 4
        page.click("#keep-all")
        reconstruction = wait_for_change(page, "#filled canvas", fillings)
        assert len(set(reconstruction)) == 1
        page.drag("#board", [(0.1, 0.1), (0.4, 0.1)])  # two tokens of the first row
        wait_for_change(page, "#filled canvas", reconstruction)
        count = "document.querySelectorAll('#tokens [aria-pressed=true]').length"
        page.wait_for(f"{count} === 2")
        page.value("document.querySelector('[name=brush][value=keep]').click()")
        page.value("document.querySelector('#tokens button').focus()")
        page.key("Enter", 13)
        page.wait_for(f"{count} === 1")
        page.click("#lower-half")
        page.wait_for(f"{count} === {TOKENS - LOWER_HALF}")

    def test_pasting_keeps_the_known_pixels(self, page):
        before = pixels(page, "#filled canvas")
        page.click("#paste")
        wait_for_change(page, "#filled canvas", before)
        same = page.value("""(() => {
            const top = (c) => `${c.getContext('2d').getImageData(0, 0, 16, 8).data}`;
            const seen = top(document.getElementById('seen'));
            return [...document.querySelectorAll('#filled canvas')].every((c) => top(c) === seen);
        })()""")
        assert same

    def test_the_slider_guides(self, page):
        """Dragged to the right, w grows and the digits change; at w = 0 both rows are the same."""
        before = pixels(page, "#guided canvas")
        page.drag("#w", [(0.35, 0.5), (0.6, 0.5), (0.8, 0.5)])
        page.wait_for("Number(document.getElementById('w-value').textContent) > 2")
        after = wait_for_change(page, "#guided canvas", before)
        assert len(set(after)) == 6 and not set(after) & set(before)
        page.value("document.getElementById('w').focus()")
        page.key("Home", 36)
        page.wait_for("document.getElementById('w-value').textContent === '0.0'")
        wait_for_change(page, "#guided canvas", after)
        assert pixels(page, "#guided canvas") == pixels(page, "#unguided canvas")

    def test_interpolation_takes_the_digit(self, page):
        before = pixels(page, "#walk canvas")
        page.click("#take-a")
        walk = wait_for_change(page, "#walk canvas", before)
        assert len(set(walk)) == 7
        assert "without a label" in text(page, "walk-label")
        (seen,) = pixels(page, "#seen")
        assert pixels(page, "#crossfade canvas")[0] == seen

    def test_the_race(self, page):
        """60 serial steps find the digit to rounding; G comes close in one."""
        page.click("#race")
        page.wait_for("/step [0-9]+ of 60/.test(document.body.textContent)")  # it is drawn
        page.wait_for("document.getElementById('race-result').textContent !== ''")
        result = text(page, "race-result")
        assert "60 steps" in result and "one pass" in result
        assert text(page, "exact-caption") == "exact inverse: done in 60 steps"
        assert int(re.search(r"error \d\s·\s10⁻(\S+)\.", result)[1].translate(DIGITS)) >= 9
        assert pixels(page, "#exact") == pixels(page, "#seen") != pixels(page, "#pass")

    def test_everything_has_a_name(self, page):
        """What a screen reader says of controls and pictures."""
        kinds = {"button", "slider", "combobox", "image", "radio", "checkbox", "group"}
        named = 0
        for node in page.call("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"] and node["role"]["value"] in kinds:
                assert node["name"]["value"].strip(), node
                named += 1
        assert named > 80

    @pytest.mark.parametrize("dark", [False, True])
    def test_fits_a_phone(self, page, dark):
        page.look(390, 844, dark)
        assert page.value("document.documentElement.scrollWidth") <= 390
        light = page.value(
            "Math.max(...getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)) > 128"
        )
        assert light is not dark

    def test_nothing_went_wrong(self, page):
        assert page.problems() == []
        assert all(url.startswith(("file:", "data:")) for url in page.requested())


DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
