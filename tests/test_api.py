"""The ten names of the package: they are there, import nothing early, and their examples run."""

import doctest
import subprocess
import sys
from importlib import import_module

import pytest

import bitflow_edu

NAMES = sorted(bitflow_edu.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_run(name, monkeypatch):
    monkeypatch.delenv("BITFLOW_DATA", raising=False)
    found = getattr(bitflow_edu, name)
    names = vars(import_module(found.__module__)).copy()
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    assert test.examples, f"{name} has no example"
    said = []
    failed = doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed
    assert not failed, "".join(said)


def test_ten_names_and_no_others():
    assert len(NAMES) == 10 and set(NAMES) <= set(dir(bitflow_edu))
    with pytest.raises(AttributeError, match="no_such_thing"):
        bitflow_edu.no_such_thing  # noqa: B018  the access is what is tested


def test_the_package_alone_imports_nothing_heavy():
    quick = "import bitflow_edu, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", quick], check=True)


def test_the_module_of_the_same_name_does_not_hide_the_function():
    module = import_module("bitflow_edu.exact_inverse")
    assert bitflow_edu.exact_inverse is module.exact_inverse
