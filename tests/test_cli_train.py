"""`bitflow train`: what it writes, how it is repeated, and what it refuses."""

import json

import pytest
from commands import SMOKE, refused, run


@pytest.mark.parametrize("strategy", ["naive", "hidden-distillation"])
def test_other_strategies_train(runs, tmp_path, strategy):
    more = f"--steps 2 --strategy {strategy} --out {tmp_path}/g"
    run(f"train reverse {SMOKE} --forward {runs}/f {more}")


def test_a_run_is_repeated_from_the_file_it_leaves(tmp_path, capsys):
    """Fields on the command line reach the run; its preset.yaml gives the same weights again."""
    a, b = tmp_path / "a", tmp_path / "b"
    asked = "--steps 3 --seed 5 --forward.transformer.num-layers 2 --train-forward.lr=1e-3"
    run(f"train forward {SMOKE} {asked} --name mine --out {a}")
    run(f"train forward --config {a}/preset.yaml --out {b}")
    first, again = (json.loads((folder / "run.json").read_text()) for folder in (a, b))
    assert first == again and first["preset"] == "mine"
    assert first["train"]["lr"] == 1e-3 and first["train"]["seed"] == 5
    one, other = (next(folder.glob("checkpoints/*/model.safetensors")) for folder in (a, b))
    assert one.read_bytes() == other.read_bytes()
    assert (a / "preset.yaml").read_text() == (b / "preset.yaml").read_text()
    twice = f"train forward {SMOKE} --steps 3 --train-forward.steps 4 --out {tmp_path}/c"
    refused(twice, capsys, "--steps 3", "--train-forward.steps")
    assert not (tmp_path / "c").exists()


OUT_OF_RANGE = """--steps 0, --steps -3, --minutes 0, --minutes -1.5, --batch-size 0, --lr -0.1,
--patch-size 5, --patch-size 0, --device tpu, --data-root nowhere"""


@pytest.mark.parametrize("option", [option.strip() for option in OUT_OF_RANGE.split(",")])
def test_options_out_of_range(capsys, tmp_path, option):
    refused(f"train forward {SMOKE} --out {tmp_path}/f {option}", capsys, option.split()[1])
    assert not (tmp_path / "f").exists(), "nothing was written"


def test_mistakes_with_trainings_of_g(capsys, tmp_path, runs):
    train = f"train reverse --out {tmp_path}/g --forward"
    refused(f"{train} {tmp_path}/none {SMOKE}", capsys, "none", "does not exist")
    refused(f"{train} {runs}/g {SMOKE}", capsys, "ReverseModel", "TARFlow")
    osmosis = f"{train} {runs}/f {SMOKE} --strategy osmosis"
    refused(osmosis, capsys, "osmosis", "hidden-alignment")
    refused(f"{train} {runs}/f", capsys, "num_blocks")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_mistakes_with_folders(capsys, tmp_path, runs):
    train = f"train forward {SMOKE} --out {runs}/f"
    refused(train, capsys, "exists already", "--resume")
    refused(f"{train} --steps 11 --resume", capsys, "was made with")
    file = tmp_path / "file"
    file.write_text("kept")
    for command in ("demo", "train forward"):
        refused(f"{command} {SMOKE} --out {file}", capsys, file)
        refused(f"{command} {SMOKE} --out {file}/run", capsys, file)
    refused(f"demo {SMOKE} --out {tmp_path}/d --results {file}", capsys, file)
    refused(f"sample --checkpoint {runs}/g --out {file}", capsys, "exists already")
    (tmp_path / "mnist-mini.npz").write_bytes(b"no archive")
    demo = f"demo {SMOKE} --out {tmp_path}/d --results {tmp_path}/r"
    refused(f"{demo} --data-root {tmp_path}", capsys, "mnist-mini.npz")
    assert file.read_text() == "kept"
    assert not (tmp_path / "d").exists() and not (tmp_path / "r").exists()
