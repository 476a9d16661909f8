"""Shell commands that notebooks and pages show: bash can read each of them."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^ *```(bash|sh|)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^\s*(bitflow|torchrun|srun|sbatch|pip|make|python3?|git) ", re.MULTILINE)


def texts_of(path):
    """The markdown of a page, or of each cell of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [text]
    cells = json.loads(text)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def scripts_in(text):
    """Blocks that say they are for a shell, and nameless ones that begin with a command."""
    for language, script in BLOCK.findall(text):
        if language or COMMANDS.match(script):
            yield script


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
for folder in (".github", "data", "results"):
    PAGES += sorted((ROOT / folder).rglob("*.md"))
PAGES += [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
SCRIPTS = [
    (f"{path.relative_to(ROOT)}-{k}", script)
    for path in PAGES
    for k, script in enumerate(script for text in texts_of(path) for script in scripts_in(text))
]


def test_there_are_examples():
    named = {name.rpartition("-")[0] for name, _ in SCRIPTS}
    assert {"nbs/guide.ipynb", "nbs/scale/distributed.ipynb", "nbs/17_imagenet.ipynb"} <= named


@pytest.mark.parametrize("script", [s for _, s in SCRIPTS], ids=[name for name, _ in SCRIPTS])
def test_bash_reads_every_example(script):
    run = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    if "#SBATCH" in script:  # sbatch refuses a script without it
        assert script.startswith("#!/bin/bash\n"), script
    for line in script.splitlines():
        assert not line.startswith("!/"), "the first line of a script lacks its #"
