"""What the tests of the command line share: a command that succeeds, and one that is refused."""

import shlex

from bitflow_edu.cli.main import main
from bitflow_edu.io.results import load_result

SMOKE, GLOW = "--preset mnist-mini-smoke", "--preset mnist-glow-smoke"


def run(line):
    """A command that must succeed."""
    assert main(shlex.split(line)) == 0


def refused(line, capsys, *words):
    """The command fails as a mistake should.

    Code 2, and one or two lines on stderr that hold all the words."""
    before = capsys.readouterr()
    assert main(shlex.split(line)) == 2, before
    said = capsys.readouterr().err.strip()
    assert said.startswith("bitflow: "), said
    assert len(said.splitlines()) <= 2 and len(said) < 700, said
    for word in words:
        assert str(word) in said, f"{word!r} is not in: {said}"


def measurements(path):
    """The lines of a results file."""
    return load_result(path.stem, path.parent)["measurements"]
