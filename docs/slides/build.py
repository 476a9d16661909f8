"""Build the decks of the lessons: HTML files that need no network, and PDF.

    python docs/slides/build.py [NUMBER ...]

Without numbers, all lessons. Needs Marp (`make slides` brings it) and Chromium.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from contents import ROOT, label, lessons  # noqa: E402  beside this folder
from deck import deck_of  # noqa: E402
from marp import deck_markdown  # noqa: E402

SOURCE = ROOT / "build" / "slides-source"
DECKS = ROOT / "build" / "decks" / "slides"  # the site shows what is in build/decks
MARP = ROOT / "build" / "marp" / "node_modules" / ".bin" / "marp"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser():
    """Chromium: $CHROMIUM, or the first of its names on PATH."""
    for name in (os.environ.get("CHROMIUM"), *BROWSERS):
        if name and (found := shutil.which(name)):
            return found
    sys.exit("Slides need Chromium (apt-get install chromium), or its path in CHROMIUM")


def write_sources(numbers):
    """A file for Marp for each lesson."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for path in [page for section in lessons() for page in section.pages]:
        notebook = ROOT / path
        if not numbers or notebook.name[:2] in numbers:
            text = deck_markdown(deck_of(notebook), label(path), notebook.parent)
            (SOURCE / f"{notebook.stem}.md").write_text(text, encoding="utf-8")


def run(*command):
    """Run a program in the repository's root, with what Marp and the check want to know."""
    known = {"CHROME_PATH": find_browser(), "CHROME_NO_SANDBOX": "1"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=os.environ | known)
    if done.returncode:
        sys.exit(f"{command[0]} ended with code {done.returncode}")


def main(numbers):
    """Write, draw, check, print."""
    write_sources(numbers)
    config = ("--config-file", HERE / "marp.config.mjs", "--input-dir", SOURCE)
    run(MARP, *config, "--output", DECKS)
    run("node", HERE / "check_fit.mjs", *[DECKS / f"{p.stem}.html" for p in SOURCE.glob("*.md")])
    run(MARP, *config, "--output", DECKS, "--pdf")
    print(f"{len(list(SOURCE.glob('*.md')))} decks in {DECKS.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
