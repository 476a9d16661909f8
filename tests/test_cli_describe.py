"""`bitflow info`: presets of every size, files, checkpoints, and what they cost."""

import re
import shutil

import pytest
from commands import refused, run

from bitflow_edu.cli.main import main
from bitflow_edu.io.models import newest_checkpoint
from bitflow_edu.lab.preset_fields import read_preset
from bitflow_edu.lab.presets import PRESETS, find_preset


@pytest.mark.parametrize("preset", PRESETS)
def test_info(preset, capsys):
    run(f"info --preset {preset}")
    said = capsys.readouterr().out
    assert "parameters" in said and "FLOP" in said


def test_info_of_a_checkpoint(runs, capsys):
    run(f"info --checkpoint {runs}/g")
    assert "ReverseModel" in capsys.readouterr().out


@pytest.mark.parametrize("config", ['{"kind": [1, 2]}', "[]", "{"])
def test_info_of_a_damaged_checkpoint(runs, tmp_path, capsys, config):
    shutil.copytree(newest_checkpoint(runs / "f"), tmp_path / "f")
    (tmp_path / "f" / "config.json").write_text(config)
    refused(f"info --checkpoint {tmp_path}/f", capsys, "config.json")


def test_info_writes_reads_and_lists(tmp_path, capsys):
    path = tmp_path / "new" / "p.yaml"
    clipped = ["--preset", "imagenet256-b2-smoke", "--forward.clip", "2"]
    assert main(["info", *clipped, "--yaml", str(path)]) == 0
    assert read_preset(path, find_preset("mnist-mini")).forward.clip == 2
    assert main(["info", "--config", str(path)]) == 0
    assert "imagenet256-b2-smoke" in capsys.readouterr().out
    assert main(["info", "--config", str(path), "--fields"]) == 0
    said = capsys.readouterr().out
    for words in ("--forward.transformer.width INT", "features per token", "default: 64"):
        assert words in said
    refused(f"info --yaml {path}", capsys, "exists already", "--yaml")
    refused(f"info --config {tmp_path}/none.yaml", capsys, "none.yaml", "--yaml")
    meant = "did you mean forward.transformer.width"
    refused("info --forward.transformer.widht 3", capsys, meant, "--fields")
    refused("info --mfu 1.5", capsys, "--mfu 1.5")
    refused("info --peak-tflops 0", capsys, "--peak-tflops 0")
    sample = "sample --checkpoint x --data.image-size 3"
    refused(sample, capsys, "--data.image-size", "sample")


UNREAD = """--seed 3, --device cpu, --checkpoint c --preset mnist,
--checkpoint c --config x.yaml, --checkpoint c --forward.num-blocks 3, --checkpoint c --yaml x,
--checkpoint c --fields, --checkpoint c --mfu 0.2, --yaml x --fields, --yaml x --mfu 0.2,
--fields --mfu 0.2, --fields --peak-tflops 3, --preset mnist-glow --mfu 0.2"""


@pytest.mark.parametrize("options", [words.strip() for words in UNREAD.split(",")])
def test_info_refuses_options_that_it_would_not_read(capsys, options):
    first = options.rpartition("--")[2].split()[0]
    refused(f"info {options}", capsys, f"--{first}", "not read")
    assert not capsys.readouterr().out


def test_info_of_the_largest(capsys):
    """Size, assumptions and what is inferred are said; twice the utilisation, half the hours."""
    hours, sizes = (
        [],
        ["256 of 16 values", "published F: 690M", "within 3 %", "activations", "FID 2.57"],
    )
    for mfu in ("0.2", "0.4"):
        words = ["--preset", "imagenet256-xl2", "--mfu", mfu, "--peak-tflops", "312"]
        assert main(["info", *words]) == 0
        said = capsys.readouterr().out
        found = re.search(r"800000 steps: ([\d,.]+) GPU-hours", said).group(1)
        hours.append(float(found.replace(",", "")))
        peak = f"312 TFLOP/s at {float(mfu):.0%}"
        for words in (*sizes, peak, "inferred", "forward.transformer"):
            assert words in said, said
    assert hours[0] == pytest.approx(2 * hours[1], rel=1e-3)
