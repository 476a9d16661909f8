#!/usr/bin/env python3
"""Read the lessons: what each one needs and how long it is; draw nbs/figures/lessons.svg.

Usage: lessons.py [--check]   (--check: write nothing, fail when the drawing would change)
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent
DRAWING = NBS / "figures" / "lessons.svg"
WORDS_A_MINUTE, LINES_A_MINUTE = 120, 20  # slow readers with a pencil in hand
BOX, HEIGHT, GAP, ROW = 196, 36, 22, 84  # sizes in the drawing


@dataclass(frozen=True)
class Lesson:
    "A lesson as its notebook describes it."

    number: int
    path: Path
    title: str
    needs: tuple[int, ...]  # numbers of earlier lessons that the first cell names
    minutes: int  # to read up to the exercises: words of prose, lines of code; rounded up to five
    runs: str  # what its first cell says about the time to run; empty when it says nothing

    @property
    def name(self) -> str:
        return self.path.stem[3:].replace("_", " ")


def source(cell: dict) -> str:
    "The text of a cell."
    return "".join(cell["source"])


def needed(head: str, number: int) -> tuple[int, ...]:
    "Earlier lessons that a first cell links to or names: [07](07_x.ipynb), lesson 7, 10 to 13."
    found = {int(n) for n in re.findall(r"(?<![\w/])(\d\d)_\w+\.ipynb", head)}
    found |= {int(n) for n in re.findall(r"(?:lesson|chapter)s? (\d+)", head, re.I)}
    ranges = r"\[(?:(?:lesson|chapter)s? )?(\d+)\]\([^)]*\) to \[(\d+)\]"
    for first, last in re.findall(ranges, head, re.I):
        found |= set(range(int(first), int(last) + 1))
    return tuple(sorted(n for n in found if n < number))


def time_to_run(head: str) -> str:
    "The words in which a first cell says how long the notebook runs."
    number = r"(?:an?|half an?|one|two|three|four|five|a few|\d+)"
    span = rf"(?:(?:well )?(?:under|about|less than) )?{number}(?: to {number})?"
    if re.search(r"\ba minute or two to run", head, re.I):
        return "a minute or two"
    found = re.search(rf"({span})(?: minutes?)? to run", head, re.I)
    if found:
        one = re.search(r"\b(?:an?|one)$", found[1], re.I)
        return f"{found[1]} minute{'' if one else 's'}".lower()
    found = re.search(rf"\brun(?:s|ning)?\b.*?({span} minutes?(?: or two)?)", head, re.I | re.S)
    return found[1].lower() if found else ""


def read_lesson(path: Path) -> Lesson:
    "One notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head, number = source(cells[0]), int(path.name[:2])
    ends = (i for i, c in enumerate(cells) if source(c).lstrip().startswith("## Exercises"))
    cells = cells[: next(ends, len(cells))]
    prose = [source(c) for c in cells if c["cell_type"] == "markdown"]
    code = [source(c) for c in cells if c["cell_type"] == "code"]
    shown = [c for c in code if not c.lstrip().startswith("#| hide")]
    words, lines = len(" ".join(prose).split()), len("\n".join(shown).splitlines())
    minutes = words / WORDS_A_MINUTE + lines / LINES_A_MINUTE
    title = head.splitlines()[0].lstrip("# ")
    return Lesson(
        number, path, title, needed(head, number), 5 * round(minutes / 5 + 0.5), time_to_run(head)
    )


def read_lessons(folder: Path = NBS) -> list[Lesson]:
    "All lessons in order."
    return [read_lesson(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]


def all_needed(lessons: list[Lesson]) -> dict[int, set[int]]:
    "For each lesson everything that it needs, directly or not."
    reach: dict[int, set[int]] = {}
    for lesson in lessons:
        direct = [n for n in lesson.needs if n in reach]
        reach[lesson.number] = set(direct).union(*(reach[n] for n in direct))
    return reach


def arrows(lessons: list[Lesson]) -> list[tuple[int, int]]:
    "Pairs (needed, lesson), without those that follow from others."
    reach, found = all_needed(lessons), []
    for lesson in lessons:
        direct = [n for n in lesson.needs if n in reach]
        for n in direct:
            if not any(n in reach[other] for other in direct):
                found.append((n, lesson.number))
    return found


def levels_of(lessons: list[Lesson]) -> dict[int, int]:
    "Row of each lesson: one below the lowest that it needs."
    rows: dict[int, int] = {}
    for lesson in lessons:
        above = [rows[n] for n in lesson.needs if n in rows]
        rows[lesson.number] = max(above, default=-1) + 1
    return rows


def routes_of(edges, rows) -> list[list[tuple]]:
    "Each arrow as the places it passes, one a row; a place is (kind, number, row)."
    routes = []
    for start, end in edges:
        bends = [("bend", (start, end), row) for row in range(rows[start] + 1, rows[end])]
        routes.append([("box", start, rows[start]), *bends, ("box", end, rows[end])])
    return routes


def sorted_rows(routes, rows) -> list[list[tuple]]:
    "The places of each row from left to right, near to what they are joined to."
    places = {("box", number, row) for number, row in rows.items()}
    places |= {place for route in routes for place in route}
    table = [
        sorted((p for p in places if p[2] == r), key=str) for r in range(max(rows.values()) + 1)
    ]
    joined = {p: [] for p in places}
    for route in routes:
        for a, b in zip(route, route[1:]):
            joined[a].append(b)
            joined[b].append(a)
    for sweep in range(8):
        step = 1 if sweep % 2 == 0 else -1
        for row in table[::step]:
            at = {p: i - (len(line) - 1) / 2 for line in table for i, p in enumerate(line)}
            side = row[0][2] - step  # the row that was just sorted
            mean = {}
            for p in row:
                near = [at[q] for q in joined[p] if q[2] == side]
                mean[p] = sum(near) / len(near) if near else at[p]
            row.sort(key=lambda p: (mean[p], str(p)))
    return table


def positions(table) -> tuple[dict, float]:
    "Middle of each place in pixels, and the width of the drawing."
    sizes = {"box": BOX, "bend": 22}
    spans = [sum(sizes[p[0]] for p in row) + GAP * (len(row) - 1) for row in table]
    width, at = max(spans) + 2 * GAP, {}
    for row, span in zip(table, spans):
        x = (width - span) / 2
        for place in row:
            size = sizes[place[0]]
            at[place] = (x + size / 2, GAP + HEIGHT / 2 + ROW * place[2])
            x += size + GAP
    return at, width


TITLE = "Which lesson needs which"
ALT = "An arrow runs from a lesson to each lesson that builds on it."
NOTE = "bitflow_edu, Apache-2.0, copyright 2026 onwards, bitflow_edu contributors"
TIP = """<marker id="to" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="11" markerHeight="11"
 markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0 10 5 0 10z"/></marker>"""


