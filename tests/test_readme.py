"""What a visitor reads first: README, guide, contributing, citation, changelog; all of it true."""

import configparser
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

from bitflow_edu.cli.options import parse
from bitflow_edu.inverse_strategies import StrategyLoss
from bitflow_edu.io.results import figure
from bitflow_edu.lab.hub import load_pretrained
from bitflow_edu.lab.presets import Preset, find_preset

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
SETTINGS = configparser.ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PAGES = ("README.md", ".github/CONTRIBUTING.md", "docs/CHANGELOG.md", "SECURITY.md")


def text_of(name: str) -> str:
    """What a reader sees of a notebook: prose, and Markdown that code put out."""
    parts = []
    for cell in nbformat.read(NBS / name, as_version=4).cells:
        outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
        parts += [cell.source] if cell.cell_type == "markdown" else []
        parts += [data["text/markdown"] for data in outputs if "text/markdown" in data]
    return "\n\n".join(parts)


GUIDE, MEASURED = text_of("guide.ipynb"), text_of("measured.ipynb")


def commands(text: str) -> list[list[str]]:
    """The words of each whole `bitflow` command in a text, without placeholders in capitals."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^torchrun .*-m bitflow_edu\.cli (.*)$", joined, re.M)
    found += re.findall(r"`bitflow ([^`\n]+)`", joined)
    return [shlex.split(line) for line in found if not re.search(r"\b[A-Z]{3,}\b", line)]


def test_it_is_what_the_notebook_says():
    subprocess.run([sys.executable, NBS / "make_readme.py", "--check"], check=True)


def test_it_is_short():
    """One picture, one table, two commands, four lines of Python, three doors."""
    lines = README.splitlines()
    assert len(lines) <= 120
    assert len(re.findall(r"^!\[", README, re.M)) == 1
    assert len(re.findall(r"^\|(?:-+\|)+$", README, re.M)) == 1
    (shell,) = re.findall(r"```\n(.*?)```", README, re.S)
    assert [line.split("#")[0].strip() for line in shell.splitlines()] == ["make demo", "make test"]
    (python,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert sum(1 for line in python.splitlines() if line) == 4
    assert re.findall(r"^### (.*)$", README, re.M) == ["Student", "Instructor", "Researcher"]


def test_its_table_is_that_of_the_file():
    """Read here without the notebook's functions; a row holds what the demo measured."""
    result = json.loads((ROOT / "results" / "demo-mnist-mini.json").read_text(encoding="utf-8"))
    for row in ("exact", "exact+denoise", "one-pass"):
        line = f"| {figure(result, row, 'serial_steps')} "
        line += f"| {figure(result, row, 'ms_per_image', 1):.1f} "
        line += f"| {figure(result, row, 'ms_per_image', 64):.2f} "
        line += f"| {figure(result, row, 'fd[mnist-cnn]'):.2f} "
        assert f"{line}| {figure(result, row, 'label_accuracy'):.3f} |" in README, row


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = LINK.findall(path.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("text", [GUIDE, MEASURED], ids=["guide", "measured"])
def test_links_of_its_pages_lead_somewhere(text):
    links = LINK.findall(text)
    assert len(links) > 3 and [link for link in links if not (NBS / link).exists()] == []


def test_every_notebook_is_found():
    lessons = sorted(path.name for path in NBS.glob("[0-9]*.ipynb"))
    assert [name for name in lessons if f"](nbs/{name})" not in README] == []
    folders = ("", "io", "scale", "lab", "cli", "excursions")
    notebooks = [path for folder in folders for path in (NBS / folder).glob("*.ipynb")]
    names = {path.relative_to(NBS).as_posix() for path in notebooks} - {"guide.ipynb"}
    linked = set(LINK.findall(GUIDE)) | {"measured.ipynb"}
    assert sorted(names - linked) == []


def test_badges_are_those_of_workflows_that_are_there():
    badges = re.findall(r"\[!\[[^]]*\]\(([^)]*)\)\]\(([^)]*)\)", README)
    runs = f"{SETTINGS['git_url']}/actions/workflows/"
    assert badges
    for picture, leads_to in badges:
        assert picture == f"{leads_to}/badge.svg" and leads_to.startswith(runs)
        assert (ROOT / ".github" / "workflows" / leads_to.removeprefix(runs)).exists()
    assert README.count("![") == 1 + len(badges)


@pytest.mark.parametrize("text", [README, GUIDE, MEASURED, CONTRIBUTING])
def test_commands_are_understood(text):
    """Whatever starts with `bitflow` or torchrun is a command, with options that there are."""
    found = commands(text)
    assert found
    for words in found:
        if words in (["train"], ["train", "forward"], ["train", "reverse"]):
            continue
        if words in (["sample"], ["export"], ["cache-latents"], ["watch"]):
            continue  # the name alone, of a command that needs options
        assert parse(words), words


def test_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    text = "\n".join((README, GUIDE, CONTRIBUTING))
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+) +#", text, re.M)
    assert set(named) <= targets and {"demo", "test", "docs", "export"} <= set(named)


