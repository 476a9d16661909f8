"""What is handed out: distributions that build and install, imports elsewhere, make."""

import ast
import os
import shutil
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from alone import CLEAN, ROOT, copied_sources, output
from PIL import Image

from bitflow_edu.io.images import FORMATS, MAX_BYTES, MAX_PIXELS
from bitflow_edu.lab.preset_fields import MOST_BYTES, MOST_NODES, UniqueKeys


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels built from the source distribution, and from the tree itself."""
    tree = copied_sources(tmp_path_factory.mktemp("tree"))
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    found = {}
    for source, more in (("sdist", ()), ("tree", ("--wheel",))):
        folder = tmp_path_factory.mktemp(source)
        output(*build, folder, *more, tree, cwd=folder)
        (found[source],) = folder.glob("*.whl")
    return found


def test_both_ways_to_a_wheel_give_the_same_files(wheels):
    """The source distribution leaves nothing out: same names, same contents, shipped weights."""
    sdist, tree = ({i.filename: i.CRC for i in zipfile.ZipFile(w).infolist()}
                   for w in wheels.values())  # fmt: skip
    assert sdist == tree
    where = ("data", "bitflow_edu", "results/*.json")
    tracked = output("git", "ls-files", *where, cwd=ROOT).split()
    moved = [name.replace("results/", "data/results/") for name in tracked]
    assets = [name.replace("data/", "bitflow_edu/assets/", 1) for name in moved]
    assert set(assets) - set(tree) <= {"bitflow_edu/assets/SHA256SUMS"}


def test_the_wheel_stays_small(wheels):
    """It brings weights, digits and results, and is loaded over whatever network there is."""
    assert wheels["tree"].stat().st_size < 60e6
    names = zipfile.ZipFile(wheels["tree"]).namelist()
    assert "bitflow_edu/assets/results/demo-mnist-mini.json" in names


@pytest.fixture(params=("sdist", "tree"))
def installed(request, wheels, tmp_path):
    """A new environment with one wheel in it; what it depends on is this environment's."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    python = Path(paths["scripts"], "python")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    output(*pip, *install, wheels[request.param], cwd=tmp_path)
    others = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(paths["purelib"], "dependencies.pth").write_text("\n".join(others), encoding="utf-8")
    return python


LOOK = """
import importlib, pkgutil, bitflow_edu
from bitflow_edu.cli.main import main
from bitflow_edu.data import load_data
from bitflow_edu.distances import load_feature_net
from bitflow_edu.evaluation import load_classifier
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import asset
for found in pkgutil.walk_packages(bitflow_edu.__path__, "bitflow_edu."):
    if not found.name.startswith("bitflow_edu.assets") and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print(bitflow_edu.__file__, asset("mnist-mini"), asset("mnist-mini.npz"), sep="\\n")
load_classifier(), load_feature_net()
assert len(load_data(DataConfig())) == 10_000
assert main(["info"]) == 0
"""


def test_an_installed_package_finds_what_it_came_with(installed, tmp_path):
    """All modules import, `bitflow` describes a preset and draws, from an empty folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    *places, said = output(installed, "-c", LOOK, cwd=empty).split("\n", 3)
    assert all(Path(place).is_relative_to(tmp_path) for place in places), places
    assert "mnist-mini" in said
    model, command = Path(places[1], "reverse"), installed.with_name("bitflow")
    output(command, "sample", "--checkpoint", model, "--n", 3, cwd=empty)
    assert [path.name for path in empty.iterdir()] == ["samples.png"]
    assert Image.open(empty / "samples.png").size[0] > 3 * 16


ELSEWHERE = """
import importlib, os, pkgutil, signal, sys
import bitflow_edu

def import_all():
    for found in pkgutil.walk_packages(bitflow_edu.__path__, "bitflow_edu."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)

import_all()  # what this package stands on may use what it finds
for name in [name for name in sys.modules if name.partition(".")[0] == "bitflow_edu"]:
    del sys.modules[name]
for name in "resource fcntl pwd grp termios tty pty posix syslog readline curses crypt".split():
    sys.modules[name] = None
NOT_ON_WINDOWS = "fork forkpty sysconf uname getuid geteuid getgid getpgid setsid killpg mkfifo "
NOT_ON_WINDOWS += "statvfs getloadavg sched_getaffinity chown fchmod lockf O_DIRECTORY O_NOFOLLOW"
for name in NOT_ON_WINDOWS.split():
    if hasattr(os, name):
        delattr(os, name)
