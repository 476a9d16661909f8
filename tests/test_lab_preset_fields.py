"""Fields of a preset: as words, in a file and back, and what is refused."""

import re
from dataclasses import fields, is_dataclass

import pytest

from bitflow_edu.io.files import BitflowError
from bitflow_edu.lab.preset_fields import (
    as_tree,
    read_preset,
    split_fields,
    to_words,
    to_yaml,
    with_words,
    write_preset,
)
from bitflow_edu.lab.presets import PRESETS, check_preset, find_preset

BASE = find_preset("mnist-mini")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_to_yaml_and_back(name, tmp_path):
    """Equal whatever it is laid on: a pair or a flow alone."""
    preset, path = check_preset(find_preset(name)), tmp_path / "p.yaml"
    write_preset(preset, path)
    assert read_preset(path, BASE) == preset
    assert read_preset(path, find_preset("mnist-glow")) == preset
    assert preset.name == name and not [p for p in tmp_path.iterdir() if p != path]


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


LAUGHS = [
    "a0: &a0 [x, x]",
    *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
]
MERGES = ["m0: &m0 {x: 1}", *(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 25))]
BAD = [
    ("forward: {widht: 3}", "forward.transformer.width"),
    ("forward: [", "not a YAML"),
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
    ("!!python/object/apply:os.getcwd []", "not a YAML"),
    ("? [1, 2]\n: 3", "not a YAML"),
]
MUCH = [
    ("\n".join(LAUGHS), "10000 values"),
    ("\n".join(MERGES), "10000 values"),
    ("a: &a [*a]", "10000 values"),
    ("[" * 5000, "not a YAML"),
    ("x: " + "1" * 2_000_000, "2000003 bytes"),
    ("when: 2020-13-45", "not a YAML"),
    ("forward: {noise_std: .nan}", "noise_std is nan"),
    ("train_forward: {seed: -1}", "seed is -1"),
    ("train_forward: {lr: .inf}", "lr is inf"),
    ("forward: {transformer: [1, 2]}", "forward.transformer"),
]  # or no numbers


@pytest.mark.parametrize("text, says", BAD + MUCH)
def test_bad_files_are_refused(tmp_path, text, says):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(BitflowError, match=re.escape(says)):
        read_preset(path, BASE)


def test_a_few_aliases_are_fine(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("train_forward: &t {steps: 7, lr: 0.5}\ntrain_reverse: *t\n")
    preset = read_preset(path, BASE)
    assert preset.train_reverse.lr == 0.5 and preset.train_forward.steps == 7


def test_files_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "nowhere.yaml", tmp_path / "binary"):
        with pytest.raises(BitflowError, match="not a YAML"):
            read_preset(path, BASE)
    with pytest.raises(BitflowError, match="cannot write"):
        write_preset(BASE, tmp_path / "binary" / "p.yaml")


def test_words_about_fields_are_told_from_a_commands_own():
    words = "train forward --train-forward.betas 0.9 -1 --steps 3 --data.image-size=8 x"
    rest, given = split_fields([*words.split(), "--num-samples", "5"])
    assert rest == ["train", "forward", "--steps", "3", "x"]
    assert given.pop("train_forward.betas") == ["0.9", "-1"]
    assert given == {"data.image_size": ["8"], "num_samples": ["5"]}


EARLIER = {
    "train_forward.pieces": ["2"],
    "train_reverse.checkpointing": ["True"],
    "forward.prior_var": ["False"],
}


def test_fields_of_earlier_versions_keep_their_meaning():
    preset = with_words(BASE, EARLIER)
    assert preset.train_forward.num_microbatches == 2
    assert preset.train_reverse.activation_checkpointing
    assert preset.forward == BASE.forward
    with pytest.raises(BitflowError, match="prior_var"):
        with_words(BASE, {"forward.prior_var": ["True"]})


@pytest.mark.parametrize("base", ["mnist-mini", "mnist-glow", "imagenet64"])
def test_files_of_earlier_versions_are_read(tmp_path, base):
    """Old names of fields, and one that is gone, whatever the file is laid on."""
    path, text = tmp_path / "p.yaml", to_yaml(BASE)
    text = text.replace("num_microbatches: 1", "pieces: 2")
    text = text.replace("activation_checkpointing: false", "checkpointing: true")
    path.write_text(text.replace("  clip:", "  prior_var: false\n  clip:"))
    assert {"pieces", "checkpointing", "prior_var"} <= set(re.findall(r"\w+", path.read_text()))
    preset = read_preset(path, find_preset(base))
    assert preset.forward == BASE.forward and preset.train_forward.num_microbatches == 2
    assert preset.train_reverse.activation_checkpointing