def shared_style() -> str:
    "The style sheet that all drawings have in common."
    text = (DRAWING.parent / "coupling.svg").read_text(encoding="utf-8")
    return re.search(r"<style>.*?</style>", text, re.S)[0]


def line_through(points) -> str:
    "A smooth downward line through the middles of places, ending above the last box."
    x, y = points[0]
    y += HEIGHT / 2
    path = [f"M{x:.0f} {y:.0f}"]
    for u, v in points[1:]:
        top = v - HEIGHT / 2 - (1 if (u, v) == points[-1] else 0)
        middle = (y + top) / 2
        path.append(f"C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {top:.0f}")
        x, y = u, v + HEIGHT / 2
        if (u, v) != points[-1]:
            path.append(f"V{y:.0f}")  # straight past the boxes of this row
    return " ".join(path)


def spoken(lessons: list[Lesson]) -> str:
    "The arrows in words."
    needs: dict[int, list[str]] = {}
    for start, end in arrows(lessons):
        needs.setdefault(end, []).append(f"{start:02d}")
    return "; ".join(f"{end:02d} needs {' and '.join(start)}" for end, start in needs.items()) + "."


def drawing(lessons: list[Lesson]) -> str:
    "The graph as SVG, for light and dark pages."
    rows = levels_of(lessons)
    routes = routes_of(arrows(lessons), rows)
    table = sorted_rows(routes, rows)
    at, width = positions(table)
    height = 2 * GAP + HEIGHT + ROW * max(rows.values())
    size = f'width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {size} '
        'role="img" aria-labelledby="title desc">',
        f"<!-- {NOTE}; written by nbs/teaching/lessons.py -->",
        f'<title id="title">{TITLE}</title>',
        f'<desc id="desc">{ALT} {spoken(lessons)}</desc>',
        shared_style(),
        f"<defs>{TIP}</defs>",
        f'<rect class="bg" {size}/>',
    ]
    for route in routes:
        path = line_through([at[place] for place in route])
        parts.append(f'<path class="line" marker-end="url(#to)" d="{path}"/>')
    for lesson in lessons:
        x, y = at[("box", lesson.number, rows[lesson.number])]
        corner = f'x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}"'
        parts.append(f'<rect class="state" {corner} width="{BOX}" height="{HEIGHT}" rx="6"/>')
        label = f"{lesson.number:02d} {lesson.name}"
        parts.append(f'<text class="note mid" x="{x:.0f}" y="{y + 5:.0f}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main():
    "Write the drawing, or compare."
    text = drawing(read_lessons())
    if "--check" in sys.argv[1:]:
        if not DRAWING.exists() or DRAWING.read_text(encoding="utf-8") != text:
            sys.exit(
                "nbs/figures/lessons.svg is not what the lessons say; run: nbs/teaching/lessons.py"
            )
        return
    DRAWING.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
