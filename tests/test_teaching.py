"""The instructor's folder: notation, links, the drawing of lessons, and the assignments."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
TEACHING = NBS / "teaching"
sys.path.insert(0, str(TEACHING))

import lessons  # noqa: E402
import variants  # noqa: E402

COURSE = [*NBS.glob("[0-9]*.ipynb"), *NBS.glob("excursions/*.ipynb")]
PAGES = sorted(TEACHING.glob("*.ipynb"))
MATH = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.S)
LONE = r"(?<!\\mathcal )(?<!\\mathbf )(?<![A-Za-z\\{])"  # no part of a longer name
CLASHES = {  # what a formula of a lesson must not say
    "temperature is τ, T counts tokens": r"z\s*=\s*T\s*(?:\\,)?\s*\\(?:var)?epsilon|T\s*<\s*1\b",
    "the clip bound is κ, c is the label": r"\[\s*-\s*c\s*,\s*c\s*\]|-c,\s*(?:\\,\s*)?c\b|e\^{?c\b",
    "the edge of the logit is δ, α the log-scale": r"logit\}?.*\\alpha",
    "a loss is ℒ, L counts layers": LONE + r"L\s*=\s*(?:\\mathcal|\\tfrac|\\sum|\\frac|D\b)",
    "a distance is 𝒟, D the size of a token": LONE + r"D(?:_\w+)?\s*(?:\\[bB]ig)?\s*\(\s*x",
}


def cells(path: Path, kind: str) -> list[str]:
    """The texts of a notebook's cells of one kind."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def formulas(path: Path) -> list[str]:
    """All mathematics in a notebook's prose."""
    return [f for text in cells(path, "markdown") for f in MATH.findall(text)]


def symbols() -> list[str]:
    """The first column of the notation page's first table, a formula for each symbol."""
    table = cells(TEACHING / "notation.ipynb", "markdown")[0].split("## ")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if "| $" in line]
    return [f for row in rows for f in MATH.findall(row)]


def parts(symbol: str) -> list[str]:
    """The single symbols of an entry such as `$f_i$` or `$C, H, W$`, without what they equal."""
    names = symbol.strip("$").split("=")[0].split(",")
    return [name.strip() for name in names]


def test_a_symbol_stands_once_on_the_page():
    names = [name for symbol in symbols() for name in parts(symbol)]
    assert len(names) > 25
    assert sorted({n for n in names if names.count(n) > 1}) == []


def test_every_symbol_on_the_page_is_used_in_a_lesson():
    everything = " ".join(formula for path in COURSE for formula in formulas(path))
    everything = re.sub(r"\s", "", everything)

    def used(name):
        bare = re.escape(re.sub(r"\s", "", name)).replace("_i", "_").replace(r"\^i", r"\^")
        return re.search(rf"(?<![A-Za-z\\]){bare}(?![A-Za-z])", everything.replace("{", ""))

    names = [re.sub(r"[{}]", "", n) for symbol in symbols() for n in parts(symbol)]
    assert [n for n in names if not used(n)] == []


@pytest.mark.parametrize("rule", CLASHES)
def test_no_letter_means_two_things(rule):
    found = {
        f"{path.name}: {formula[:60]}"
        for path in COURSE
        for formula in formulas(path)
        if re.search(CLASHES[rule], formula)
    }
    assert sorted(found) == []


@pytest.mark.parametrize(
    "rule, formula",
    [
        ("temperature is τ, T counts tokens", r"$z = T\,\varepsilon$"),
        ("the clip bound is κ, c is the label", r"$[-c, c]$"),
        ("the edge of the logit is δ, α the log-scale", r"$\mathrm{logit}(\alpha + x)$"),
        ("a loss is ℒ, L counts layers", r"$L = \mathcal D(x, x')$"),
        ("a distance is 𝒟, D the size of a token", r"$\sum_i D\big(x^i, h^i\big)$"),
    ],
)
def test_the_rules_find_what_they_are_for(rule, formula):
    assert re.search(CLASHES[rule], formula)


def test_links_of_the_pages_lead_somewhere():
    found = []
    for path in [*PAGES, *TEACHING.glob("assignments/*/*.ipynb")]:
        text = "\n".join(cells(path, "markdown"))
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http") and not (path.parent / target).exists():
                found.append(f"{path.name}: {target}")
    assert found == []


def test_the_glossary_is_in_order_and_links_each_term():
    text = cells(TEACHING / "glossary.ipynb", "markdown")[0]
    rows = re.findall(r"^\| ([^|]+) \| (.+) \| (\[.+) \|$", text, re.M)
    terms = [term for term, _, _ in rows]
    assert len(rows) == text.count("\n| ") - 1 >= 70 and len(set(terms)) == len(rows)
    initials = [term[0] for term in terms]
    assert initials == sorted(initials)
    lesson = re.compile(r"\[\d\d\]\(\.\./\d\d_\w+\.ipynb\)")
    assert [t for t, _, link in rows if not lesson.fullmatch(link)] == []
    assert [t for t, meaning, _ in rows if not meaning.endswith(".")] == []


def test_the_drawing_of_lessons_is_current():
    stored = lessons.DRAWING.read_text(encoding="utf-8")
    assert stored == lessons.drawing(lessons.read_lessons()), "run nbs/teaching/lessons.py"


def test_every_lesson_but_the_first_says_what_it_needs():
    read = lessons.read_lessons()
    assert [x.number for x in read if not x.needs] == [0]
    assert [x.number for x in read if not x.runs] == []


def test_needs_are_read_from_links_words_and_ranges():
    head = "[chapter 01](01_a.ipynb), lesson 3; [lessons 05](05_b.ipynb) to [07](07_c.ipynb)"
    assert lessons.needed(head, 9) == (1, 3, 5, 6, 7)
    assert lessons.time_to_run("**It runs** in about two minutes.") == "about two minutes"
    assert lessons.time_to_run("40 minutes to read, two to run.") == "two minutes"


