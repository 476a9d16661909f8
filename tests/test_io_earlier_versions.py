"""What version 0.1 wrote is still read: models, runs stopped halfway, YAML files and options.

tests/written_by_0_1/ holds a run of F and one of G, stopped at step 3 of 6, and the YAML file that
both were started with. Its fields are `pieces`, `checkpointing` and `prior_var`, and G's
projections are called heads. The metrics go on to step 6: what that version measured.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitflow_edu.cli.main import main
from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import load_model, newest_checkpoint
from bitflow_edu.lab.preset_fields import read_preset
from bitflow_edu.lab.presets import find_preset
from bitflow_edu.reverse_model import ReverseModel, one_pass
from bitflow_edu.tarflow import TARFlow

OLD = Path(__file__).resolve().parent / "written_by_0_1"
KINDS = {"forward": TARFlow, "reverse": ReverseModel}


@pytest.fixture(scope="module")
def one_thread():
    """The sums of the old runs were made by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, one_thread):
    """A copy of the two runs, trained to their end by the version of today."""
    home = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(OLD, home)
    start = ["--config", str(home / "tiny.yaml"), "--resume", "--device", "cpu"]
    forward, reverse = str(home / "forward"), str(home / "reverse")
    assert main(["train", "forward", *start, "--out", forward]) == 0
    assert main(["train", "reverse", *start, "--forward", forward, "--out", reverse]) == 0
    return home


@pytest.mark.parametrize("stage", KINDS)
def test_models_load(stage):
    model = load_model(OLD / stage, KINDS[stage])
    stored = load_file(newest_checkpoint(OLD / stage) / "model.safetensors")
    own = model.state_dict()
    assert len(own) == len(stored)
    assert all(torch.equal(own[k.replace("heads.", "projections.")], stored[k]) for k in stored)


def test_models_can_be_used(digits):
    F, G = (load_model(OLD / stage, kind) for stage, kind in KINDS.items())
    x, c = digits.x[:4], digits.labels[:4]
    with torch.no_grad():
        z = F(x, c).z
        assert z.isfinite().all() and one_pass(G, z, c).shape == x.shape


@pytest.mark.parametrize("stage", KINDS)
def test_runs_go_on_as_they_would_have(resumed, stage):
    then, now = (read_metrics(home / stage / "metrics.jsonl") for home in (OLD, resumed))
    assert [m["step"] for m in now] == [m["step"] for m in then] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr"):
        expected = pytest.approx([m[key] for m in then], rel=1e-5)
        assert [m[key] for m in now] == expected
    starts = (resumed / stage / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 3]
    assert newest_checkpoint(resumed / stage).name == "step-00000006"


@pytest.mark.parametrize("stage", KINDS)
def test_a_resumed_run_is_written_by_the_names_of_today(resumed, stage):
    run = json.loads((resumed / stage / "run.json").read_text())
    assert run["train"]["num_microbatches"] == 2 and "pieces" not in run["train"]
    assert run["train"]["activation_checkpointing"] is False and "prior_var" not in run["model"]


def test_the_yaml_file_is_read():
    preset = read_preset(OLD / "tiny.yaml", find_preset("mnist-mini"))
    for train in (preset.train_forward, preset.train_reverse):
        assert (train.num_microbatches, train.activation_checkpointing) == (2, False)
    assert preset.forward == load_model(OLD / "forward", TARFlow).cfg
    assert preset.reverse == load_model(OLD / "reverse", ReverseModel).cfg


def test_old_options_mean_what_they_meant(tmp_path, one_thread):
    words = ["train", "forward", "--config", str(OLD / "tiny.yaml"), "--device", "cpu"]
    words += ["--train-forward.steps", "1", "--train-forward.pieces", "4"]
    words += ["--train-forward.checkpointing", "True", "--forward.prior-var", "False"]
    assert main([*words, "--out", str(tmp_path / "f")]) == 0
    train = json.loads((tmp_path / "f" / "run.json").read_text())["train"]
    assert train["num_microbatches"] == 4 and train["activation_checkpointing"] is True


def learn_variance(path):
    """Say in a file that the prior's variance is learnt, as version 0.1 could."""
    text = path.read_text()
    changed = text.replace('"prior_var": false', '"prior_var": true')
    changed = changed.replace("prior_var: false", "prior_var: true")
    assert changed != text
    path.write_text(changed)


def test_a_learnt_prior_variance_is_refused_by_name(tmp_path, capsys):
    """No model of today has one: it is named wherever it stands, and nothing is trained."""
    home = tmp_path / "runs"
    shutil.copytree(OLD, home)
    train = ["train", "forward", "--device", "cpu", "--config", str(home / "tiny.yaml"), "--out"]

    def refused(*words):
        assert main([*train, *words]) == 2
        assert "prior_var" in capsys.readouterr().err

    refused(str(home / "new"), "--forward.prior-var", "True")
    before = read_metrics(home / "forward" / "metrics.jsonl")
    learn_variance(home / "forward" / "run.json")
    refused(str(home / "forward"), "--resume")
    learn_variance(home / "tiny.yaml")
    refused(str(home / "new"))
    learn_variance(newest_checkpoint(home / "forward") / "config.json")
    with pytest.raises(BitflowError, match="prior_var"):
        load_model(home / "forward", TARFlow)
    assert not (home / "new").exists()
    assert read_metrics(home / "forward" / "metrics.jsonl") == before


def test_the_old_files_stay_small():
    assert sum(p.stat().st_size for p in OLD.rglob("*") if p.is_file()) < 500_000
