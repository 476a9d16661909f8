"""What stands where on the site: every notebook once, in the order of the sidebar."""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# title of a part, and the numbers of its lessons; a lesson to come finds its place by its number
PARTS = (
    ("Before you start", range(0, 1)),
    ("I. Flows", range(1, 4)),
    ("II. Tools", range(4, 7)),
    ("III. The flow", range(7, 10)),
    ("IV. Its inverse", range(10, 15)),
    ("V. Use", range(15, 17)),
    ("VI. Beyond", range(17, 20)),
)
CHANGES = "docs/CHANGELOG.md"
WINGS = {
    "io": "Files, datasets, images, models and checkpoints, results, checks of arguments",
    "scale": "Many processes, latents, streamed evaluation, alarms, costs",
    "lab": "Experiments: presets, training, samplers, measurements, tables, reports, the Hub",
    "cli": "The commands of `bitflow`",
}
FOR_MAINTAINERS = """For maintainers: what the lessons need but do not teach. Each notebook writes \
the module of the same name."""
ABOUT_SOLUTIONS = """Try first: each exercise has hints in its lesson, and a checker that rejects \
wrong answers. Here are solutions that pass it."""


@dataclass(frozen=True)
class Section:
    """Pages that stand together in the sidebar, under a caption or below a page of their own."""

    caption: str
    pages: tuple[str, ...]  # paths from the repository's root
    index: str = ""  # the path of the page that lists them; empty: they stand in the sidebar
    text: str = ""  # what that page says first


def notebooks(folder):
    """The notebooks of a folder, without those of its sub-folders."""
    return tuple(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / folder).glob("*.ipynb")))


def lessons():
    """The sections of the numbered lessons."""
    numbered = [path for path in notebooks("nbs") if Path(path).name[:2].isdigit()]
    sections = []
    for title, numbers in PARTS:
        pages = tuple(path for path in numbered if int(Path(path).name[:2]) in numbers)
        sections.append(Section(title, pages))
    return sections


def wings():
    """A section for each wing."""
    sections = []
    for wing, text in WINGS.items():
        text = f"{text}.\n\n{FOR_MAINTAINERS}"
        sections.append(Section(wing, notebooks(f"nbs/{wing}"), f"nbs/{wing}/index.md", text))
    return sections


def assignments():
    """The notebooks of the assignments, each in a folder of its own."""
    folders = sorted((ROOT / "nbs" / "teaching" / "assignments").iterdir())
    return [path for folder in folders for path in notebooks(folder.relative_to(ROOT))]


def sections():
    """All sections, in the order of the sidebar; the pages of the API are added by stage.py."""
    solved = notebooks("nbs/solutions")
    teaching = (*notebooks("nbs/teaching"), *assignments(), "nbs/figures/README.md")
    documents = sorted(p.name for p in ROOT.glob("*.md") if p.name != "README.md")
    guides = ("docs/README.md", "docs/playground/README.md", "docs/slides/README.md")
    project = ("nbs/index.ipynb", "nbs/guide.ipynb", "nbs/measured.ipynb")
    results = ("results/README.md", "results/EXPERIMENTS.md")
    return [
        *lessons(),
        Section("Excursions", notebooks("nbs/excursions")),
        Section("Solutions", solved, "nbs/solutions/index.md", ABOUT_SOLUTIONS),
        Section("Teaching", teaching),
        Section("The project", (*project, *results, "data/README.md", *documents, CHANGES)),
        *wings(),
        Section("Site", ("nbs/api.ipynb", *guides)),
    ]


def title(path):
    """The first heading of a notebook or of a Markdown file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        text = "".join(json.loads(text)["cells"][0]["source"])
    heading = next(line for line in text.splitlines() if line.startswith("# "))
    return heading.removeprefix("# ").strip()


def label(path):
    """What the sidebar calls a page: its title up to the colon, a lesson with its number."""
    if path == "nbs/index.ipynb":
        return "In short"  # its title is the project's name
    if path == "results/README.md":
        return "All results"
    short = title(path).removeprefix("Excursion: ").removeprefix("Solutions: ")
    if not short.startswith(("Solutions", "Assignment")):
        short = short.split(": ")[0]
    number = Path(path).name[:2]
    if number.isdigit():
        short = f"{number} {short}"
    return short[0].upper() + short[1:]
