"""The program: its help, its exit codes, and every command as a table of names."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused

from bitflow_edu.cli.main import COMMANDS, main
from bitflow_edu.cli.options import NAMES, Reproduce


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


def test_the_module_and_the_script_are_the_same_program():
    """torchrun starts the module; a user calls the script."""
    module = [sys.executable, "-m", "bitflow_edu.cli"]
    for command in (module, [Path(sys.executable).with_name("bitflow")]):
        shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0 and "cache-latents" in shown.stdout
        wrong = subprocess.run([*command, "dmeo"], capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr.startswith("bitflow: ")
