"""Files: the package's own, writes that are whole or not there, reads that name what is wrong."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitflow_edu.io import files
from bitflow_edu.io.files import (
    BitflowError,
    asset,
    check_new_file,
    check_same_settings,
    check_writable,
    first_difference,
    first_sentence,
    names_in,
    read_arrays,
    read_json,
    report_write_errors,
    save_arrays,
    save_grid,
    write_atomically,
)
from bitflow_edu.io.models import save_tensors

ROOT = Path(__file__).resolve().parent.parent


def test_checksums_in_the_readme_hold():
    data = ROOT / "data"
    lines = (data / "SHA256SUMS").read_text().split("\n")
    sums = dict(reversed(line.split()) for line in lines if line)
    files = [*data.rglob("*.npz"), *data.rglob("*.safetensors")]
    shipped = {path.relative_to(data).as_posix() for path in files}
    assert shipped <= sums.keys(), "run sha256sum on what is new in data/"
    for name, expected in sums.items():
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == expected, name


def test_files_that_come_with_the_package():
    assert asset("mnist-mini.npz").is_file() and asset("chapters").is_dir()
    assert asset("results").is_dir() and asset("results/classifiers.json").is_file()
    for name in ("mnist-maxi.npz", "results/none.json", "setup.py"):
        with pytest.raises(BitflowError, match=name):
            asset(name)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    write_atomically(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(BitflowError, match=f"{tmp_path}.*No space left"):
        with report_write_errors(tmp_path):
            write_atomically(path, "second")
    assert path.read_text() == "first"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, "second"),
        lambda path: save_arrays({"a": torch.zeros(2)}, path),
        lambda path: save_grid(np.zeros((4, 4, 3), np.uint8), path),
        lambda path: save_tensors({"a": torch.zeros(2)}, path),
    ],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failed_write_leaves_nothing_half_done(tmp_path, monkeypatch, write, code):
    """The old file stays; where there was none, none blocks the next try, and no part of one."""

    def fails(*args):
        raise OSError(code, os.strerror(code))

    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("first")
    with monkeypatch.context() as m:
        m.setattr(files, "fsync_path", fails)
        for path in (old, new):
            with pytest.raises((OSError, BitflowError), match=os.strerror(code)):
                write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and old.read_text() == "first"
    write(new)
    assert new.stat().st_size > 0


def test_arrays_come_back(tmp_path):
    path = tmp_path / "new" / "a.npz"
    save_arrays({"a": torch.arange(3), "b": np.ones((2, 2)), "text": "hello"}, path)
    assert names_in(path) == ("a", "b", "text")
    b, a, text = read_arrays(path, "b", "a", "text")
    assert a.tolist() == [0, 1, 2] and b.shape == (2, 2) and str(text) == "hello"
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    with pytest.raises(BitflowError, match="a.npz"):
        save_arrays({"a": torch.arange(3)}, path / "below.npz")


def test_arrays_that_cannot_be_read_are_named(tmp_path):
    save_arrays({"a": torch.arange(1000)}, tmp_path / "a.npz")
    (tmp_path / "half.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], dtype=object))
    for name, array in (("half", "a"), ("pickle", "a"), ("none", "a"), ("a", "other")):
        with pytest.raises(BitflowError, match=f"{name}.npz"):
            read_arrays(tmp_path / f"{name}.npz", array)
    for name in ("half", "none"):
        with pytest.raises(BitflowError, match=f"{name}.npz"):
            names_in(tmp_path / f"{name}.npz")


def test_json_that_cannot_be_read_is_named_with_the_hint(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    (tmp_path / "half.json").write_text('{"a": [1')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for path in ("half.json", "bytes.json", "none.json", ".", "a.json/b.json"):
        with pytest.raises(BitflowError, match="name another run") as e:
            read_json(tmp_path / path, "name another run")
        assert str(tmp_path / path) in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "NaN", "[" * 100_000])
def test_json_of_another_kind_is_damaged(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(BitflowError, match="run.json.*name another run"):
        read_json(path, "name another run")
    path.write_text("[1]")
    assert read_json(path, kind=list) == [1]


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    """The ASCII locale of a bare container, without Python's own way around it."""
    code = (
        "from pathlib import Path; from bitflow_edu.io.files import read_json, write_atomically; "
        f"p = Path({str(tmp_path)!r}) / 'a.json'; write_atomically(p, '{{\"name\": \"\\xfc\"}}'); "
        "assert read_json(p) == {'name': '\\xfc'}"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert (tmp_path / "a.json").read_bytes() == '{"name": "ü"}'.encode()


def test_settings_are_compared_as_json_has_them(tmp_path):
    old = {"train": {"lr": 0.1, "betas": [0.9, 0.95]}, "seed": 0}
    check_same_settings(old, {"train": {"lr": 0.1, "betas": (0.9, 0.95)}, "seed": 0}, tmp_path)
    for new, says in (
        ({**old, "seed": 1}, "seed = 0, not 1"),
        ({"seed": 0, "train": {"lr": 0.2, "betas": [0.9, 0.95]}}, "train.lr = 0.1, not 0.2"),
        ({"train": old["train"]}, "seed = 0, not nothing"),
        ({**old, "more": None}, "more = nothing, not None"),
        ({**old, "train": 3}, "train = {.*}, not 3"),
    ):
        with pytest.raises(BitflowError, match=f"{tmp_path}.*{says}; move it"):
            check_same_settings(old, new, tmp_path, "move it")


def nested(inner):
    return st.dictionaries(st.sampled_from("abc"), inner)


settings_trees = nested(st.recursive(st.integers(0, 3) | st.none(), nested, max_leaves=8))


@given(settings_trees, settings_trees)
def test_the_first_difference_is_one(old, new):
    if old == new:
        return
    name, was, now = first_difference(old, new)

    def at(tree):
        for key in name.split("."):
            tree = tree.get(key, "nothing")
        return tree

    assert (at(old), at(new)) == (was, now) and was != now


def test_an_error_is_quoted_in_a_sentence():
    assert first_sentence(ValueError("no. And more\nand more")) == "ValueError: no"
    assert first_sentence(KeyError()) == "KeyError: no details"
    assert len(first_sentence(ValueError("x" * 999))) < 250


def test_outputs_are_checked_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "a" / "b")
    check_new_file(tmp_path / "a" / "new.json")
    assert not (tmp_path / "a").exists()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BitflowError, match=str(folder)):
            check_writable(folder)
    with pytest.raises(BitflowError, match="file.*--stats"):
        check_new_file(tmp_path / "file", "--stats")


def test_names_that_no_file_system_takes(tmp_path):
    """300 letters: refused before any work, and not by a traceback at its end."""
    for path in (tmp_path / ("n" * 300), tmp_path / ("ü" * 150) / "a.json"):
        with pytest.raises(BitflowError, match="300 bytes"):
            check_new_file(path)
        with pytest.raises(BitflowError, match="300 bytes"):
            check_writable(path)


def test_a_picture_is_written_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    save_grid(picture, tmp_path / "new" / "p.png")
    with Image.open(tmp_path / "new" / "p.png") as back:
        assert np.array_equal(np.asarray(back), picture)


def test_arrays_that_unpack_to_too_much_are_refused_before_they_are(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(1 << 20, np.uint8), b=np.arange(3))
    monkeypatch.setattr(files, "MAX_ARRAYS", 1 << 20)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(BitflowError, match=r"bomb\.npz.*1,048,704 bytes"):
        read_arrays(tmp_path / "bomb.npz", "a")
    monkeypatch.undo()
    assert read_arrays(tmp_path / "bomb.npz", "b")[0].tolist() == [0, 1, 2]
