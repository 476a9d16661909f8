#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb: its prose and the stored outputs of its cells, no code.

Below the title stands a badge for each workflow of .github/workflows that runs on every push.

Usage: make_readme.py [--check]      (--check: write nothing, fail when README.md would change)
"""

import re
import sys
from pathlib import Path

import nbformat
import yaml
from finish_notebooks import settings  # beside this file

ROOT = Path(__file__).resolve().parent.parent


def markdown(cell):
    """What a reader of the README sees of a cell: prose, or the Markdown that code put out."""
    if cell.cell_type == "markdown":
        return cell.source
    outputs = [o.get("data", {}) for o in cell.get("outputs", [])]
    return "\n\n".join("".join(d["text/markdown"]) for d in outputs if "text/markdown" in d)


def badges():
    """The badges, which GitHub draws: whether the newest run on the main branch passed."""
    found, runs_of = [], f"{settings()['git_url']}/actions/workflows"
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
        if "push" in workflow["on"]:
            runs = f"{runs_of}/{path.name}"
            found.append(f"[![{workflow['name']}]({runs}/badge.svg)]({runs})")
    return " ".join(found)


def readme():
    """The README's text; links are turned from nbs/ to the repository's root."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    parts = [markdown(cell).strip() for cell in notebook.cells]
    text = "\n\n".join(p for p in parts if p)
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", text).replace("](../", "](")
    title, rest = text.split("\n\n", 1)
    text = f"{title}\n\n{badges()}\n\n{rest}"
    note = "<!-- Written by nbs/make_readme.py from nbs/index.ipynb: edit that. -->"
    return f"{note}\n\n{text}\n"


def main():
    """Write, or compare."""
    path = ROOT / "README.md"
    if "--check" in sys.argv[1:]:
        if path.read_text(encoding="utf-8") != readme():
            sys.exit("README.md is not what nbs/index.ipynb says; run: make readme")
        return
    path.write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
