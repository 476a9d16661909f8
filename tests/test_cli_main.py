"""The program: its help, its exit codes, and every command as a table of names."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused

from bitflow_edu.cli import main as program
from bitflow_edu.cli.main import COMMANDS, main, way_on
from bitflow_edu.cli.options import NAMES, CacheLatents, Demo, Info, Reproduce, TrainForward
from bitflow_edu.io.processes import Interrupted


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("demo", "train", "sample", "evaluate", "info"))


def test_mistakes_in_words(capsys, tmp_path):
    refused("", capsys, "--help")
    refused("dmeo", capsys, "dmeo")
    refused("train", capsys, "forward", "reverse")
    refused("demo --stepz 3", capsys, "--stepz")
    refused("demo --steps many", capsys, "--steps", "many")
    refused(f"demo --preset mnist-mimi --out {tmp_path}/d", capsys, "mnist-mimi", "mnist-mini")
    refused("info --preset imagenet", capsys, "imagenet")
    refused("sample", capsys, "--checkpoint")
    assert not (tmp_path / "d").exists()


def test_every_command_is_carried_out():
    assert {*COMMANDS, Reproduce} == set(NAMES)


@pytest.mark.parametrize("words", [["info"], ["info", "--fields"], ["--help"]])
def test_a_closed_pipe_is_an_end(words):
    """As behind `bitflow info | true`: no traceback, and no complaint when Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bitflow_edu.cli", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_printed_is_replaced(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["info", "--name", "größe"]) == 0
    assert b"preset   gr??e" in shown.buffer.getvalue()


def test_what_the_system_says_of_a_path_is_a_sentence(monkeypatch, capsys):
    def denied(command):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("bitflow_edu.cli.main.run_command", denied)
    refused("info", capsys, "/some/file", "Permission denied")


def test_options_that_cannot_be_meant_are_refused_before_anything_is_read(capsys, tmp_path):
    refused(f"sample --checkpoint {tmp_path}/none --n 0", capsys, "--n 0")
    refused(f"sample --checkpoint {'a' * 300}", capsys, "--checkpoint", "too long")
    refused(f"train forward --seed -1 --out {tmp_path}/f", capsys, "--seed -1")
    refused(f"cache-latents --source x --out {tmp_path}/c --per-shard -1", capsys, "--per-shard")
    assert not list(tmp_path.iterdir())


def test_the_module_and_the_script_are_the_same_program():
    """torchrun starts the module; a user calls the script."""
    module = [sys.executable, "-m", "bitflow_edu.cli"]
    for command in (module, [Path(sys.executable).with_name("bitflow")]):
        shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0 and "cache-latents" in shown.stdout
        wrong = subprocess.run([*command, "dmeo"], capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr.startswith("bitflow: ")


@pytest.mark.parametrize(
    "error, code, says",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(signal.SIGINT, "step 3 is saved"), 130, "step 3 is saved"),
        (Interrupted(signal.SIGTERM, "step 3 is saved"), 143, "SIGTERM; step 3 is saved"),
    ],
)
@pytest.mark.parametrize("words, resumes", [("train forward", True), ("info", False)])
def test_interrupts(monkeypatch, capsys, error, code, says, words, resumes):
    """The exit code is the signal's; only what can be resumed is told how."""

    def ends(command):
        raise error

    monkeypatch.setattr(program, "run_command", ends)
    assert main(words.split()) == code
    said = capsys.readouterr().err
    assert says in said and ("--resume" in said) == resumes


def test_ways_on():
    assert way_on(None) == way_on(Info()) == ""
    assert "--resume" in way_on(Demo()) and "--resume" in way_on(TrainForward())
    assert "--resume" not in way_on(CacheLatents(source="a", out=Path("b")))


STEM = "mnist-mini-smoke"
WRITERS = [
    ("evaluate --out {}/mine", "mine.json"),
    ("evaluate --out {}/mine.json", "mine.png"),
    ("bench --out {}/mine", "mine.json"),
    ("sample --checkpoint none --out {}/mine", "mine.png"),
    (f"demo --preset {STEM} --out {{}}/new --results {{}}", f"demo-{STEM}.png"),
    (f"ablate depth --preset {STEM} --out {{}}/new --results {{}}", f"ablate-depth-{STEM}.png"),
    ("reproduce --check --record --results {}", "check-mnist-mini.json"),
]


@pytest.mark.parametrize("words, file", WRITERS)
def test_no_command_overwrites_a_file_or_works_before_it_says_so(capsys, tmp_path, words, file):
    (tmp_path / file).write_text("kept")
    refused(words.format(tmp_path, tmp_path), capsys, f"{file} exists already")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
