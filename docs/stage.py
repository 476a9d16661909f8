"""Copy what the site shows to build/docs-source, in the shape that Sphinx needs.

    python docs/stage.py

The copy is a mirror of the repository, so that links between notebooks work as they are. Of a
notebook's cells, nbdev's directives become what the site understands: `#| fig-alt:` the alt text
of pictures, `#| export` a mark. No cell is executed.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nbs")]

from api_pages import api_pages  # noqa: E402  beside this file
from contents import ROOT, label, lessons, sections  # noqa: E402
from finish_notebooks import settings  # noqa: E402  in nbs
from slides.prose import directives, without_marks  # noqa: E402

SOURCE = ROOT / "build" / "docs-source"
DECKS = ROOT / "build" / "decks" / "slides"  # what make slides has built
MATHJAX = ROOT / "build" / "mathjax" / "package" / "es5" / "tex-svg-full.js"
STATIC = (ROOT / "docs" / "style.css", ROOT / "results" / "demo-mnist-mini.png", MATHJAX)
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def on_github(path):
    """The address of a file or a folder of the repository."""
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{settings()['git_url']}/{kind}/{settings()['branch']}/{path}"


def linked(text, page, staged):
    """The text with its links to what the site does not have turned to the repository."""

    def turned(match):
        before, target, after = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path = os.path.normpath(Path(page).parent / target).replace(os.sep, "/")
        if path in staged or not (ROOT / path).exists():
            return match[0]  # a link that leads nowhere is for Sphinx to report
        if f"{path}/index.md" in staged:
            return f"{before}{target.rstrip('/')}/index.md{after}"
        return f"{before}{on_github(path)}{after}"

    return LINK.sub(turned, text)


def code_cell(cell, page, staged):
    """A code cell with tags and alt text in place of nbdev's directives; None: not to be shown."""
    found, source = directives("".join(cell["source"]))
    cell["source"] = source.strip("\n")
    if not cell["source"] or '"google.colab" in sys.modules' in cell["source"]:
        return None
    tags = []
    if "hide" in found:
        tags.append("remove-input")
    if {"export", "exporti"} & found.keys():
        tags.append("exported")
    cell["metadata"]["tags"] = tags
    alt = found.get("fig-alt", "A picture that the code above draws")
    cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
    for output in cell["outputs"]:
        data = output.get("data", {})
        data.pop(WIDGET, None)  # needs a kernel; the picture or text beside it is shown
        if "text/markdown" in data:
            data["text/markdown"] = linked("".join(data["text/markdown"]), page, staged)
    return cell


def solutions_link(path, cells):
    """A cell that leads to a lesson's worked solutions, where there are some and no cell does."""
    name = f"{Path(path).stem}_solutions.ipynb"
    linked_already = any(f"solutions/{name})" in cell["source"] for cell in cells)
    if linked_already or not (ROOT / "nbs" / "solutions" / name).exists():
        return []
    source = f"Worked solutions, for after trying: [{name}](/nbs/solutions/{name})."
    return [{"cell_type": "markdown", "id": "solutions", "metadata": {}, "source": source}]


def deck_links(path):
    """Pairs of a name and a file for the slides of a lesson, as far as they are built."""
    kinds = (("HTML", "html"), ("PDF", "pdf"))
    files = [(name, f"{Path(path).stem}.{suffix}") for name, suffix in kinds]
    return [(name, file) for name, file in files if (DECKS / file).exists()]


def slides_link(path):
    """A cell that leads to a lesson's slides, where they are built."""
    links = deck_links(path)
    if Path(path).parent.name != "nbs" or not links:
        return []
    named = [f'<a href="../slides/{file}">{name}</a>' for name, file in links]
    source = f"Slides of this lesson: {', '.join(named)}."
    return [{"cell_type": "markdown", "id": "slides", "metadata": {}, "source": source}]


