"""`bitflow sample`: every way to draw, and what cannot be drawn."""

import pytest
from commands import run
from PIL import Image

from bitflow_edu.io.files import asset


@pytest.mark.parametrize(
    "folder, more", [("f", ""), ("f", "--denoise --w 0.5"), ("g", "--labels 3,-1"), ("g", "--w 1")]
)
def test_sample(runs, tmp_path, folder, more):
    run(f"sample --checkpoint {runs}/{folder} --n 20 --out {tmp_path}/s.png {more}")
    assert Image.open(tmp_path / "s.png").size == (169, 33)


def test_sample_makes_its_folder(tmp_path):
    checkpoint = asset("mnist-mini/reverse")
    run(f"sample --checkpoint {checkpoint} --n 3 --columns 3 --out {tmp_path}/new/s.png")
    assert (tmp_path / "new" / "s.png").exists()


def test_the_same_seed_draws_the_same(runs, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"sample --checkpoint {runs}/g --n 8 --seed {seed} --out {tmp_path}/{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