def run_cells(cells, answers=None):
    """Run an assignment's code in order; the names of cells that raise."""
    space, failed = {}, set()
    for cell in cells:
        source = cell["source"]
        if answers is not None and cell.get("solution"):
            source = answers.get(cell["name"], "")
        if cell["kind"] == "code":
            try:
                exec(source, space)
            except Exception:
                failed.add(cell["name"])
    return failed


def solutions(cells):
    """The code that students write, by the name of its cell."""
    return {c["name"]: c["source"] for c in cells if c.get("solution") and c["kind"] == "code"}


def graded(cells):
    """Names of the cells that are graded by machine."""
    return {c["name"] for c in cells if c.get("grade") and c["kind"] == "code"}


@pytest.mark.parametrize("name", variants.TOPICS)
@pytest.mark.parametrize("seed, other", [("a", "b"), ("b", "2027"), ("2027", "group 2")])
def test_solutions_pass_their_own_variant_and_no_other(name, seed, other):
    mine, theirs = variants.assignment(name, seed), variants.assignment(name, other)
    assert run_cells(mine) == set()
    assert graded(theirs) <= run_cells(theirs, solutions(mine))
    assert graded(mine) <= run_cells(mine, {})


@pytest.mark.parametrize("name", variants.TOPICS)
def test_variants_differ_and_repeat(name):
    texts = {seed: variants.notebook(name, seed) for seed in "abc"}
    assert len(set(texts.values())) == 3
    assert texts["a"] == variants.notebook(name, "a")


def test_every_assignment_has_one_question_in_words():
    for name in variants.TOPICS:
        cells = variants.assignment(name, "a")
        words = [c for c in cells if c["kind"] == "markdown" and c.get("grade")]
        names = [c["name"] for c in cells if c["name"]]
        assert len(words) == 1 and len(set(names)) == len(names)


def test_stored_assignments_are_current_and_keep_what_nbgrader_needs():
    assert variants.stale() == [], "run nbs/teaching/variants.py"
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "allowed_cell_metadata_keys = nbgrader" in settings  # nbdev_clean would drop it


def handed_in(release: Path, cells) -> str:
    """A student's notebook: the released one with answers put in."""
    notebook = json.loads(release.read_text(encoding="utf-8"))
    answers = {**solutions(cells), "words": "An answer in words."}
    for cell in notebook["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if name in answers:
            cell["source"] = answers[name]
    return json.dumps(notebook)


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    """An nbgrader course with the assignments of one seed."""
    pytest.importorskip("nbgrader")
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    patch = pytest.MonkeyPatch()
    tools = str(Path(sys.executable).parent)  # nbgrader calls alembic by name
    patch.setenv("PATH", os.pathsep.join([tools, os.environ["PATH"]]))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    patch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    root = tmp_path_factory.mktemp("course")
    variants.write("this year", root / "source")
    config = Config()
    config.CourseDirectory.root = str(root)
    config.Execute.timeout = 300
    yield root, NbGraderAPI(config=config)
    patch.undo()


@pytest.mark.parametrize("name", variants.TOPICS)
@pytest.mark.filterwarnings("ignore")
def test_nbgrader_tells_right_from_wrong(name, grader):
    root, api = grader
    made = api.generate_assignment(name, force=True, create=True)
    assert made["success"], made["log"]
    release = root / "release" / name / f"{name}.ipynb"
    text = release.read_text(encoding="utf-8")
    assert "HIDDEN" not in text and "SOLUTION" not in text and "For grading" not in text
    scores = {}
    for student, seed in (("right", "this year"), ("wrong", "last year")):
        path = root / "submitted" / student / name / release.name
        path.parent.mkdir(parents=True)
        path.write_text(handed_in(release, variants.assignment(name, seed)), encoding="utf-8")
        done = api.autograde(name, student, force=True, create=True)
        assert done["success"], done["log"]
        with api.gradebook as book:
            notebook = book.find_submission_notebook(name, name, student)
            grades = {g.cell.name: (g.auto_score, g.max_score) for g in notebook.grades}
            by_hand = [g.cell.name for g in notebook.grades if g.needs_manual_grade]
        assert by_hand == ["words"]
        scores[student] = {cell: score for cell, score in grades.items() if cell != "words"}
    assert all(got == most > 0 for got, most in scores["right"].values())
    assert all(got == 0 for got, _ in scores["wrong"].values())


def test_the_scripts_run_as_the_syllabus_says(tmp_path):
    script = [sys.executable, str(TEACHING / "variants.py")]
    subprocess.run([*script, "--seed", "x", "--out", str(tmp_path)], check=True)
    found = {path.stem for path in tmp_path.glob("*/*.ipynb")}
    assert found == set(variants.TOPICS)
    subprocess.run([sys.executable, str(TEACHING / "lessons.py"), "--check"], check=True)


def test_progress_finds_the_exercises_of_every_lesson():
    "As many checking cells as say that nothing is answered, in the lessons as they are stored."
    cells = json.loads((TEACHING / "progress.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells[:5]:  # those that define functions
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    for folder in (NBS, NBS / "excursions"):
        found = names["progress"](folder)
        for path in folder.glob("*.ipynb"):
            open_ones = 0
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                said = "".join("".join(o.get("text", "")) for o in cell.get("outputs", ()))
                open_ones += "not answered yet" in said
            assert found.get(path.stem, "").count("·") == open_ones, path.name
    assert sum(path.name[0].isdigit() for path in NBS.glob("*.ipynb")) <= len(
        names["progress"](NBS)
    )
