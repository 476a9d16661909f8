#!/usr/bin/env python3
"""Finish notebooks after nbdev_clean: what they need to run elsewhere, and small pictures.

Usage: finish_notebooks.py [NOTEBOOK ...]      (without names: all, and the pictures of results/)

Every notebook names its kernel and its language. A lesson or an excursion has below its title
links that open it in Colab and in Binder; they are text, since the usual buttons are loaded from
elsewhere. Its first code cell installs the package in Colab and does nothing anywhere else.
Pictures become grey or get a palette of 256 colours, a third of the bytes, unless one would see it.
"""

import base64
import io
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python"}  # without the version of whoever ran it last
COLAB, COLAB_ID = "google.colab", "c01ab000"
INVISIBLE = 0.5  # mean change of a pixel, of 255, that a palette may make


def settings():
    "What settings.ini says about the project."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def links(path: str, names: tuple = ("Open in Colab", "Open in Binder"), folder: str = "") -> str:
    "A line of Markdown that opens a notebook in Colab and, itself or a folder, in Binder."
    cfg = settings()
    place, branch = cfg["git_url"].removeprefix("https://github.com/"), cfg["branch"]
    colab = f"https://colab.research.google.com/github/{place}/blob/{branch}/{path}"
    binder = f"https://mybinder.org/v2/gh/{place}/{branch}?labpath={quote(folder or path, safe='')}"
    return f"▶ [{names[0]}]({colab}) · ▶ [{names[1]}]({binder})"


def links_of(inside: str) -> str:
    "The line for a notebook in nbs/; that of the index opens the course."
    if inside == "index.ipynb":
        names = "Lesson 00 in Colab", "All lessons in Binder"
        return links("nbs/00_data.ipynb", names, folder="nbs")
    return links(f"nbs/{inside}")


def colab_source() -> str:
    "The first code cell of a lesson."
    return f"""import sys

if "{COLAB}" in sys.modules:  # Colab has PyTorch, but not this course
    %pip install -q "git+{settings()["git_url"]}"
"""


def with_links(head: list[str], line: str) -> list[str]:
    "A first cell's lines with a line of links below the title."
    title, _, rest = "".join(head).partition("\n")
    rest = re.sub(r"\A\s*▶ [^\n]*\n", "", rest).lstrip()
    return f"{title}\n\n{line}\n\n{rest}".splitlines(keepends=True)


def is_read_alone(inside: str) -> bool:
    "Whether a notebook in nbs/ is a lesson or an excursion."
    return bool(re.fullmatch(r"\d\d_\w+\.ipynb|excursions/\w+\.ipynb", inside))


def add_colab_cell(cells: list[dict]):
    "The cell for Colab below the first one, in place."
    if cells[1]["id"] != COLAB_ID:
        cell = {"cell_type": "code", "execution_count": None, "id": COLAB_ID}
        cells.insert(1, {**cell, "metadata": {}, "outputs": []})
    cells[1]["source"] = colab_source().rstrip().splitlines(keepends=True)


def small_picture(data: bytes) -> bytes:
    "A PNG picture in fewer bytes, or the same where it is small already or would change visibly."
    picture = Image.open(io.BytesIO(data), formats=("PNG",))
    if picture.mode not in ("RGB", "RGBA"):
        return data  # done
    if picture.mode == "RGBA" and picture.getextrema()[3][0] < 255:
        return data  # something is transparent
    picture = picture.convert("RGB")
    colours = np.asarray(picture)
    if (colours == colours[..., :1]).all():
        small = picture.convert("L")
    else:
        small = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        moved = np.abs(np.asarray(small.convert("RGB")) - colours.astype(int)).mean()
        small = small if moved < INVISIBLE else picture
    stored = io.BytesIO()
    small.save(stored, "PNG", optimize=True)
    return stored.getvalue() if stored.tell() < len(data) else data


def shrink_pictures(node):
    "Every picture in a notebook's outputs, and in the states of its widgets, in place."
    if isinstance(node, dict) and "image/png" in node:
        data = base64.b64decode("".join(node["image/png"]))
        if (small := small_picture(data)) != data:
            node["image/png"] = base64.b64encode(small).decode()
    if isinstance(node, (dict, list)):
        for inner in node.values() if isinstance(node, dict) else node:
            shrink_pictures(inner)


def finish(path: Path):
    "Read a notebook, and write it where something was to be done."
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    notebook["metadata"].update(kernelspec=KERNEL, language_info=LANGUAGE)
    inside = path.relative_to(NBS).as_posix()
    cells = notebook["cells"]
    if is_read_alone(inside) or inside == "index.ipynb":
        cells[0]["source"] = with_links(cells[0]["source"], links_of(inside))
    if is_read_alone(inside):
        add_colab_cell(cells)
    shrink_pictures(notebook)
    after = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8")


def main(names: list[str]):
    "The notebooks named, or everything."
    paths = [Path(name).resolve() for name in names] or sorted(NBS.rglob("*.ipynb"))
    for path in paths:
        if ".ipynb_checkpoints" not in path.parts:
            finish(path)
    for path in [] if names else (ROOT / "results").glob("*.png"):
        data = path.read_bytes()
        if (small := small_picture(data)) != data:
            path.write_bytes(small)


if __name__ == "__main__":
    main(sys.argv[1:])
