"""Drawings that are well formed and shown, and words for each picture that one may not see."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from bitflow_edu.autoregressive import made_masks

NBS = Path(__file__).resolve().parent.parent / "nbs"
FIGURES = NBS / "figures"
DRAWINGS = sorted(FIGURES.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]*figures/[^)\s]+)\)")  # alt text, path
ANY_PICTURE = re.compile(r"!\[([^\]]*)\]\(|<img\b")
MIN_TEXT, MIN_ALT = 14, 20  # units; characters
NOTEBOOKS = sorted(NBS.rglob("*.ipynb"))


def root_of(path):
    """The root element of a drawing."""
    return ElementTree.parse(path).getroot()


def pictures():
    """(notebook, alt text, path) of each drawing that a markdown cell shows."""
    found = []
    for notebook in sorted(NBS.rglob("*.ipynb")):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                shown = PICTURE.findall("".join(cell["source"]))
                found += [(notebook, alt, path) for alt, path in shown]
    return found


def picture_cells(notebook):
    """The sources of the code cells that leave a picture."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [
        "".join(cell["source"])
        for cell in code
        if any("image/png" in output.get("data", {}) for output in cell["outputs"])
    ]


def spoken(source):
    """What a cell says of its picture, read as Quarto does; "" if nothing."""
    for line in source.splitlines():
        if not line.startswith("#|"):
            break
        if line.startswith("#| fig-alt:"):
            return yaml.safe_load(line.removeprefix("#|"))["fig-alt"] or ""
    return ""


def in_light(style):
    """A style sheet without what dark mode changes."""
    return style.partition("@media")[0]


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
class TestEachDrawing:
    def test_has_title_description_and_licence(self, path):
        root = root_of(path)
        assert root.tag == SVG + "svg" and root.get("role") == "img"
        named = {e.get("id"): (e.text or "").strip() for e in root.iter() if e.get("id")}
        assert all(named[name] for name in root.get("aria-labelledby").split())
        assert root.find(SVG + "title") is not None and root.find(SVG + "desc") is not None
        assert re.search(r"<!-- bitflow_edu, Apache-2\.0", path.read_text(encoding="utf-8"))

    def test_stands_alone(self, path):
        """No script, no event handler, nothing loaded from elsewhere."""
        root, text = root_of(path), path.read_text(encoding="utf-8")
        for element in root.iter():
            assert element.tag not in {SVG + "script", SVG + "image", SVG + "foreignObject"}
            assert not [name for name in element.attrib if name.startswith("on") or "href" in name]
        assert not re.search(r"@import|@font-face|javascript:", text)
        ids = {e.get("id") for e in root.iter()}
        targets = re.findall(r"url\(([^)]*)\)", text)
        assert all(t.startswith("#") and t[1:] in ids for t in targets)

    def test_has_a_background_for_light_and_dark(self, path):
        root = root_of(path)
        width, height = root.get("width"), root.get("height")
        assert root.get("viewBox") == f"0 0 {width} {height}" and int(width) <= 900
        background = root.find(SVG + "rect")
        assert background.get("class") == "bg"
        assert (background.get("width"), background.get("height")) == (width, height)
        style = root.find(SVG + "style").text
        assert "@media (prefers-color-scheme: dark)" in style
        assert ".bg" in style.partition("prefers-color-scheme: dark")[2]

    def test_uses_classes_that_the_style_defines(self, path):
        """A colour stands in the style alone: what has one of its own would stay in dark mode."""
        root = root_of(path)
        defined = set(re.findall(r"\.([a-z][a-z-]*)", in_light(root.find(SVG + "style").text)))
        for element in root.iter():
            assert set((element.get("class") or "").split()) <= defined
            assert not {"fill", "stroke", "style", "font-size"} & set(element.attrib)

    def test_has_text_large_enough(self, path):
        sizes = re.findall(r"([\d.]+)px", root_of(path).find(SVG + "style").text)
        assert sizes and min(map(float, sizes)) >= MIN_TEXT


def test_all_drawings_share_one_style():
    """So a colour means the same in every lesson."""
    assert DRAWINGS and len({root_of(path).find(SVG + "style").text for path in DRAWINGS}) == 1


def test_what_notebooks_show_exists():
    found = pictures()
    assert found
    for notebook, alt, path in found:
        assert (notebook.parent / path).is_file(), f"{notebook.name} shows {path}"
        assert len(alt) > MIN_ALT, f"{notebook.name}: say in the alt text what {path} shows"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_told_in_words(notebook):
    """`#| fig-alt: …` at the top of each cell that leaves a picture, plain text in YAML."""
    untold = [source for source in picture_cells(notebook) if len(spoken(source)) < MIN_ALT]
    assert [source[:200] for source in untold] == []


def test_pictures_in_prose_have_alt_text():
    """Whatever they are: no `![](…)`, and no HTML image, whose alt text is easily forgotten."""
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                for match in ANY_PICTURE.finditer("".join(cell["source"])):
                    assert len(match[1] or "") > MIN_ALT, f"{notebook.name}: {match[0]}"


def test_alternative_texts_are_read_as_yaml():
    assert spoken('#| exporti\n#| fig-alt: "Left: a curve."\nx = 1') == "Left: a curve."
    assert spoken("x = 1\n#| fig-alt: too late") == spoken("#| fig-alt:\nx = 1") == ""
    with pytest.raises(yaml.YAMLError):
        spoken("#| fig-alt: Left: a colon wants quotes")


def test_modules_hold_no_words_for_pictures():
    """nbdev exports the line with its cell: a cell that is exported should leave no picture."""
    package = NBS.parent / "bitflow_edu"
    assert [p.name for p in package.rglob("*.py") if "fig-alt" in p.read_text("utf-8")] == []


def test_each_drawing_is_shown_or_listed():
    shown = {Path(path).name for _, _, path in pictures()}
    listed = (FIGURES / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in DRAWINGS if p.name not in shown and f"`{p.name}`" not in listed] == []


def test_made_has_the_connections_of_its_masks():
    """As many lines cut and open as `made_masks` says for four numbers and two layers of five."""
    masks = made_masks(4, (5, 5), per_dim=1)
    drawn = root_of(FIGURES / "made.svg").findall(SVG + "path")  # those of the legend lie deeper
    lines = {path.get("class"): path.get("d").count("M") for path in drawn}
    assert lines["off"] == sum(int((mask == 0).sum()) for mask in masks)
    assert lines["line thin"] + lines["f-line"] == sum(int(mask.sum()) for mask in masks)


def test_dependence_fills_one_token_a_step_and_turns_at_every_block():
    """The cells computed, from top to bottom: places 1 … T−1 of each block, odd blocks reversed."""
    T, B, left, pitch = 5, 3, 140, 38  # as drawn: tokens, blocks, place and distance of the cells
    cells = root_of(FIGURES / "dependence.svg").iter(SVG + "rect")
    new = [r for r in cells if r.get("class") == "f-full" and int(r.get("x")) < left + T * pitch]
    new.sort(key=lambda r: int(r.get("y")))
    wanted = []
    for i in reversed(range(B)):
        order = list(range(T))
        wanted += (order[::-1] if i % 2 else order)[1:]
    assert [(int(r.get("x")) - left) // pitch for r in new] == wanted
