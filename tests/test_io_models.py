"""Models on disk: they come back as they were, damage is named, and a pickle is never run."""

import contextlib
import dataclasses
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import (
    MAX_SEED,
    as_bytes,
    build,
    find_device,
    from_bytes,
    load_model,
    load_tensors,
    modern_fields,
    newest_checkpoint,
    num_parameters,
    read_tensors,
    save_model,
    to_config,
)
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow, TARFlowConfig, forward_loss
from bitflow_edu.training import TrainConfig, step_generator, train
from conftest import small_flow, small_reverse


def new_flow():
    return small_flow(side=3, patch=2, num_classes=10).train()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def saved(tmp_path, model=None):
    save_model(model or new_flow(), tmp_path / "m")
    return tmp_path / "m"


def test_models_come_back_as_they_were(tmp_path):
    flow = new_flow()
    folder = saved(tmp_path, flow)
    assert same(load_model(folder, TARFlow).state_dict(), flow.state_dict())
    G = small_reverse(flow, token_states=True)
    save_model(G, tmp_path / "g", dtype=torch.bfloat16)
    back = load_model(tmp_path / "g", ReverseModel)
    assert back.cfg == G.cfg and all(p.dtype == torch.float32 for p in back.parameters())
    assert not back.training


def test_bad_checkpoints(tmp_path):
    with pytest.raises(BitflowError, match="does not exist"):
        load_model(tmp_path / "none", TARFlow)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BitflowError, match="config.json is missing"):
        load_model(tmp_path / "empty", TARFlow)
    folder = saved(tmp_path)
    with pytest.raises(BitflowError, match="holds a TARFlow, but a ReverseModel"):
        load_model(folder, ReverseModel)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BitflowError, match="not an intact safetensors"):
        load_model(folder, TARFlow)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weights": os.system}))
    with pytest.raises(BitflowError, match="pickles are never loaded"):
        load_model(folder, TARFlow)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BitflowError, match="missing"):
        load_model(folder, TARFlow)
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["num_blocks"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitflowError, match="does not fit its config"):
        load_model(folder, TARFlow)
    config["config"]["depth"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitflowError, match="unknown field 'depth'"):
        load_model(folder, TARFlow)
    for text in ("{", "[]", '{"kind": "TARFlow"}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(BitflowError, match="config.json.*damaged"):
            load_model(folder, TARFlow)


@pytest.mark.parametrize(
    "field, value",
    [("transformer", [1, 2]), ("transformer", None), ("num_blocks", "4"), ("num_blocks", 4.0)]
    + [("num_blocks", True), ("noise_std", math.nan), ("clip", math.inf), ("noise_std", "x")]
    + [("block_layers", 3), ("block_layers", [math.nan])],
)
def test_a_field_of_the_wrong_kind_is_named(field, value):
    """What JSON can hold in place of a number or an object, NaN and infinity included."""
    with pytest.raises(BitflowError, match=f"here.*{field}"):
        to_config(TARFlowConfig, {field: value}, "here")
    good = {"steps": None, "minutes": 1, "betas": [0, 0.5], "lr": 1}
    assert to_config(TrainConfig, good).betas == (0, 0.5)


def changed_config(folder, **fields):
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    saved["config"] |= fields
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize(
    "fields",
    [{"num_blocks": 10**9}, {"num_classes": 10**9}, {"image_size": 10**8, "patch_size": 1}]
    + [{"channels": 10**7}, {"transformer": {"num_layers": 10**9}}]
    + [{"transformer": {"width": 10**6, "head_dim": 1}}, {"num_blocks": 10**30}],
)
def test_a_small_config_takes_no_large_memory(tmp_path, fields):
    """The header of the weights is compared before the model is made: the peak of this process
    does not rise by as much as 100 MB (other tests have had theirs)."""
    resource = pytest.importorskip("resource")
    folder = saved(tmp_path)
    changed_config(folder, **fields)
    with contextlib.suppress(OSError):  # Linux: the peak begins anew
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BitflowError, match=str(folder)):
        load_model(folder, TARFlow)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_weights_that_are_no_floats(tmp_path, dtype):
    folder = saved(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    save_file({**tensors, name: tensors[name].to(dtype)}, path)
    says = f"{name} should be .*float32, the file has .*{str(dtype).split('.')[1]}"
    with pytest.raises(BitflowError, match=says):
        load_model(folder, TARFlow)


def test_seeds_that_no_generator_takes():
    for seed in (-1, 2**53, 2**70, 1.5, "1", None):
        with pytest.raises(BitflowError, match=f"seed is {seed!r}"):
            build(TARFlow, TARFlowConfig(image_size=8, num_blocks=1), seed)
        with pytest.raises(BitflowError, match=f"seed is {seed!r}"):
            TrainConfig(seed=seed)
    largest = TrainConfig(seed=MAX_SEED)
    step_generator(largest.seed, 10**9, microbatch=10**6)
    with pytest.raises(BitflowError, match="noise_std is nan"):
        build(TARFlow, TARFlowConfig(noise_std=math.nan), 0)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    """The first that does not fit is named, and not one was put in."""
    flow = new_flow()
    before = {k: t.clone() for k, t in flow.state_dict().items()}
    wrong = {k: torch.zeros_like(t) for k, t in before.items()}
    name = sorted(wrong)[-1]
    for changed in ({k: t for k, t in wrong.items() if k != name}, {**wrong, name: torch.ones(1)}):
        with pytest.raises(BitflowError, match=name):
            load_tensors(flow, changed, tmp_path)
        assert same(flow.state_dict(), before)
    with pytest.raises(BitflowError, match="extra"):
        load_tensors(flow, {**wrong, "extra": torch.ones(1)}, tmp_path)


def test_a_half_written_checkpoint_is_not_seen(tmp_path, digits):
    cfg = TrainConfig(steps=3, batch_size=16, log_every=1, checkpoint_every=6)
    train(small_flow(side=8, num_classes=10), forward_loss, digits[:40], cfg, tmp_path)
    (tmp_path / "checkpoints" / ".step-00000009.part").mkdir()
    (tmp_path / "checkpoints" / ".step-00000009.part" / "config.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "step-00000003"


def test_checkpoints_are_sorted_by_number(tmp_path):
    for step in ("00000500", "99999999", "100000000", "later"):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == "step-100000000"


def test_configs_come_back_from_json():
    cfg = TrainConfig(steps=77, betas=(0.8, 0.9), num_microbatches=2)
    flow = replace(small_flow(modern=True).cfg, block_layers=(1, 2, 1))
    for c in (cfg, flow):
        assert to_config(type(c), json.loads(json.dumps(dataclasses.asdict(c)))) == c
    for wrong, says in (({"steps": "many"}, "TrainConfig"), ({"stepz": 3}, "'stepz'")):
        with pytest.raises(BitflowError, match=says):
            to_config(TrainConfig, wrong)
    with pytest.raises(BitflowError, match="somewhere"):
        to_config(TrainConfig, ["steps"], "somewhere")


def test_fields_of_earlier_versions_are_read():
    old = {"pieces": 4, "checkpointing": True, "lr": 0.1}
    cfg = to_config(TrainConfig, old)
    assert (cfg.num_microbatches, cfg.activation_checkpointing, cfg.lr) == (4, True, 0.1)
    assert modern_fields({"prior_var": False, "clip": 0.0}) == {"clip": 0.0}
    assert to_config(TARFlowConfig, {"prior_var": False}) == TARFlowConfig()
    with pytest.raises(BitflowError, match="'prior_var'"):
        to_config(TARFlowConfig, {"prior_var": True})


def test_tensors_of_earlier_versions_are_read(tmp_path):
    """G's projections were called heads; a name that only ends so stays."""
    G = small_reverse(new_flow())
    folder = saved(tmp_path, G)
    path = folder / "model.safetensors"
    new = load_file(path)
    old = {k.replace("projections.", "heads."): t for k, t in new.items()}
    assert old.keys() != new.keys()
    save_file({**old, "fore.overheads.w": torch.zeros(1)}, path)
    assert read_tensors(path).keys() == {*new, "fore.overheads.w"}
    save_file(old, path)
    assert same(load_model(folder, ReverseModel).state_dict(), new)


def test_models_depend_on_the_seed_alone():
    cfg = TARFlowConfig(image_size=8, num_blocks=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (build(TARFlow, cfg, seed).state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c) and torch.equal(torch.get_rng_state(), state)
    assert num_parameters(torch.nn.Linear(3, 2)) == 8


def test_a_device_that_is_not_there_is_named():
    assert find_device("cpu") == "cpu" and find_device() in ("cpu", "cuda", "mps")
    with pytest.raises(BitflowError, match="'tpu'"):
        find_device("tpu")


def test_one_weight_for_all_distances_is_read_as_one_for_each():
    """Earlier versions gave one weight for all, 0 for none."""
    old = {"feature_weight": 3.0, "features": ["digits", "stlpips-alex"]}
    new = {"features": ["digits", "stlpips-alex"], "feature_weights": [3.0, 3.0]}
    assert modern_fields(old) == modern_fields(new) == new
    old["feature_weight"] = 0.0
    assert modern_fields(old) == {"features": [], "feature_weights": []}


def test_matrices_as_bytes_come_back_nearly_as_they_were(tmp_path):
    """`torch.int8`: half of bfloat16, and no weight moves by more than half a step of its row."""
    flow = small_flow()
    save_model(flow, tmp_path / "small", dtype=torch.int8)
    save_model(flow, tmp_path / "half", dtype=torch.bfloat16)
    back = load_model(tmp_path / "small", TARFlow).state_dict()
    for name, t in flow.state_dict().items():
        step = t.abs().amax(-1, keepdim=True) / 127 if t.ndim == 2 else t.abs() / 64
        assert back[name].dtype == torch.float32, name
        assert ((back[name] - t).abs() <= 0.501 * step).all(), name
    weights = load_file(tmp_path / "small" / "model.safetensors")
    matrices = [name for name, t in weights.items() if t.dtype == torch.int8]
    assert matrices and all(weights[f"{name}.scale"].ndim == 1 for name in matrices)


def test_a_scale_that_does_not_fit_is_refused(tmp_path):
    """Too many rows, or a scale for what is not stored as bytes."""
    save_model(small_flow(), tmp_path / "m", dtype=torch.int8)
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    matrix = next(name for name, t in weights.items() if t.dtype == torch.int8)
    for bad in (torch.ones(len(weights[matrix]) + 1), weights[f"{matrix}.scale"][:, None]):
        save_file({**weights, f"{matrix}.scale": bad}, path)
        with pytest.raises(BitflowError, match="do not fit"):
            load_model(tmp_path / "m", TARFlow)
    save_file({**weights, matrix: weights[matrix].float()}, path)
    with pytest.raises(BitflowError, match="do not fit"):
        load_model(tmp_path / "m", TARFlow)


def test_rows_of_zeros_survive_as_bytes():
    """A projection that starts at zero has no largest weight."""
    stored = as_bytes("w", torch.zeros(3, 4))
    assert torch.equal(from_bytes(stored)["w"], torch.zeros(3, 4))


def test_numbers_that_no_tensor_has_are_refused():
    with pytest.raises(BitflowError, match="channels is 10+, more than a size"):
        to_config(TARFlowConfig, {"channels": 10**30})
