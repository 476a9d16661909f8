"""`bitflow sample`: every way to draw, and what cannot be drawn."""

import pytest
import torch
from commands import refused, run
from PIL import Image

from bitflow_edu.cli.describe import load_any
from bitflow_edu.cli.sample import parse_labels, report_broken
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.io.models import save_model
from conftest import small_flow


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


def test_a_model_of_nan_is_shown_and_is_an_error(tmp_path, capsys):
    model = load_any(asset("mnist-mini/reverse"), "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    save_model(model, tmp_path / "g")
    line = f"sample --checkpoint {tmp_path}/g --n 4 --out {tmp_path}/s.png"
    refused(line, capsys, "4 of 4", "s.png", f"{tmp_path}/g")
    assert Image.open(tmp_path / "s.png").size[1] == 16


def test_broken_images_are_counted(tmp_path, capsys):
    x = torch.zeros(4, 1, 2, 2)
    report_broken(x, tmp_path, tmp_path)
    assert not capsys.readouterr().err
    x[1, 0, 0, 0], x[2, 0, 1, 1] = float("nan"), float("inf")
    report_broken(x, tmp_path, tmp_path)
    assert "2 of 4" in capsys.readouterr().err
    with pytest.raises(BitflowError, match="2 of 2"):
        report_broken(x[1:3], tmp_path, tmp_path)


def test_the_ending_is_added_before_anything_is_drawn(tmp_path, capsys):
    sample = f"sample --checkpoint {asset('mnist-mini/reverse')} --n 3 --out {tmp_path}"
    run(f"{sample}/digits")
    assert f"{tmp_path}/digits.png" in capsys.readouterr().out
    kept = (tmp_path / "digits.png").read_bytes()
    refused(f"{sample}/digits --seed 1", capsys, "digits.png exists already")
    refused(f"{sample}/digits.png --seed 1", capsys, "digits.png exists already")
    refused(f"{sample}/digits.xyz", capsys, "--out", "digits.xyz")
    refused(sample, capsys, "is a folder")
    assert (tmp_path / "digits.png").read_bytes() == kept and len(list(tmp_path.iterdir())) == 1


def test_options_that_drawing_would_not_read(tmp_path, capsys, glow):
    sample = f"sample --checkpoint {asset('mnist-mini/reverse')} --out {tmp_path}/s.png"
    refused(f"{sample} --n 2 --labels 1,2,3", capsys, "--labels 1,2,3", "--n 2")
    refused(f"{sample} --vae some/where", capsys, "--vae some/where")
    refused(f"{sample} --denoise", capsys, "--denoise")
    of_glow = f"sample --checkpoint {glow} --out {tmp_path}/s.png"
    refused(f"{of_glow} --labels 1", capsys, "--labels 1")
    refused(f"{of_glow} --w 1", capsys, "--w 1")
    assert not list(tmp_path.iterdir())


def test_labels_of_a_flow_that_never_saw_one_are_refused():
    flow = small_flow(label_dropout=1.0)
    with pytest.raises(BitflowError, match="--labels 3: this model was trained without labels"):
        parse_labels("3", flow.cfg, 2)
    assert parse_labels(None, flow.cfg, 2).tolist() == [-1, -1]
