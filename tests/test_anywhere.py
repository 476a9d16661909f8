"""Lessons run elsewhere: without this checkout, without a network, in Colab, in Binder."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from alone import CLEAN, REFUSING, ROOT, install_wheel, run_alone
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.clean import clean_nb
from PIL import Image

NBS = ROOT / "nbs"
sys.path.insert(0, str(NBS))

import finish_notebooks as finish  # noqa: E402

NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
COURSE = [p for p in NOTEBOOKS if finish.is_read_alone(p.relative_to(NBS).as_posix())]
BY_PATH = re.compile(r"""["'](?:\.\./)+(?:results|data)\b""")
ALONE = ("00_data.ipynb", "excursions/glow.ipynb", "excursions/rounding.ipynb")  # quick ones
MOST_TRACKED = 64 << 20  # bytes


def notebook(path):
    """A notebook as JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind="code"):
    """The texts of a notebook's cells of one kind."""
    return ["".join(c["source"]) for c in notebook(path)["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel of this checkout, unpacked; built once for a machine's processes."""
    return install_wheel(tmp_path_factory.mktemp("installed").resolve() / "site")


@pytest.mark.parametrize("name", ALONE)
def test_runs_alone(name, site, tmp_path):
    """In an empty folder, with the installed package; `make test-alone` runs all of them."""
    assert NBS / name in COURSE
    run_alone(NBS / name, site, tmp_path.resolve())


def test_no_code_reads_data_or_results_by_path():
    """`asset` and `load_result` find them, in a checkout and in an installed package."""
    found = [p.name for p in NOTEBOOKS if any(BY_PATH.search(s) for s in sources(p))]
    assert not found
    assert BY_PATH.search('open("../../results/x.json")') and BY_PATH.search("'../data'")


def test_every_notebook_names_kernel_and_language():
    """And nbdev_clean leaves both."""
    allowed = finish.settings()["allowed_metadata_keys"].split()
    for path in NOTEBOOKS:
        found = notebook(path)
        clean_nb(found, False, allowed, [], True)
        assert found["metadata"]["kernelspec"] == finish.KERNEL, path.name
        assert found["metadata"]["language_info"] == {"name": "python"}, path.name


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_opens_elsewhere(path):
    """Links below the title lead to this notebook, in Colab and in Binder."""
    title, empty, line = sources(path, "markdown")[0].splitlines()[:3]
    inside = path.relative_to(ROOT).as_posix()
    assert title.startswith("# ") and not empty
    colab, binder = re.findall(r"\[Open in \w+\]\((\S+)\)", line)
    home = finish.settings()["git_url"].removeprefix("https://github.com/")
    assert colab == f"https://colab.research.google.com/github/{home}/blob/main/{inside}"
    assert binder.startswith(f"https://mybinder.org/v2/gh/{home}/main?labpath=nbs%2F")
    assert binder.endswith(path.name)


def test_readme_opens_the_course():
    """The first lesson in Colab, all of them in Binder."""
    line = finish.links_of("index.ipynb")
    assert line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "nbs/00_data.ipynb" in line and line.endswith("?labpath=nbs)")


class Shell:
    """Notes which line magics a cell calls."""

    def __init__(self):
        self.called = []

    def run_line_magic(self, name, line):
        self.called.append((name, line))


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_first_cell_installs_in_colab_alone(path, monkeypatch):
    """The first code cell, here and where Colab's module is loaded; no module contains it."""
    source = sources(path)[0]
    assert len(source.splitlines()) <= 6 and not source.startswith("#|")
    code = compile(TransformerManager().transform_cell(source), path.name, "exec")
    shell = Shell()
    exec(code, {"get_ipython": lambda: shell})
    assert not shell.called
    monkeypatch.setitem(sys.modules, "google.colab", shell)
    exec(code, {"get_ipython": lambda: shell})
    url = finish.settings()["git_url"]
    assert shell.called == [("pip", f'install -q "git+{url}"')]


def test_colab_cell_is_not_exported():
    modules = (ROOT / "bitflow_edu").rglob("*.py")
    assert not [p.name for p in modules if "google.colab" in p.read_text(encoding="utf-8")]


def test_binder_installs_what_notebooks_need():
    """PyTorch for processors, and an extra that exists."""
    lines = (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in lines
    (extra,) = [line for line in lines if line.startswith(".")]
    assert f"{extra.strip('.[]')}_requirements" in finish.settings()


def stored(picture):
    """A picture as a PNG file's bytes."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_pictures_become_small():
    """Grey ones stay exact, others get a palette, photographs and transparent ones stay."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    grey = np.stack([ramp] * 3, axis=-1)
    small = finish.small_picture(stored(Image.fromarray(grey).convert("RGBA")))
    assert (np.asarray(Image.open(io.BytesIO(small))) == ramp).all()
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (100, 3), dtype=np.uint8)
    drawn = colours[rng.integers(0, 100, (64, 64))]
    small = finish.small_picture(stored(Image.fromarray(drawn)))
    picture = Image.open(io.BytesIO(small))
    assert picture.mode == "P"
    moved = np.abs(np.asarray(picture.convert("RGB")).astype(int) - drawn).mean()
    assert moved < finish.INVISIBLE and finish.small_picture(small) == small
    photo = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    small = finish.small_picture(stored(Image.fromarray(photo)))
    assert (np.asarray(Image.open(io.BytesIO(small))) == photo).all()
    clear = stored(Image.new("RGBA", (8, 8), (1, 2, 3, 0)))
    assert finish.small_picture(clear) == clear


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_repository_stays_small():
    """What git tracks, in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a repository")
    sizes = {}
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            sizes[name] = (ROOT / name).stat().st_size
    largest = sorted(sizes, key=sizes.get)[-5:]
    assert sum(sizes.values()) < MOST_TRACKED, f"{sum(sizes.values()):,} bytes; {largest}"


OFFLINE = """
import socket

def refuse(*args, **more):
    raise AssertionError(f"a connection was tried: {args[-1]}")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
import torch
import bitflow_edu
from bitflow_edu import TARFlow, load_data, load_model, load_pretrained, one_pass
from bitflow_edu.evaluation import accuracy, load_classifier
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import asset
from bitflow_edu.lab.evaluate import evaluate
from bitflow_edu.reverse_model import sample_noise

F = load_model(asset("mnist-mini/forward"), TARFlow)
F, G = load_pretrained("mnist-mini")
c = torch.arange(10)
print(accuracy(load_classifier(), one_pass(G, sample_noise(F.cfg, 10), c), c))
train, test = load_data(DataConfig()), load_data(DataConfig(), "test")
done = evaluate(F, G, train[:500], test[:200], n=100, timing=False)
print(len(done.measurements), "measurements")
"""


def test_nothing_contacts_the_network(tmp_path):
    """Import, load, draw and evaluate with the course's network, while every socket refuses."""
    env = {**CLEAN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "measurements" in done.stdout and not os.listdir(tmp_path)


def test_lessons_run_alone_without_a_network(tmp_path):
    """What `run_alone` puts beside the package lets Python reach this machine only."""
    Path(tmp_path, "sitecustomize.py").write_text(REFUSING, encoding="utf-8")
    code = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=1)"
    env = {**CLEAN, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "PermissionError: a connection to 192.0.2.1 was tried" in done.stderr