def recipe(name: str, module: str):
    """What a recipe of CONTRIBUTING defines, carried out where its cell would stand."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S)
    (block,) = [block for block in blocks if f"def {name}(" in block]
    assert block.startswith("#| exporti\n")
    names = vars(import_module(f"bitflow_edu.{module}")).copy()
    exec(block, names)
    return names[name]


def test_the_recipes_work():
    F, G = load_pretrained("mnist-mini")
    x, labels = torch.rand(2, 1, 16, 16) * 2 - 1, torch.tensor([3, 4])
    path = F(x, labels)
    loss = recipe("fading_alignment", "inverse_strategies")(path, G(path.z, labels), x)
    assert isinstance(loss, StrategyLoss) and len(loss.depths) == G.cfg.num_blocks
    assert recipe("edges", "distances")("cpu")(x, x.flip(0)).shape == (2,)
    preset = recipe("mnist_shallow", "lab.presets")()
    assert isinstance(preset, Preset) and preset.name == "mnist-shallow"
    check_rows = import_module("bitflow_edu.lab.tables").check_rows
    rows = recipe("noise", "lab.tables")(find_preset("mnist-mini"))
    check_rows(rows, find_preset("mnist-mini"))
    assert len(rows) == 2
    (stage,) = recipe("late_times", "neighbours")(None)
    value, _ = stage.loss(lambda x_t, r, t, c: 0 * x_t, x, labels, torch.Generator().manual_seed(0))
    assert value > 0


def test_what_the_recipes_name_is_there():
    for name in re.findall(r"`(?:nbs|tests|docs)/[\w/.-]+`", CONTRIBUTING):
        path = name.strip("`")
        assert "video" in path or (ROOT / path).exists(), path
    words = ("STRATEGIES", "DISTANCES", "OFFLINE", "PAIRS", "FLOWS_ALONE", "TABLES", "METHODS")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "bitflow_edu").rglob("*.py")]
    for word in (*words, "EXPERIMENTS"):
        assert f"`{word}" in CONTRIBUTING
        assert any(f"\n{word} = " in source for source in sources), word


def test_the_citation_is_of_this_project():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert CITATION["version"] == SETTINGS["version"]
    assert CITATION["repository-code"] == SETTINGS["git_url"]
    assert CITATION["authors"] == [{"name": SETTINGS["author"]}]
    biflow, tarflow = CITATION["references"]
    for paper in (biflow, tarflow):
        assert paper["title"] in README and paper["url"] in README
    for author in biflow["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in README


def test_the_changelog_knows_this_version():
    newest = re.search(r"^## (\S+?),", CHANGELOG, re.M)[1]
    assert newest == SETTINGS["version"]