for name in "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGPIPE SIGQUIT alarm setitimer".split():
    delattr(signal, name)
import bitflow_edu
import_all()
from bitflow_edu.cli.lab import peak_process_memory_mb
from bitflow_edu.cli.main import main
from bitflow_edu.io.files import asset
from bitflow_edu.io.results import hardware
assert peak_process_memory_mb() is None and hardware()["memory_gb"] is None
assert main(["info"]) == 0
out = ["--out", sys.argv[1] + "/f"]
assert main(["train", "forward", "--preset", "mnist-mini-smoke", "--steps", "1", *out]) == 0
out = ["--out", sys.argv[1] + "/s.png"]
assert main(["sample", "--checkpoint", sys.argv[1] + "/f", "--n", "2", *out]) == 0
"""


def test_commands_run_without_what_only_posix_has(tmp_path):
    """Every module imports where `resource`, `fcntl`, `os.fork` and the like are missing."""
    env = {**CLEAN, "PYTHONPATH": str(ROOT)}
    output(sys.executable, "-c", ELSEWHERE, tmp_path, cwd=tmp_path, env=env)
    assert (tmp_path / "s.png").exists()
    names = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in names if set(name) & set('<>:"|?*\\')], "no file names there"


@pytest.fixture
def spaced(tmp_path):
    """The Makefile in a folder with spaces, and programs that only note how they were called."""
    folder = tmp_path / "a b" / "c  d"
    bin_ = folder / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name in ("Makefile", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in "python ruff nbdev_clean nbdev_export nbdev_test jupyter bitflow".split():
        (bin_ / name).write_text('#!/bin/sh\necho "$0" "$@" >> calls.txt\n')
        (bin_ / name).chmod(0o755)
    return folder


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_stays_in_a_folder_with_spaces(spaced, tmp_path):
    """Each target calls the programs of this folder's environment, and writes nowhere else."""
    make, targets = ("make", "-C", spaced), "demo lint format readme export weights lab test"
    assert "make test" in output("make", "help", cwd=spaced)
    output(*make, *targets.split(), "notebooks", "NB=one.ipynb", cwd=tmp_path)
    calls = (spaced / "calls.txt").read_text().splitlines()
    assert len(calls) > 12 and all(c.startswith(f"{spaced}/.venv/bin/") for c in calls), calls
    assert [c for c in calls if "pip install" in c] == calls[:1], "once, before all else"
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]
    assert [path.name for path in spaced.parent.iterdir()] == ["c  d"]


def calls_in(path):
    """Every call of a module: the dotted name, the names of arguments and their values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            yield ast.unparse(node.func), given, [ast.unparse(a) for a in node.args]


def is_risky(name, given, args):
    """Whether a call could run what a file says."""
    if name in ("np.load", "numpy.load"):
        return given.get("allow_pickle") is not False
    if name == "Image.open":  # of EPS it would start Ghostscript
        return "formats" not in given
    if name == "torch.load":
        return given.get("weights_only") is not True
    if name == "yaml.load":
        return args[1:] != ["UniqueKeys"]
    if name.startswith("yaml."):
        return not name.startswith(("yaml.safe_", "yaml.YAMLError"))
    runs = ("eval", "exec", "compile", "os.system", "os.popen")
    unpacks = name.endswith((".extractall", ".extract"))
    return name in runs or unpacks or given.get("shell") is True or name.startswith("pickle.")


def test_what_security_says_of_reading_files():
    """No module unpickles, evaluates, unpacks to disk, or starts a shell."""
    modules = sorted((ROOT / "bitflow_edu").rglob("*.py"))
    found = [(path.name, call) for path in modules for call in calls_in(path) if is_risky(*call)]
    assert not found
    assert issubclass(UniqueKeys, yaml.SafeLoader)
    said = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all(name in said for name in FORMATS) and "EPS" not in FORMATS
    assert f"{MAX_PIXELS:,} pixels" in said and f"{MAX_BYTES:,} bytes" in said
    assert f"{MOST_BYTES:,} bytes" in said and f"{MOST_NODES:,} values" in said
    assert is_risky("np.load", {"allow_pickle": True}, []) and is_risky("eval", {}, ["x"])
    kinds = {call[0] for path in modules for call in calls_in(path)}
    assert {"np.load", "torch.load"} <= kinds, "the scan sees what is read"
