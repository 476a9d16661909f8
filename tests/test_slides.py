"""Slides: rules that make decks of lessons, and decks that a lecturer can use. Needs no Node."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LESSONS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
FEWEST, MOST = 20, 35  # slides
MARKED = re.compile(r"<!--\s*slide\b.*?-->|^#\|\s*slide\b.*$", re.MULTILINE)


@pytest.fixture(scope="module")
def slides():
    """Imports a module of docs/slides."""
    folders = [str(DOCS / "slides"), str(DOCS)]
    names = [path.stem for folder in folders for path in Path(folder).glob("*.py")]
    sys.path[:0] = folders
    yield import_module
    for folder in folders:
        sys.path.remove(folder)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def decks(slides):
    """The deck of each lesson, by its file's name."""
    return {path.stem: slides("deck").deck_of(path) for path in LESSONS}


def cells(path):
    """Kinds and sources of a notebook's cells."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in found]


def text(source):
    """A markdown cell."""
    return {"cell_type": "markdown", "metadata": {}, "source": [source]}


def code(source, *outputs):
    """A code cell with its outputs."""
    return {"cell_type": "code", "metadata": {}, "source": [source], "outputs": list(outputs)}


def shows(**data):
    """An output of rich data, such as a picture."""
    names = {"png": "image/png", "markdown": "text/markdown"}
    return {"output_type": "display_data", "data": {names[k]: [v] for k, v in data.items()}}


def prints(words):
    """What a cell printed."""
    return {"output_type": "stream", "name": "stdout", "text": [words]}


@pytest.fixture
def made(slides, tmp_path):
    """Makes the slides of some cells, after a title."""

    def make(*cells):
        path = tmp_path / "lesson.ipynb"
        path.write_text(json.dumps({"cells": [text("# Title\n\nAfter it you can."), *cells]}))
        return slides("deck").deck_of(path).slides[1:]

    return make


def kinds(found):
    """The kinds of blocks on each slide."""
    return [slide.kinds for slide in found]


# ---- the decks of the course


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_lesson_has_a_deck_that_one_can_hold(path, slides, decks):
    deck, limits = decks[path.stem], slides("deck")
    assert FEWEST <= len(deck.slides) <= MOST
    assert deck.slides[0].kind == "lead"
    titles = [slide.title for slide in deck.slides]
    assert {"Exercises", "What we learned"} <= set(titles)
    for slide in deck.slides:
        assert slide.blocks and slide.words <= slide.room, slide.title
        for block in slide.blocks:
            lines = block.text.splitlines()
            assert block.text.strip(), slide.title
            if block.kind in ("code", "output"):
                assert len(lines) <= limits.MAX_CODE, slide.title
                assert max(map(len, lines)) <= limits.MAX_COLUMNS, slide.title
            if block.kind == "picture":
                assert len(block.text) > 20, f"{slide.title}: a picture without words for it"
    said = sum(bool(slide.notes) for slide in deck.slides)
    assert said > len(deck.slides) / 2  # the speaker has something to say


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_formulas_are_whole(path, slides, decks):
    for slide in decks[path.stem].slides:
        for block in slide.blocks:
            if block.kind in ("code", "output", "picture"):
                continue
            assert slides("prose").whole(block.text), (slide.title, block.text)
            for one, other in (("{", "}"), (r"\left", r"\right"), (r"\begin", r"\end")):
                formula = block.text.replace(r"\leftarrow", "").replace(r"\rightarrow", "")
                assert formula.count(one) == formula.count(other), (slide.title, block.text)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_every_mark_is_known(path, slides):
    limits, mark = slides("deck"), slides("prose").MARK
    for kind, source in cells(path):
        for found in MARKED.findall(source):
            assert path in LESSONS, "only numbered lessons have decks"
            if kind == "markdown":
                assert mark.fullmatch(found)[1] in limits.TEXT_MARKS - {""}, found
                continue
            words = found.split("slide", 1)[1].replace(",", " ").split()
            names = [word for word in words if word not in limits.CODE_MARKS]
            _, plain = slides("prose").directives(source)
            assert words and (not names or slides("listing").shown_code(plain, names))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_deck_is_one_file(path, slides, decks):
    deck = decks[path.stem]
    written = slides("marp").deck_markdown(deck, "07 TARFlow", path.parent)
    assert written.count("\n\n---\n\n") == len(deck.slides) - 1
    assert written.count("<!--") == written.count("-->")
    assert all(source.startswith("data:") for source in re.findall(r' src="(.{5})', written))
    assert not re.search(r"\]\((?!data:)[^)\s]+\.(?:ipynb|svg|png)\)", written)


# ---- the rules


def test_a_heading_begins_a_slide_and_shows_something(made):
    found = made(
        text("## One\n\nFirst of all. ($a.$ B) Then this.\n\nNot shown.\n\n## Two\n\n$$x$$")
    )
    assert [slide.title for slide in found] == ["One", "Two"]
    assert found[0].blocks[0].text == "First of all. ($a.$ B) Then this."
    assert found[0].notes[1] == "Not shown."
    assert kinds(found)[1] == ["formula"]


def test_what_came_is_not_on_the_slide_of_its_prediction(made):
    question = text("## A\n\nWe look. **Prediction.** Will it rise?")
    (asked, answered) = made(question, code("1", prints("it rose\n")), text("So it is."))
    assert asked.kinds == ["prediction"] and answered.kinds == ["output"]
    assert asked.blocks[0].text == "We look. **Prediction.** Will it rise?"
    found = made(
        question, code("1", prints("it rose"), shows(png="aaaa")), text("*Look.* It rose.")
    )
    assert kinds(found) == [["prediction"], ["picture", "caption"]]


def test_a_caption_makes_room_for_a_conclusion(made):
    caption = "*" + " ".join(f"Sentence {i} of the caption." for i in range(8)) + "*"
    picture = code("#| fig-alt: A line.\nplot()", shows(png="aaaa"))
    (slide,) = made(text("## A\n\nText."), picture, text(caption))
    assert slide.kinds == ["picture", "caption"]
    whole = slide.blocks[1].words
    conclusion = "The **line** " + "really " * 20 + "rises."
    (slide,) = made(text("## A"), picture, text(caption), code("1", shows(markdown=conclusion)))
    assert slide.kinds == ["picture", "caption", "conclusion"]
    assert slide.words <= slide.room and slide.blocks[1].words < whole
    assert slide.blocks[0].text == "A line."


def test_sections_to_skip_and_marks(made):
    method = "class A(B):\n    x = 1\n\n    def f(self):\n        'f'\n        y"
    one_whole = "## B\n\nText.\n\n<!-- slide: show -->\nShown whole."
    found = made(
        text("## Skip at first: files\n\n**This is bold and long enough to be seen.**"),
        code("1", shows(png="aaaa")),
        text(f"{one_whole}\n\n<!-- slide: skip -->\n### C\n\nNot this."),
        code("1", shows(png="aaaa")),
        text("## D"),
        code(f"#| export\n#| slide A.f\n{method}"),
        code("#| slide skip\n1", shows(png="aaaa")),
    )
    assert [slide.title for slide in found] == ["B", "D"]
    assert found[0].blocks[0].text == "Shown whole."
    assert found[1].blocks[0].text == "class A(B):\n    def f(self):\n        y"


def test_code_stands_below_its_formula(made):
    lines = "\n".join(f"    x{i} = 0  # why" for i in range(20))
    (slide,) = made(
        text("## A\n\nIt is\n\n$$y = x$$"), code("#| export\ndef f(x):\n    'Doc.'\n    x")
    )
    assert slide.kinds == ["text", "formula", "code"]
    assert slide.blocks[2].text == "def f(x):\n    x"
    (slide,) = made(text("## A\n\n$$y = x$$"), code(f"#| export\ndef f(x):\n{lines}"))
    assert slide.kinds == ["formula"]


def test_lists_and_exercises_by_their_first_sentences(made):
    found = made(
        text("## A\n\n- One is a short sentence. More.\n- Two.\n  - no\n- **Name.** It is so. No."),
        text("## Exercises\n\nReplace the `None`s.\n\n**Exercise 1 (recall).** What is it? Think."),
        code("1", shows(png="aaaa")),
        text("### 2. Derive it (derive)\n\n<details><summary>Hint</summary>\n\nNo.\n\n</details>"),
    )
    items = [block.text for block in found[0].blocks]
    assert items == ["- One is a short sentence.", "- Two.", "- **Name.** It is so."]
    items = [block.text for block in found[1].blocks]
    assert items == ["- **Exercise 1 (recall).** What is it?", "- Derive it (derive)"]
    assert "No." not in " ".join(found[1].notes)


def test_sentences_keep_formulas_and_names_whole(slides):
    prose = slides("prose")
    found = prose.sentences(
        "By Zhai et al. $x. Y$ is (see A. B) **bold. Too.** Next `a. B` 0.5 high."
    )
    assert found == ["By Zhai et al. $x. Y$ is (see A. B) **bold. Too.**", "Next `a. B` 0.5 high."]
    assert prose.bold("**one** between **two**") == ["one", "two"]
    assert prose.words("the density $p(x) = 1$ here") == 4
    assert (
        prose.clause("This is what we all learned: nothing (a: b).")
        == "This is what we all learned."
    )
    assert prose.clause("Two things: a, b.") == "Two things: a, b."


# ---- nbdev and the site


def test_marks_survive_nbdev_clean_and_stay_off_the_site(slides):
    marked = [text("<!-- slide: skip -->\n## A"), code("#| slide skip\n1")]
    notebook = {"cells": marked, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    before = [cell["source"][0] for cell in marked]
    clean_nb(notebook)
    assert ["".join(cell["source"]) for cell in notebook["cells"]] == before
    for path in LESSONS:
        page = path.relative_to(ROOT).as_posix()
        shown = slides("stage").notebook(page, set())
        assert "#| slide" not in shown and "<!-- slide" not in shown


def test_the_site_links_decks_where_they_are_built(slides, monkeypatch, tmp_path):
    stage = slides("stage")
    monkeypatch.setattr(stage, "DECKS", tmp_path)
    lesson = "nbs/07_tarflow.ipynb"
    assert stage.slides_link(lesson) == [] and stage.slides_page() == ""
    (tmp_path / "07_tarflow.html").touch()
    assert "../slides/07_tarflow.html" in stage.notebook(lesson, set())
    assert stage.slides_link("nbs/index.ipynb") == []
    page = stage.slides_page()
    assert page.count('href="07_tarflow.html"') == 1 and "pdf" not in page
    assert "slides/index" in stage.site_contents(stage.sections(), bool(page))
