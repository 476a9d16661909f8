"""Run notebooks where only the installed package is: each alone, in an empty folder.

    python tests/alone.py [NOTEBOOK ...]

Without names: every lesson and every excursion. The wheel is built once and unpacked into
build/alone/site; what it depends on comes from this environment. Connections to other machines
are refused, so that a notebook which needs the network fails. `make test-alone` calls this.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "alone"
SOURCES = "setup.py settings.ini pyproject.toml MANIFEST.in README.md SECURITY.md LICENSE".split()
OUTSIDE = ("PYTHONPATH", "BITFLOW_DATA", "VIRTUAL_ENV", "CONDA_PREFIX", "MAKEFLAGS", "MFLAGS")
CLEAN = {k: v for k, v in os.environ.items() if k not in OUTSIDE} | {"OMP_NUM_THREADS": "1"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# Python runs this when it starts: notebooks talk to their kernel on this machine, and to no other
REFUSING = """
import socket

def here_alone(connect):
    def guarded(self, address, *more):
        local = self.family not in (socket.AF_INET, socket.AF_INET6) or address[0] in HERE
        if not local:
            raise PermissionError(f"a connection to {address[0]} was tried")
        return connect(self, address, *more)
    return guarded

HERE = ("127.0.0.1", "::1", "localhost")
socket.socket.connect = here_alone(socket.socket.connect)
socket.socket.connect_ex = here_alone(socket.socket.connect_ex)
"""
LOOK = "import bitflow_edu; print(bitflow_edu.__file__)"


def output(*command, cwd, env=CLEAN):
    """What a command prints; it must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def copied_sources(to):
    """What the distributions are built from, without what building left in this folder before."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.part")
    for name in ("bitflow_edu", "data", "results"):
        shutil.copytree(ROOT / name, to / name, ignore=unwanted)
    for name in SOURCES:
        shutil.copy(ROOT / name, to / name)
    return to


def install_wheel(site):
    """Build the wheel of this checkout and unpack it into a folder, without what it depends on."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied_sources(Path(folder, "tree"))
        build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
        output(*build, tree, cwd=folder)
        (wheel,) = Path(folder).glob("*.whl")
        options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site)
        output(*PIP, "install", *options, wheel, cwd=folder)
    Path(site, "sitecustomize.py").write_text(REFUSING, encoding="utf-8")
    return site


def run_alone(notebook, site, empty, env=()):
    """Execute a copy of a notebook in an empty folder, with the package of `site`."""
    env = {**CLEAN, "PYTHONPATH": str(site), "MPLBACKEND": "agg", "IN_TEST": "1", **dict(env)}
    used = Path(output(sys.executable, "-c", LOOK, cwd=empty, env=env).strip())
    assert used.is_relative_to(site), f"{used} is not the installed package"
    assert not list(empty.iterdir())
    copy = shutil.copy(notebook, empty)
    convert = (sys.executable, "-m", "nbconvert", "--log-level", "ERROR", "--to", "notebook")
    output(*convert, "--execute", "--inplace", copy, cwd=empty, env=env)


def main(names):
    """Run the notebooks, and name those that failed."""
    lessons = [*(ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")]
    notebooks = [Path(n) for n in names] or lessons + [*(ROOT / "nbs/excursions").glob("*.ipynb")]
    shutil.rmtree(BUILD, ignore_errors=True)
    site, failed = install_wheel(BUILD / "site"), []
    for notebook in sorted(notebooks):
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as empty:
                run_alone(notebook, site, Path(empty).resolve())
            said = "runs alone"
        except AssertionError as e:
            failed.append(notebook.name)
            said = f"FAILED\n{e}"
        print(f"{notebook.name}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit("these do not run alone: " + ", ".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