def slides_page():
    """The page that lists all decks; empty where none are built."""
    lines = []
    for path in [page for section in lessons() for page in section.pages]:
        named = [f'<a href="{file}">{name}</a>' for name, file in deck_links(path)]
        if named:
            lines.append(f"| [{label(path)}](/{path}) | {', '.join(named)} |")
    if not lines:
        return ""
    text = "One deck for each lesson, made from its cells. In the HTML file, `p` opens the view of "
    text += "the speaker with notes, and `f` fills the screen."
    return "\n".join(["# Slides", "", text, "", "| lesson | slides |", "|---|---|", *lines, ""])


def notebook(path, staged):
    """The notebook as the site shows it, as JSON."""
    found = json.loads((ROOT / path).read_text(encoding="utf-8"))
    found["metadata"].pop("widgets", None)
    found["metadata"].setdefault("kernelspec", KERNEL)
    found["metadata"].setdefault("language_info", {"name": "python"})
    cells = []
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            cell = code_cell(cell, path, staged)
        else:
            cell["source"] = linked(without_marks("".join(cell["source"])), path, staged)
        if cell is not None:
            cells.append(cell)
    found["cells"] = cells[:1] + slides_link(path) + cells[1:] + solutions_link(path, cells)
    return json.dumps(found, ensure_ascii=False)


def toctree(pages, caption="", hidden=True):
    """A list of pages for the sidebar; pages are (label, path)."""
    options = [":hidden:"] if hidden else []
    if caption:
        options.append(f":caption: {caption}")
    names = [f"{name} </{path.rsplit('.', 1)[0]}>" for name, path in pages]
    return "\n".join(["```{toctree}", *options, "", *names, "```", ""])


def labelled(paths):
    """Pairs of label and path."""
    return [(label(path), path) for path in paths]


def index_page(section):
    """The page that lists a section."""
    pages = toctree(labelled(section.pages), hidden=False)
    return f"# {section.caption}\n\n{section.text}\n\n{pages}"


def site_contents(found, slides=False):
    """The toctrees of the front page; `slides`: there is a page that lists decks."""
    wings = [(s.caption, s.index) for s in found if s.index and s.caption.islower()]
    trees = []
    for section in found:
        if not section.index:
            pages = labelled(section.pages)
            if slides and section.caption == "Teaching":
                pages.append(("Slides", "slides/index.md"))
            trees.append(toctree(pages, section.caption))
        elif section.caption == "Solutions":
            trees.append(toctree([("Solutions", section.index)]))
    reference = toctree([("API", "api/index.md")], "Reference")
    return "\n".join([*trees[:-1], reference, toctree(wings, "For maintainers"), trees[-1]])


def write(path, text):
    """Write a file of the site's source, unless it is there already: Sphinx looks at times."""
    file = SOURCE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file


def copy(path, to):
    """The same for a file that is copied as it is."""
    file = SOURCE / to
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_bytes() != path.read_bytes():
        shutil.copyfile(path, file)
    return file


def pictures():
    """Pictures that pages show by their paths."""
    found = [*(ROOT / "results").glob("*.png"), *(ROOT / "nbs" / "figures").glob("*.svg")]
    return [path.relative_to(ROOT).as_posix() for path in found]


def main():
    """Write the source of the site, and remove what an earlier one left."""
    found = sections()
    pages = [page for section in found for page in section.pages]
    indices = {section.index: index_page(section) for section in found if section.index}
    if slides := slides_page():
        indices["slides/index.md"] = slides
    staged = {*pages, *indices, *pictures()}
    files = [copy(ROOT / path, path) for path in pictures()]
    files += [copy(path, f"_static/{path.name}") for path in STATIC if path.exists()]
    for page in pages:
        if page.endswith(".ipynb"):
            text = notebook(page, staged)
        else:
            text = linked((ROOT / page).read_text(encoding="utf-8"), page, staged)
        files.append(write(page, text))
    for path, text in {**indices, **api_pages(on_github)}.items():
        files.append(write(path, text))
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    trees = site_contents(found, bool(slides))
    files.append(write("index.md", front.replace("<!-- CONTENTS -->", trees)))
    for file in SOURCE.rglob("*"):
        if file.is_file() and file not in files:
            file.unlink()
    print(f"{len(files)} files for Sphinx in {SOURCE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
