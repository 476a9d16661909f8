"""`bitflow export`: what it writes and prints, and what it refuses."""

import importlib.util
import shlex

import pytest
import torch
from commands import refused, run

from bitflow_edu.cli.options import Export, command_line, parse
from bitflow_edu.io.files import asset
from bitflow_edu.io.models import save_model
from bitflow_edu.lab import export
from bitflow_edu.reverse_model import one_pass, sample_noise
from conftest import small_flow, small_reverse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """F, a G, and a G that takes w, as checkpoints."""
    folder, F = tmp_path_factory.mktemp("models"), small_flow(side=2, blocks=2)
    save_model(F, folder / "f")
    save_model(small_reverse(F), folder / "g")
    save_model(small_reverse(F, max_guidance=2.0), folder / "guided")
    return folder


def test_a_program_for_torch(folder, tmp_path, capsys):
    run(f"export {folder}/guided --format torch --w 0.5 --half --out {tmp_path}/new/g")
    said = capsys.readouterr().out
    assert "z (N, 4, 4), c (N,) → image (N, 1, 4, 4)" in said and "float16" in said
    assert "1 image: differs" in said and "5 images: differs" in said and "g.pt2" in said
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["g.pt2"]
    G = small_reverse(small_flow(side=2, blocks=2), max_guidance=2.0)
    z, c = sample_noise(G.cfg, 2), torch.tensor([0, -1])
    found = torch.export.load(f"{tmp_path}/new/g.pt2").module()(z, c)
    torch.testing.assert_close(found, one_pass(G, z, c, 0.5), rtol=0, atol=0.05)


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="the extra export: no onnxruntime"
)
def test_onnx_by_default(folder, tmp_path, capsys):
    run(f"export {folder}/f --states --out {tmp_path}/f.onnx")
    said = capsys.readouterr().out
    assert "states (N, 3, 4, 4)" in said and f"opset {export.OPSET}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["f.onnx"]


def test_what_cannot_be_meant(folder, tmp_path, capsys, glow):
    out = f"--format torch --out {tmp_path}/m"
    refused(f"export {folder}/g --w 0.5 {out}", capsys, "--w 0.5", "takes no guidance scale")
    refused(f"export {folder}/f --w 0.5 {out}", capsys, "--w 0.5", "takes no guidance scale")
    refused(f"export {folder}/guided --w 2.5 {out}", capsys, "--w 2.5", "2")
    refused(f"export {folder}/guided --w -1 {out}", capsys, "--w -1")
    refused(f"export {folder}/g --states {out}", capsys, "--states")
    refused(f"export {folder}/none {out}", capsys, "does not exist")
    refused(f"export {asset('mnist-mini')} {out}", capsys, "config.json")
    refused(f"export {glow} {out}", capsys, "coupling flow")
    refused(f"export {folder}/f --format tflite --out {tmp_path}/m", capsys, "--format 'tflite'")
    refused(f"export {folder}/f", capsys, "--out")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_left_alone(tmp_path, capsys):
    (tmp_path / "m.pt2").write_text("kept")
    refused(f"export none --format torch --out {tmp_path}/m", capsys, "m.pt2 exists already")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_the_words_of_the_command():
    args = parse(shlex.split("export runs/g --out g.onnx --half --w 0.5"))
    assert isinstance(args, Export) and args.half and args.w == 0.5
    assert parse(shlex.split(command_line(args))[1:]) == args
