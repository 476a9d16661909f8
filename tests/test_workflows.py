"""What GitHub runs: pinned actions, targets that the Makefile has, Pythons that are promised."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config")
PINNED = re.compile(r"(?P<action>[\w-]+/[\w-]+)@(?P<commit>[0-9a-f]{40}) # v\d+\.\d+\.\d+")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
VARIABLES = dict(re.findall(r"^([A-Z_]+) *[?:]= *(.+)$", MAKEFILE, re.M))


def read(path: Path) -> dict:
    """A YAML file whose values stay text, so that the key `on` does not become True."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def settings() -> configparser.SectionProxy:
    """What settings.ini says."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def jobs() -> dict[str, dict]:
    """Every job of every workflow, by `workflow/job`."""
    found = {path.stem: read(path)["jobs"] for path in WORKFLOWS}
    return {f"{stem}/{name}": job for stem, named in found.items() for name, job in named.items()}


def commands(job: dict) -> list[str]:
    """The shell commands of a job."""
    return [step["run"] for step in job["steps"] if "run" in step]


def made(command: str) -> tuple[set[str], dict[str, str]]:
    """What a `make` command asks for: its targets, those in STEPS too, and its variables."""
    words = re.findall(r'(?:\$\{\{.*?\}\}|"[^"]*"|\S)+', command)
    assert words[0] == "make", command
    given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    targets = {word for word in words[1:] if "=" not in word}
    return targets | set(given.get("STEPS", "").strip('"').split()), given


def pythons(job: dict) -> list[str]:
    """The Pythons that a job runs on, in order."""
    matrix = job.get("strategy", {}).get("matrix", {}).get("python", [])
    named = [step.get("with", {}).get("python-version") for step in job["steps"]]
    return matrix + [version for version in named if version and not version.startswith("$")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_action_is_pinned_by_its_commit(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    used = [line.split("uses:", 1)[1].strip() for line in lines if "uses:" in line]
    assert used and [use for use in used if not PINNED.fullmatch(use)] == []


def test_an_action_has_one_version_everywhere():
    found = [PINNED.finditer(path.read_text(encoding="utf-8")) for path in WORKFLOWS]
    pins = {(match["action"], match["commit"]) for matches in found for match in matches}
    assert len(pins) == len({action for action, _ in pins})


@pytest.mark.parametrize("name", jobs())
def test_jobs_call_what_the_makefile_has(name):
    for command in commands(jobs()[name]):
        if command.startswith("make"):
            targets, given = made(command)
            assert targets <= TARGETS, command
            assert set(given) <= set(VARIABLES), command
        for script in re.findall(r"\S+\.(?:py|sh|js)\b", command):
            assert (ROOT / script).exists(), command


def test_together_the_jobs_run_what_make_test_runs():
    recipe = MAKEFILE[MAKEFILE.index("\ntest: ") :].split("\n\n")[0]
    parts = set(re.findall(r"\$\(MAKE\) --no-print-directory ([a-z-]+)", recipe))
    ran = [made(c)[0] for name, job in jobs().items() for c in commands(job) if "test/" in name]
    assert len(parts) == 5 and parts <= set().union(*ran)


def test_the_pythons_are_those_that_are_promised():
    promised = re.search(r"range\((\d+), (\d+)\)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    versions = [f"3.{minor}" for minor in range(int(promised[1]), int(promised[2]))]
    code = jobs()["test/code"]
    assert pythons(code) == versions == VARIABLES["PYTHONS"].split()
    assert versions[0] == VARIABLES["OLDEST"] == settings()["min_python"]
    assert all(version in versions for job in jobs().values() for version in pythons(job))
    oldest = re.search(r"torch>=([\d.]+)", settings()["requirements"])[1]
    assert VARIABLES["OLDEST_TORCH"].startswith(f"torch=={oldest}.0 ")


PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_the_matrix_runs_the_steps_that_it_is_given(tmp_path):
    """The command of a job, with a Python that only notes how it was called."""
    (command,) = commands(jobs()["test/code"])
    version = VARIABLES["OLDEST"]
    for name in ("Makefile", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / f"python{version}"
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "MAKEFLAGS")}
    env |= {"CALLS": str(tmp_path / "calls.txt"), "PATH": f"{python.parent}:{env['PATH']}"}
    shell = ["sh", "-c", command.replace("${{ matrix.python }}", version)]
    done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    venv, install, tests, malformed = (tmp_path / "calls.txt").read_text().splitlines()[1:]
    assert venv.startswith("-m venv") and "pip install" in install
    assert tests.startswith("-m pytest") and malformed == "tests/fuzz.py"
    pins = (tmp_path / "build" / "matrix" / "oldest.txt").read_text().split()
    assert (
        pins == VARIABLES["OLDEST_TORCH"].split() and f"passed on Python {version}" in done.stdout
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_do_little(path):
    text, workflow = path.read_text(encoding="utf-8"), read(path)
    assert workflow["permissions"] in ({}, "", {"contents": "read"}) and "secrets." not in text
    assert "pull_request_target" not in workflow["on"]
    for job in workflow["jobs"].values():
        granted = job.get("permissions", {})
        assert "timeout-minutes" in job
        assert "environment" in job or set(granted) <= {"contents"}, "only what publishes may write"
        assert not (granted.keys() & {"id-token"} and commands(job)), "no shell beside the identity"
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"


@pytest.mark.skipif(shutil.which("grep") is None, reason="grep is not here")
def test_a_release_must_be_named_after_its_version():
    (check,) = [c for c in commands(jobs()["publish/build"]) if "GITHUB_REF_NAME" in c]
    version = settings()["version"]

    def accepted(tag):
        env = {**os.environ, "GITHUB_REF_NAME": tag}
        return subprocess.run(["sh", "-c", check], cwd=ROOT, env=env).returncode == 0

    assert accepted(f"v{version}")
    assert not accepted(f"v{version}0") and not accepted("v9.9.9") and not accepted("main")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_something(path):
    form = read(path)
    assert form["name"] and form["description"]
    assert {field["type"] for field in form["body"]} <= {"input", "textarea", "dropdown"}
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_faults_are_reported_where_security_says():
    (link,) = read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
    assert link["url"].startswith(settings()["git_url"])
    assert link["url"] in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
