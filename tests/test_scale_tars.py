"""Tars: patterns, samples, and what is refused: cut, without images, or larger than it looks."""

import gzip
import io
import resource
import tarfile
from collections import Counter

import pytest

from bitflow_edu.io.files import BitflowError
from bitflow_edu.scale.image_sources import TarSource, as_jpeg, synthetic_picture, synthetic_tar
from bitflow_edu.scale.tars import MAX_TARS, braces, read_tar

JPEG = as_jpeg(synthetic_picture(0))


def tar_of(members):
    """A tar of (name, bytes), in this order."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def read(tmp_path, data, *more, name="some.tar"):
    (tmp_path / name).write_bytes(data)
    return list(read_tar(str(tmp_path / name), *more))


def test_braces():
    assert braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert braces("plain.tar") == ["plain.tar"]


def test_a_name_comes_once():
    assert sorted(braces("{a,{b,c}}")) == ["a", "b", "c"]
    assert braces("x-{1,1}") == ["x-1"]


@pytest.mark.parametrize("pattern", ["{a,b}" * 30, "{0..999999999}", "{a}" * 2000, "{" * 100])
def test_patterns_that_name_too_much_are_refused(pattern):
    with pytest.raises(BitflowError, match="pattern") as e:
        braces(pattern)
    assert len(str(e.value)) < 300
    assert len(braces(f"{{1..{MAX_TARS}}}")) == MAX_TARS


def test_a_tar_cut_anywhere_is_refused_and_named(tmp_path):
    data, path = synthetic_tar(range(3)), tmp_path / "cut.tar"
    end = len(data.rstrip(b"\0"))
    for cut in [0, 1, 100, *range(512, end, 512), end - 3, end + 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(BitflowError, match=r"cut\.tar"):
            list(read_tar(str(path), 2))
    path.write_bytes(data)
    assert len(list(read_tar(str(path), 2))) == 3


def test_bad_tars_are_refused(tmp_path):
    (tmp_path / "label.tar").write_bytes(synthetic_tar(range(2)))
    with pytest.raises(BitflowError, match="000001.cls says '1'"):
        list(read_tar(str(tmp_path / "label.tar"), 1))
    with pytest.raises(BitflowError, match="none.tar"):
        list(read_tar(str(tmp_path / "none.tar"), 2))
    (tmp_path / "no.tar").write_bytes(b"this is no tar" * 1000)
    with pytest.raises(BitflowError, match="no.tar"):
        list(read_tar(str(tmp_path / "no.tar"), 2))
    with pytest.raises(BitflowError, match="no tar is named"):
        TarSource(f"{tmp_path}/x-*.tar").open()
    with pytest.raises(BitflowError, match="nothing://"):
        list(read_tar("nothing://bucket/a.tar", 2))


SAMPLES = {
    "plain": ["s0.jpg", "s0.cls"],
    "two parts": ["s0.input.jpg", "s0.cls"],
    "upper case, in a folder": ["./a.b/s0.JPG", "./a.b/s0.CLS"],
    "two parts, both": ["s0.input.png", "s0.label.cls"],
    "the plain one counts": ["s0.mask.png", "s0.jpg", "s0.cls"],
    "others beside it": ["s0.json", "s0.jpg", "s0.txt", "s0.cls"],
    "hidden": ["._s0.jpg", "s0.jpg", "s0.cls", ".cache/s1.jpg"],
}


@pytest.mark.parametrize("what", SAMPLES)
def test_samples_are_split_at_the_first_dot(tmp_path, what):
    data = [(n, b"1" if n.lower().endswith("cls") else n.encode()) for n in SAMPLES[what]]
    left_out = Counter()
    (found,) = read(tmp_path, tar_of(data), 2, left_out)
    name = next(n for n in SAMPLES[what] if n.split("/")[-1][:2] == "s0" and n[-4:] != ".cls")
    if what in ("the plain one counts", "others beside it"):
        name = "s0.jpg"
    assert found.label == 1 and found.data == name.encode()
    assert left_out == ({"hidden": 2} if what == "hidden" else {})


def test_incomplete_samples_are_counted(tmp_path):
    members = [("a.jpg", JPEG), ("a.cls", b"0"), ("b.txt", b""), ("c.cls", b"0"), ("d.jpg", JPEG)]
    left_out = Counter()
    found = read(tmp_path, tar_of([*members, ("d.cls", b" 1\n")]), 2, left_out)
    assert [raw.label for raw in found] == [0, 1]
    assert left_out == {"samples without an image": 2}


def test_a_tar_without_an_image_is_refused_with_what_it_has(tmp_path):
    with pytest.raises(BitflowError, match=r"some\.tar holds no image.*\.input\.npy, \.cls"):
        read(tmp_path, tar_of([("s0.input.npy", b""), ("s0.cls", b"1")]), 2)


def test_which_of_two_images_is_asked(tmp_path):
    with pytest.raises(BitflowError, match=r"a\.jpg, b\.png"):
        read(tmp_path, tar_of([("s0.a.jpg", JPEG), ("s0.b.png", JPEG), ("s0.cls", b"1")]), 2)


@pytest.mark.parametrize(
    "label", [b"", b"-1", b"2", b"1.0", b"cat", b"9" * 5000, b"\xff", b"\0" * 10**6]
)
def test_labels_that_are_none_are_named(tmp_path, label):
    with pytest.raises(BitflowError, match=r"some\.tar: s0\.cls says"):
        read(tmp_path, tar_of([("s0.jpg", JPEG), ("s0.cls", label)]), 2)
    with pytest.raises(BitflowError, match="s0.cls says 'nothing'.*jpg"):
        read(tmp_path, tar_of([("s0.jpg", JPEG)]), 2)


def test_without_a_number_of_classes_labels_have_a_limit(tmp_path):
    members = [("s0.jpg", JPEG), ("s0.cls", b"21840")]
    assert read(tmp_path, tar_of(members))[0].label == 21840
    with pytest.raises(BitflowError, match="100000"):
        read(tmp_path, tar_of([("s0.jpg", JPEG), ("s0.cls", b"100000")]))


def announced(size, kind=tarfile.REGTYPE, name="s0.jpg"):
    """A compressed tar whose only member says that it has so many bytes; a few MB follow."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return gzip.compress(member.tobuf() + bytes(4 << 20), compresslevel=1)


@pytest.mark.parametrize("name", ["s0.jpg", "s0.bin", ".hidden"])
def test_a_large_member_is_refused_before_it_is_read(tmp_path, name):
    with pytest.raises(BitflowError, match=r"bomb\.tar\.gz.*6,442,450,944 bytes"):
        read(tmp_path, announced(6 << 30, name=name), 2, name="bomb.tar.gz")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_are_not_read_without_end(tmp_path, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BitflowError, match=r"bomb\.tar\.gz.*more bytes"):
        read(tmp_path, announced(6 << 30, kind), 2, name="bomb.tar.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # kB


def test_what_follows_the_end_mark_is_not_read_without_end(tmp_path):
    data = gzip.compress(synthetic_tar(range(2)) + bytes(8 << 20), compresslevel=1)
    with pytest.raises(BitflowError, match=r"long\.tar\.gz.*more bytes"):
        read(tmp_path, data, 2, name="long.tar.gz")
