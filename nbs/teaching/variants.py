#!/usr/bin/env python3
"""Write the four assignments for nbgrader, in the variant that belongs to a course seed.

Usage: variants.py --seed SEED --out FOLDER    (FOLDER is the `source` folder of an nbgrader course)
       variants.py [--check]                   (the assignments stored in nbs/teaching/assignments)

Constants, maps, shapes, conventions and the order of the questions follow from the seed, so a
solution of one seed does not pass the hidden tests of another. Keep the seed of a running course
to yourself: whoever knows it can write the solutions.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from random import Random

from questions import TOPICS, text

STORED, STORED_SEED = Path(__file__).resolve().parent / "assignments", "example"
FLAGS = ("grade", "solution", "locked")
WELCOME = """# Assignment: {title}

**Needs** {covers} of the course. Write your code where it says `YOUR CODE HERE`, and your words
where it says `YOUR ANSWER HERE`. Some tests you see, others run when the work is graded; they use
the constants and conventions of *your* text, so read it closely. Before you hand it in: restart the
kernel, run all cells, and see that no test fails.

**Points:** {points}."""


def assignment(name: str, seed: str) -> list[dict]:
    "Cells of one assignment in the variant of a seed, with solutions and hidden tests."
    title, covers, head, questions, essay = TOPICS[name]
    rng = Random(f"{seed}/{name}")
    questions = rng.sample(questions, len(questions))
    found = []
    for question in [*questions, essay]:
        found += question(Random(f"{seed}/{name}/{question.__name__}"))
    points = sum(c["points"] for c in found)
    welcome = text(WELCOME.format(title=title, covers=covers, points=points))
    setup = {"kind": "code", "source": head.strip(), "name": "setup", "points": 0, "locked": True}
    return [welcome, setup, *found]


def notebook_cell(cell: dict, name: str, index: int) -> dict:
    "A cell as Jupyter stores it, with nbgrader's metadata where it has a name."
    identity = hashlib.sha1(f"{name}/{cell['name'] or index}".encode()).hexdigest()[:8]
    stored = {"cell_type": cell["kind"], "id": identity, "metadata": {}}
    stored["source"] = cell["source"].splitlines(True)
    if cell["kind"] == "code":
        stored |= {"execution_count": None, "outputs": []}
    if cell["name"]:
        marks = {flag: cell.get(flag, False) for flag in FLAGS}
        marks |= {"grade_id": cell["name"], "schema_version": 3, "task": False}
        if marks["grade"]:
            marks["points"] = cell["points"]
        stored["metadata"] = {"nbgrader": marks}
    return stored


def notebook(name: str, seed: str) -> str:
    "An assignment as the text of a notebook."
    cells = [notebook_cell(c, name, i) for i, c in enumerate(assignment(name, seed))]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(seed: str, folder: Path) -> list[Path]:
    "All assignments of a seed, each in a folder of its name, as nbgrader wants it."
    paths = []
    for name in TOPICS:
        path = folder / name / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(notebook(name, seed), encoding="utf-8")
        paths.append(path)
    return paths


def stale() -> list[str]:
    "Stored assignments that differ from what the questions give."
    paths = {name: STORED / name / f"{name}.ipynb" for name in TOPICS}
    texts = {n: p.read_text(encoding="utf-8") if p.exists() else "" for n, p in paths.items()}
    return [name for name, stored in texts.items() if stored != notebook(name, STORED_SEED)]


def main():
    "Write a variant, or the stored example, or compare."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", help="any text: a term, a group, a student")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="compare the stored assignments")
    args = parser.parse_args()
    if args.check:
        if old := stale():
            sys.exit(f"run nbs/teaching/variants.py: not what the questions give: {', '.join(old)}")
        return
    if (args.seed is None) != (args.out is None):
        parser.error("--seed and --out go together")
    for path in write(args.seed or STORED_SEED, args.out or STORED):
        print(path)


if __name__ == "__main__":
    main()
