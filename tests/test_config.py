"""Presets: their way to a file and back, what is refused, and what they cost."""

import json
import re
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from bitflow_edu import pipeline
from bitflow_edu.budget import (
    against_published,
    budget_of,
    flow_step,
    images_per_hour,
    on_meta,
    pass_flops,
    step_cost,
)
from bitflow_edu.cli import main
from bitflow_edu.config import (
    INFERRED,
    PAIRS,
    PRESETS,
    as_tree,
    check_preset,
    find_preset,
    read_preset,
    split_fields,
    to_words,
    with_strategy,
    with_words,
    write_preset,
)
from bitflow_edu.data import BitflowError, load_data
from bitflow_edu.reverse_model import ReverseModel
from bitflow_edu.tarflow import TARFlow, nll_per_dim

BASE, SMOKE = find_preset("mnist-mini"), ["--preset", "mnist-mini-smoke"]


def refused(argv, capsys, *words):
    """The command fails as a mistake should: code 2, a sentence on stderr with all the words."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("bitflow: ") and len(said.splitlines()) <= 2
    for word in words:
        assert str(word) in said, f"{word!r} is not in: {said}"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_to_yaml_and_back(name, tmp_path):
    """Equal whatever it is laid on: a pair or a flow alone."""
    preset, path = check_preset(find_preset(name)), tmp_path / "p.yaml"
    write_preset(preset, path)
    assert read_preset(path, BASE) == preset
    assert read_preset(path, find_preset("mnist-glow")) == preset
    assert preset.name == name and not [p for p in tmp_path.iterdir() if p != path]


@pytest.mark.parametrize("name", PAIRS)
def test_the_smoke_twin_has_the_same_kinds_of_parts(name):
    """Sizes and budgets differ, everything else does not; and it is small."""
    big, twin = (to_words(as_tree(find_preset(n))) for n in (name, f"{name}-smoke"))
    assert big.keys() == twin.keys()
    sizes = "name num_samples image_size num_classes num_blocks width num_layers head_dim steps "
    sizes += "batch_size lr ema log_every sample_every checkpoint_every compile pieces"
    different = {field for field in big if big[field] != twin[field]}
    assert {field.rpartition(".")[2] for field in different} <= set(sizes.split())
    assert "data.name" not in different
    p = find_preset(f"{name}-smoke")
    assert p.train_forward.steps == p.train_reverse.steps == 30
    assert pipeline.num_parameters(on_meta(TARFlow, p.forward)) < 300_000
    assert p.forward.num_tokens <= 64


def test_the_twin_of_the_embedded_digits_trains(digits, tmp_path):
    """A preset with clipping and modern blocks trains as a pair, through the same code."""
    p, changed = find_preset("imagenet64-smoke"), {}
    for part in ("forward", "reverse"):
        changed[part] = replace(getattr(p, part), channels=1, num_classes=10)
        train = getattr(p, f"train_{part}")
        changed[f"train_{part}"] = replace(train, steps=2, batch_size=4, precision="fp32")
    p = replace(p, **changed)
    flow = pipeline.train_forward(p, digits[:8], tmp_path / "f")
    reverse = pipeline.train_reverse(p, flow, digits[:8], tmp_path / "g")
    assert all(t.isfinite().all() for t in reverse.parameters())


def test_latents_say_how_they_are_made():
    for name in ("imagenet256-b2", "imagenet256-xl2-smoke"):
        cfg = find_preset(name).data
        assert cfg.channels == 4
        with pytest.raises(BitflowError, match="AutoencoderKL"):
            load_data(cfg)
    with pytest.raises(BitflowError, match="4 channels"):
        replace(BASE.data, channels=4)


def leaves(cfg, prefix=""):
    """The dotted names of all fields of a dataclass and of those in it."""
    names = []
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if is_dataclass(value):
            names += leaves(value, f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def test_every_field_of_every_dataclass_can_be_given():
    """What `to_words` lists is the whole tree, and each field takes its own value back."""
    preset = find_preset("imagenet256-b2")
    known = to_words(as_tree(preset))
    assert list(known) == leaves(preset) and len(known) > 70
    assert with_words(preset, known) == preset


GIVEN = {
    "train_forward.lr": ["1e-3"],
    "train_forward.steps": ["None"],
    "train_forward.minutes": ["2.5"],
    "reverse.denoise": ["False"],
    "objective.depth_weights": ["1", "0", "0", "0.5"],
    "forward.block_layers": ["4", "1", "1", "1"],
    "num_samples": ["7"],
    "objective.features": ["digits"],
}
GIVEN_YAML = """
train_forward: {lr: 1e-3, steps: null, minutes: 2.5}
reverse: {denoise: no}
objective: {depth_weights: [1, 0, 0, 0.5]}
forward: {block_layers: [4, 1, 1, 1]}
num_samples: 7
"""


def test_types(tmp_path):
    changed = with_words(BASE, GIVEN)
    train = changed.train_forward
    assert (train.lr, train.steps, train.minutes, changed.num_samples) == (1e-3, None, 2.5, 7)
    assert changed.reverse.denoise is False
    assert changed.objective.depth_weights == (1.0, 0.0, 0.0, 0.5)
    assert changed.forward.block_layers == (4, 1, 1, 1)
    (tmp_path / "p.yaml").write_text(GIVEN_YAML)
    assert read_preset(tmp_path / "p.yaml", BASE) == changed
    assert BASE == find_preset("mnist-mini"), "the original is as it was"


@pytest.mark.parametrize(
    "field,words,says",
    [
        ("forward.transformer.widht", ["256"], "did you mean forward.transformer.width"),
        ("forward.widht", ["256"], "did you mean forward.transformer.width"),
        ("foward.patch_size", ["2"], "did you mean forward.patch_size"),
        ("train.lr", ["1"], "did you mean train_"),
        ("num_sample", ["1"], "did you mean num_samples"),
        ("forward.transformer.width", ["wide"], "wide"),
        ("forward.transformer.width", ["100"], "no multiple of head_dim"),
        ("forward.transformer.width", ["1.5"], "1.5"),
        ("forward.patch_size", ["5"], "does not divide"),
        ("forward.patch_size", ["2"], "reverse.patch_size is 4"),
        ("forward.num_blocks", ["8"], "reverse.num_blocks is 4"),
        ("data.image_size", ["8"], "forward.image_size is 16"),
        ("reverse.num_classes", ["9"], "forward.num_classes is 10"),
        ("data.name", ["mnits"], "mnits"),
        ("objective.strategy", ["hidden-distillation"], "reverse.token_states"),
        ("objective.strategy", ["osmosis"], "osmosis"),
        ("objective.depth_weights", ["1", "2"], "num_blocks 4"),
        ("train_forward.betas", ["0.9"], "2 values"),
        ("train_forward.steps", [], "Missing value"),
        ("train_forward.minutes", ["3"], "not both"),
        ("reverse.denoise", ["maybe"], "maybe"),
    ],
)
def test_unknown_and_contradictory_fields_are_refused(field, words, says):
    with pytest.raises(BitflowError, match=re.escape(says)) as e:
        with_words(BASE, {field: words})
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text,says",
    [
        ("forward: {widht: 3}", "forward.transformer.width"),
        ("forward: [", "no YAML"),
        ("- 1", "no fields"),
        ("", "no fields"),
        ("data: 5", "data.name"),
        ("1: 2", "'1'"),
        ("num_samples: {a: 1}", "num_samples"),
        ("num_samples: 1\nnum_samples: 2", "given twice"),
        ("reverse: null", "train_reverse"),
        ("forward: {kind: glow}", "image_size"),
        ("forward: {kind: glow, image_size: 16}", "only a TARFlow"),
        ("train_forward: {steps: many}", "many"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
        ("? [1, 2]\n: 3", "no YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, says):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(BitflowError, match=re.escape(says)):
        read_preset(path, BASE)


def test_files_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "nowhere.yaml", tmp_path / "binary"):
        with pytest.raises(BitflowError, match="no YAML"):
            read_preset(path, BASE)
    with pytest.raises(BitflowError, match="cannot write"):
        write_preset(BASE, tmp_path / "binary" / "p.yaml")


def test_words_about_fields_are_told_from_a_commands_own():
    words = "train forward --train-forward.betas 0.9 -1 --steps 3 --data.image-size=8 x"
    rest, given = split_fields([*words.split(), "--num-samples", "5"])
    assert rest == ["train", "forward", "--steps", "3", "x"]
    assert given.pop("train_forward.betas") == ["0.9", "-1"]
    assert given == {"data.image_size": ["8"], "num_samples": ["5"]}


def test_a_run_is_repeated_from_the_file_it_leaves(tmp_path, capsys):
    """Fields on the command line reach the run; its preset.yaml gives the same weights again."""
    a, b = tmp_path / "a", tmp_path / "b"
    asked = "--steps 3 --seed 5 --forward.transformer.num-layers 2 --train-forward.lr=1e-3".split()
    train = ["train", "forward"]
    assert main([*train, *SMOKE, *asked, "--name", "mine", "--out", str(a)]) == 0
    assert main([*train, "--config", str(a / "preset.yaml"), "--out", str(b)]) == 0
    first, again = (json.loads((run / "run.json").read_text()) for run in (a, b))
    assert first == again and first["preset"] == "mine"
    assert first["train"]["lr"] == 1e-3 and first["train"]["seed"] == 5
    one, other = (next(run.glob("checkpoints/*/model.safetensors")) for run in (a, b))
    assert one.read_bytes() == other.read_bytes()
    assert (a / "preset.yaml").read_text() == (b / "preset.yaml").read_text()
    twice = [*train, *SMOKE, "--steps", "3", "--train-forward.steps", "4", "--out", tmp_path / "c"]
    refused(twice, capsys, "--steps 3", "--train-forward.steps")
    assert not (tmp_path / "c").exists()


def test_the_command_line_in_a_results_file_holds_the_fields(tmp_path):
    import shlex

    from bitflow_edu.cli import Evaluate, command_line, parse

    words = "--config p.yaml --num-samples 30 --forward runs/f --train-forward.betas 0.9 0.99"
    args = parse(["evaluate", *SMOKE, *words.split()])
    assert isinstance(args, Evaluate) and str(args.forward) == "runs/f"
    assert parse(shlex.split(command_line(args))[1:]) == args


def test_info_writes_reads_and_lists(tmp_path, capsys):
    path = tmp_path / "new" / "p.yaml"
    clipped = ["--preset", "imagenet256-b2-smoke", "--forward.clip", "2"]
    assert main(["info", *clipped, "--yaml", str(path)]) == 0
    assert read_preset(path, BASE).forward.clip == 2
    assert main(["info", "--config", str(path)]) == 0
    assert "imagenet256-b2-smoke" in capsys.readouterr().out
    assert main(["info", "--config", str(path), "--fields"]) == 0
    said = capsys.readouterr().out
    for words in ("--forward.transformer.width INT", "features a token", "default: 64"):
        assert words in said
    refused(["info", "--yaml", path], capsys, "exists already", "--yaml")
    refused(["info", "--config", tmp_path / "none.yaml"], capsys, "none.yaml", "--yaml")
    meant = "did you mean forward.transformer.width"
    refused(["info", "--forward.transformer.widht", "3"], capsys, meant, "--fields")
    refused(["info", "--mfu", "1.5"], capsys, "--mfu 1.5")
    refused(["info", "--peak-tflops", "0"], capsys, "--peak-tflops 0")
    sample = ["sample", "--checkpoint", "x", "--data.image-size", "3"]
    refused(sample, capsys, "--data.image-size", "sample")


def test_published_sizes():
    """F-B/2 120M, F-XL/2 690M, G-B/2 133M (arXiv 2512.10953), within 3 %; from shapes alone."""
    found = {}
    for name in ("imagenet256-b2", "imagenet256-xl2"):
        p = find_preset(name)
        F, G = on_meta(TARFlow, p.forward), on_meta(ReverseModel, p.reverse)
        params = {"F": pipeline.num_parameters(F), "G": pipeline.num_parameters(G)}
        for model, _, published, _, right in against_published(p, params):
            found[name, model] = published, right
        assert name in INFERRED
    assert found == {
        ("imagenet256-b2", "F"): (120e6, True),
        ("imagenet256-b2", "G"): (133e6, True),
        ("imagenet256-xl2", "F"): (690e6, True),
    }
    wider = against_published(find_preset("imagenet256-b2"), {"F": 124e6, "G": 133e6})
    assert not wider[0][-1] and wider[1][-1]


def test_info_of_the_largest(capsys):
    """Size, assumptions and what is inferred are said; twice the utilisation, half the hours."""
    hours, sizes = [], ["256 of 16 values", "published F: 690M", "within 3 %", "activations"]
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


def test_flops_on_shapes_are_those_of_real_models():
    """Training step and every method; also where blocks differ, and for a G with token states."""
    p = find_preset("cifar10-smoke")
    forward = replace(p.forward, image_size=8, block_layers=(2, 1))
    deep = replace(p, forward=forward, reverse=replace(p.reverse, image_size=8))
    tokens = with_strategy(deep, "hidden-distillation")
    for preset in (find_preset("mnist-mini-smoke"), deep, tokens):
        F = pipeline.build(TARFlow, preset.forward, 0)
        G = pipeline.build(ReverseModel, preset.reverse, 0)
        shadow = on_meta(TARFlow, preset.forward)
        derived = pass_flops(shadow, on_meta(ReverseModel, preset.reverse))
        for row in pipeline.METHODS:
            assert derived[row] == pipeline.flops(row, F, G), row
        x = torch.zeros(1, F.cfg.channels, F.cfg.image_size, F.cfg.image_size)
        real = pipeline.count_flops(lambda F=F, x=x: nll_of(F, x).backward())
        assert step_cost(shadow, flow_step).flops == real


def nll_of(F, x):
    return nll_per_dim(F(x, torch.zeros(len(x), dtype=torch.int64)))


def test_memory_of_a_step():
    """Grows with layers; guidance in training runs G twice; a real step holds that memory."""
    p = find_preset("mnist-mini-smoke")
    F = step_cost(on_meta(TARFlow, p.forward), flow_step)
    deeper = replace(p.forward, transformer=replace(p.forward.transformer, num_layers=2))
    more = step_cost(on_meta(TARFlow, deeper), flow_step)
    assert F.kept > 2 * 16 * 64 * 4 * 6 and 1.5 < more.kept / F.kept < 2.1
    assert more.scores == 2 * F.scores
    guided = replace(p, reverse=replace(p.reverse, max_guidance=3.0))
    once, twice = budget_of(p).reverse, budget_of(guided).reverse
    assert 1.4 < twice.flops / once.flops < 2 < 1.2 * twice.kept / once.kept
    flow, held = pipeline.build(TARFlow, p.forward, 0), {}

    def keep(t):
        return held.setdefault(t.untyped_storage().data_ptr(), t)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        nll_of(flow, torch.zeros(8, 1, 16, 16))
    own = {q.data_ptr() for q in flow.parameters()}
    real = sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in own)
    assert 8 * (F.kept + F.scores) == pytest.approx(real, rel=0.25)


def test_hours():
    assert images_per_hour(10**12, 1.0, 0.5) == 1800
