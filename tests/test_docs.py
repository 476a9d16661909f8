"""The site: every notebook has its place, every module a page, and dead links are found."""

import importlib.util
import json
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

import bitflow_edu

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture
def docs(monkeypatch):
    """Imports a module of docs/."""
    monkeypatch.syspath_prepend(str(DOCS))
    names = [path.stem for path in DOCS.glob("*.py")]
    yield import_module
    for name in names:
        sys.modules.pop(name, None)


def cell(source, **outputs):
    """A code cell with a directive or two."""
    data = [{"output_type": "display_data", "data": outputs}] if outputs else []
    return {"cell_type": "code", "metadata": {}, "source": [source], "outputs": data}


def test_every_notebook_is_listed_once(docs):
    contents = docs("contents")
    pages = [page for section in contents.sections() for page in section.pages]
    listed = [page for page in pages if page.endswith(".ipynb")]
    assert sorted(listed) == sorted(p.relative_to(ROOT).as_posix() for p in NOTEBOOKS)
    assert len(set(pages)) == len(pages)
    assert all(contents.label(page) for page in pages)


def test_the_sidebar_leads_to_every_page_once(docs):
    contents, stage = docs("contents"), docs("stage")
    found = contents.sections()
    trees = stage.site_contents(found) + "".join(stage.index_page(s) for s in found if s.index)
    for page in [page for section in found for page in section.pages]:
        assert trees.count(f"</{page.rsplit('.', 1)[0]}>") == 1, page


def test_every_module_has_a_page_with_all_its_names(docs):
    api = docs("api_pages")
    expected = {"bitflow_edu"}
    for module in pkgutil.walk_packages(bitflow_edu.__path__, "bitflow_edu."):
        if not module.ispkg and not module.name.endswith("._modidx"):
            expected.add(module.name)
    assert set(api.modules()) == expected
    pages = api.api_pages(str)
    for module in expected:
        page = pages[api.page_of(module)]
        for name in getattr(import_module(module), "__all__", []):
            assert f"}} {name}" in page or f"{{py:obj}}`{name} <" in page, (module, name)


def test_arguments_are_shown_with_types_and_comments(docs):
    api = docs("api_pages")
    page = api.module_page("bitflow_edu.exact_inverse", "nbs/08_exact_inverse.ipynb", str)
    assert "{py:function} score_denoise(model, x, c)" in page
    assert "- **x** `Tensor`: noisy images x̃ `(N, C, H, W)`" in page
    assert "- *returns* `Tensor`: the expected clean images, same shape" in page
    assert "```pycon\n>>> " in page


def test_directives_become_what_the_site_understands(docs):
    stage = docs("stage")
    shown = stage.code_cell(cell("#| export\n#| fig-alt: A line rises.\nx = 1"), "nbs/a.ipynb", ())
    assert shown["source"] == "x = 1" and shown["metadata"]["tags"] == ["exported"]
    assert shown["metadata"]["mystnb"]["image"]["alt"] == "A line rises."
    assert stage.code_cell(cell("#| default_exp data"), "nbs/a.ipynb", ()) is None


def test_links_stay_on_the_site_where_it_has_the_page(docs):
    stage = docs("stage")
    staged = {"results/README.md", "nbs/solutions/index.md"}
    text = "[a](../results/README.md) [b](../LICENSE) [c](solutions) [d](https://x.y) [e](no.ipynb)"
    found = stage.linked(text, "nbs/index.ipynb", staged)
    assert "[a](../results/README.md)" in found and "[c](solutions/index.md)" in found
    assert f"[b]({stage.settings()['git_url']}/blob/main/LICENSE)" in found
    assert "[d](https://x.y)" in found and "[e](no.ipynb)" in found


def test_lessons_lead_to_their_solutions(docs):
    stage = docs("stage")
    for solved in (ROOT / "nbs" / "solutions").glob("*.ipynb"):
        name = solved.name.replace("_solutions", "")
        (lesson,) = [path for path in NOTEBOOKS if path.name == name]
        assert f"solutions/{solved.name})" in stage.notebook(
            lesson.relative_to(ROOT).as_posix(), {f"nbs/solutions/{solved.name}"}
        )


def test_dead_links_are_found(docs, tmp_path):
    (tmp_path / "b.html").write_text('<p id="there"><a href="https://x.y/z">out</a>')
    links = ("b.html", "b.html#there", "b.html#gone", "c.html", "#nowhere", "#")
    (tmp_path / "a.html").write_text("".join(f'<a href="{link}">a</a>' for link in links))
    dead, looked_at = docs("check_links").dead_links(tmp_path)
    assert [link for _, link in dead] == ["b.html#gone", "c.html", "#nowhere"]
    assert looked_at == len(links)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make docs does)")
def test_sphinx_builds_a_page_without_executing_it(docs, tmp_path):
    build = docs("sphinx.cmd.build").main
    source = tmp_path / "source"
    source.mkdir()
    page = {
        "cells": [
            {"cell_type": "markdown", "metadata": {}, "source": "# Title\n\n$x^2$"},
            {**cell("raise SystemExit"), "execution_count": None},
        ],
        "metadata": {"kernelspec": docs("stage").KERNEL},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    (source / "index.ipynb").write_text(json.dumps(page))
    assert build(["-q", "-W", "-c", str(DOCS), str(source), str(tmp_path / "html")]) == 0
    html = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert "SystemExit" in html and 'class="math' in html
