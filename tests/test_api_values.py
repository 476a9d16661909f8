"""What public functions take: wrong shapes, types, ranges and models are refused by all of them."""

from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from inspect import isclass, isfunction, signature
from typing import NamedTuple

import pytest
import torch
from torch import nn

from bitflow_edu import bijections, coupling, data, distances, editing, evaluation
from bitflow_edu import inverse_strategies as strategies
from bitflow_edu.autoregressive import IAF, MADE, MAF, one_by_one
from bitflow_edu.exact_inverse import (
    check_noise,
    exact_inverse,
    exact_trajectory,
    invert_block,
    invert_block_uncached,
    round_trip_error,
    score_denoise,
    start_decoding,
    to_images,
)
from bitflow_edu.excursions import jacobi, native
from bitflow_edu.excursions.compiled import compile_blocks, pack
from bitflow_edu.excursions.glow import CouplingConfig, CouplingFlow, Flatten, Split
from bitflow_edu.excursions.rounding import check_invertible
from bitflow_edu.excursions.toys import TOYS, twist
from bitflow_edu.guidance import guided_pass
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.lab import sampling
from bitflow_edu.reverse_model import ReverseModel, one_pass, per_block, sample_noise
from bitflow_edu.scale import autoencoder
from bitflow_edu.tarflow import ClassEmbedding, TARFlow, check_input, forward_loss
from bitflow_edu.transformer import Transformer, TransformerConfig, find_compiler, rotary_angles
from conftest import small_flow, small_reverse, small_transformer


class Looked(NamedTuple):
    """An argument that is looked at: its kind (see `WRONG`), and a good value."""

    kind: str
    good: object


N, K, RANDOM = 4, 3, torch.Generator().manual_seed(0)
F = small_flow(num_classes=K)
G = small_reverse(F)
C, S, T, D = F.cfg.channels, F.cfg.image_size, F.cfg.num_tokens, F.cfg.token_dim
X, OTHER = (torch.randn(N, C, S, S, generator=RANDOM).clamp(-1, 1) for _ in range(2))
Z, LABELS = torch.randn(N, T, D, generator=RANDOM), torch.tensor([0, 2, -1, 1])
KNOWN, PIXELS = LABELS.clamp(min=0), data.to_pixels(X)
MASK = torch.rand(N, S, S, generator=RANDOM) > 0.5
POINTS, FEATURES = (torch.randn(9, n, generator=RANDOM) for n in (2, 5))
EVEN, LATENTS = (torch.randn(N, 4, n, n, generator=RANDOM) for n in (2, 3))
SCORES = torch.randn(9, generator=RANDOM)
GLOW = build(CouplingFlow, CouplingConfig("nice", S, C, K, steps=1, width=8), 0).eval()
JUDGE = build(evaluation.Classifier, evaluation.ClassifierConfig(S, C, K, width=8), 0).eval()
NET = distances.FeatureNet(distances.FeatureNetConfig(C, K, width=4)).eval()
STACK = Transformer(small_transformer(modern=True), 3, causal=True).eval()
WIDE = TransformerConfig(16, 1, 16)
WIDE_F = build(TARFlow, replace(F.cfg, transformer=WIDE), 0).eval()
WIDE_G = build(ReverseModel, replace(G.cfg, transformer=WIDE), 0).eval()
WITH_COMPILER = find_compiler() is not None


class Encoder(nn.Linear):
    """Something with an autoencoder's config: what it makes of latents does not matter here."""

    def __init__(self):
        super().__init__(1, 1)
        shape = dict(block_out_channels=(8, 8), latent_channels=4, scaling_factor=1.0)
        self.config = type("Config", (), shape)()

    def encode(self, x):
        """Means and deviations of 1."""
        ones = torch.ones(len(x), 4, x.shape[2] // 2, x.shape[3] // 2)
        moments = type("Moments", (), dict(mean=ones, std=ones))
        return type("Encoded", (), dict(latent_dist=moments))()

    def decode(self, x):
        """Three of the channels."""
        return type("Decoded", (), dict(sample=x[:, :3]))()


def integers(t):
    """The same numbers in types that no model takes."""
    return {"int64": t.long(), "uint8": t.to(torch.uint8), "bool": t > 0, "list": t.tolist()}


def ranks(t):
    """An axis too few, one too many."""
    return {"an axis less": t[0], "an axis more": t[None]}


def sizes(t):
    """Every axis but the first of another size."""
    found = {}
    for axis in range(1, t.ndim):
        found[f"axis {axis} longer"] = torch.cat([t, t], axis)
        if t.shape[axis] > 1:
            found[f"axis {axis} of size 1"] = t.narrow(axis, 0, 1)
    return found


def label_types(c):
    """Labels of another number, shape or type."""
    found = {"one": c[:1], "more": torch.cat([c, c]), "a column": c[:, None], "a scalar": c[0]}
    return found | {"float": c.float(), "bool": c > 0, "an int": 1, "a list": c.tolist()}


def labels(c):
    """And of another range."""
    found = {"far above": c + 100, "above": torch.full_like(c, K), "below": c - 100}
    return label_types(c) | found | {"minus two": torch.full_like(c, -2)}


def masks(m):
    """Masks of another type or shape."""
    found = {"float": m.float(), "uint8": m.to(torch.uint8), "an axis more": m[None]}
    return found | {"smaller": m[..., :-1], "fewer": m[:2], "a row": m[0, 0]}


def features(f):
    """What no distance can be computed from."""
    found = {"an axis less": f[0], "one": f[:1], "none": f[:0], "a list": f.tolist()}
    return found | {"NaN": f / 0 * 0, "infinite": f / 0}


WRONG = {  # kind of argument → (good value → name → wrong values)
    "images": lambda x: ranks(x) | sizes(x) | integers(x),
    "any images": lambda x: ranks(x) | integers(x),
    "finite images": lambda x: ranks(x) | sizes(x) | integers(x) | {"NaN": x / 0 * 0},
    "tokens": lambda z: ranks(z) | sizes(z) | integers(z),
    "noise": lambda z: ranks(z) | sizes(z) | integers(z) | {"double": z.double()},
    "points": lambda p: ranks(p) | sizes(p) | integers(p),
    "floats": integers,
    "shape": ranks,
    "same shape": lambda t: ranks(t) | {"fewer": t[:1]},
    "labels": labels,
    "label alone": lambda c: {k: v for k, v in label_types(c).items() if k not in ("one", "more")},
    "no -1": lambda c: labels(c) | {"minus one": torch.full_like(c, -1)},
    "label types": label_types,
    "mask": masks,
    "mask alone": lambda m: {k: v for k, v in masks(m).items() if k != "fewer"},
    "pixels": lambda p: {
        "float": p / 255,
        "bool": p > 9,
        "list": p.tolist(),
        "16 bits": 257 * p.int(),
        "below 0": p.long() - 256,
    },
    "features": features,
    "scores": lambda s: {k: v for k, v in features(s).items() if k != "one"},
    "of 4 channels": lambda x: sizes(x) | integers(x),
    "F": lambda _: {"a G": G, "a coupling flow": GLOW, "a layer": nn.Linear(1, 1), "none": None},
    "G": lambda _: {"an F": F, "a layer": nn.Linear(1, 1), "none": None},
    "list": lambda states: {"too few": states[:1], "of other shapes": [t[:, :1] for t in states]},
    "config": lambda _: {"a model": F, "of a coupling flow": GLOW.cfg},
    "count": lambda _: {"minus one": -1},
    "any tokens": lambda z: ranks(z) | integers(z) | {"none": z[:0]},
    "one feature": lambda f: {k: v for k, v in features(f).items() if k != "one"},
    "moments": lambda m: {"other": (m[0][:1], m[1]), "NaN": (m[0] / 0 * 0, m[1])},
    "G or function": lambda _: {"an F": F, "a name": "G"},
    "F or coupling": lambda _: {"a G": G, "a layer": nn.Linear(1, 1)},
    "fill": lambda x: {"other channels": torch.zeros(N, 2, S, S), "more": torch.cat([x, x])},
    "rows": lambda rows: {"too few": rows[:1]},
    "sampler": lambda _: {"a name": "nosuch", "a model": G},
    "channels": lambda x: {"fewer": x[:, :3], "more": torch.cat([x, x], 1), "none": x[:0]},
    "bad pixels": lambda _: {
        "float": torch.rand(2, 3, 8, 8),
        "grey": torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        "odd": torch.zeros(2, 3, 7, 7, dtype=torch.uint8),
    },
    "w": lambda w: {"more": torch.ones(N + 1), "blocks": torch.ones(N, 9), "NaN": float("nan")},
}
TABLE = {}  # name → function and its arguments; those that are not `Looked` at are as they are


def row(name, call, **arguments):
    """Add a function to the table; what stands before a dot or a space is its public name."""
    TABLE[name] = call, arguments


def layer(name, bijection, x):
    """Add both directions of a bijection."""
    row(name, bijection, x=Looked("points", x))
    (z,) = signature(bijection.inverse).parameters
    row(f"{name}.inverse", bijection.inverse, **{z: Looked("points", bijection(x)[0].detach())})


# pixels, images and tokens
row("to_model_range", data.to_model_range, pixels=Looked("pixels", PIXELS))
row("dequantize", data.dequantize, pixels=Looked("pixels", PIXELS))
row("to_pixels", data.to_pixels, x=Looked("floats", X))
row("add_noise", data.add_noise, x=Looked("floats", X), sigma=0.1)
row("patchify", data.patchify, x=Looked("shape", X), patch_size=2)
row("unpatchify", data.unpatchify, tokens=Looked("shape", Z), patch_size=2, channels=C)
row("image_grid", data.image_grid, x=Looked("any images", X), columns=2)
row(
    "Images",
    data.Images,
    pixels=Looked("pixels", PIXELS),
    labels=Looked("label types", KNOWN),
    classes=(),
)
row("Images of a shape", data.Images, pixels=Looked("shape", PIXELS), labels=KNOWN, classes=())

# layers of flows
AFFINE, HALF = bijections.Affine(2), coupling.every_other(2)
layer("Affine", AFFINE, POINTS)
layer("Linear", bijections.Linear(2), POINTS)
layer("SoftSteps", bijections.SoftSteps(2), POINTS)
layer("Compose", bijections.Compose(bijections.Identity(), AFFINE), POINTS)
layer("Inverse", bijections.Inverse(AFFINE), POINTS)
layer("AdditiveCoupling", coupling.AdditiveCoupling(HALF, coupling.mlp(2, 2)), POINTS)
layer("AffineCoupling", coupling.AffineCoupling(HALF, coupling.mlp(2, 4)), POINTS)
layer("MAF", MAF(2, (8,)), POINTS)
layer("IAF", IAF(2, (8,)), POINTS)
row("MADE", MADE(2, (8,)), x=Looked("points", POINTS))
row("one_by_one", one_by_one, conditioner=MADE(2, (8,)), z=Looked("points", POINTS))
row("Flow", bijections.Flow(AFFINE).log_prob, x=Looked("points", POINTS))
row("fit", bijections.fit, flow=bijections.Flow(AFFINE), x=Looked("points", POINTS), steps=1)
row("check_invertible", check_invertible, bijection=AFFINE, x=Looked("points", POINTS))
row(
    "bisect",
    bijections.bisect,
    rising=torch.sinh,
    target=Looked("floats", SCORES),
    low=SCORES - 9,
    high=SCORES + 9,
)
CHANNELS = coupling.ActNorm(4).train()
CHANNELS(EVEN)
row("ActNorm", CHANNELS, x=Looked("of 4 channels", EVEN[:, :, 0, 0]))
row("Logit", coupling.Logit(), x=Looked("floats", X))
row("check_range", coupling.check_range, x=Looked("floats", X))
HALVES = Split(bijections.Compose(Flatten(2, 2, 2)), 4, 2, 8)
row("Split", HALVES, x=Looked("images", EVEN))
row("Split.inverse", HALVES.inverse, z=Looked("points", torch.randn(N, 16)))
row("Squeeze", coupling.Squeeze(), x=Looked("shape", EVEN))
row("CouplingFlow", GLOW, x=Looked("images", X))
row("CouplingFlow.inverse", GLOW.inverse, z=Looked("points", torch.randn(N, GLOW.cfg.dims)))
row("twist", twist, x=Looked("points", POINTS), amount=0.1)
row("Toy.entropy", TOYS["checkerboard"].entropy, x=Looked("points", POINTS))

# transformers, F and its inverse
BLOCK = F.blocks[0]
row("Transformer", STACK, x=Looked("tokens", torch.randn(N, T, STACK.cfg.width)))
row("rotary_angles", rotary_angles, coordinates=Looked("shape", POINTS), head_dim=8)
row("ClassEmbedding", ClassEmbedding(K, 8, 0.3), c=Looked("label alone", LABELS))
row("FlowBlock", BLOCK, x=Looked("tokens", Z), c=Looked("label types", LABELS))
row("TARFlow", F, x=Looked("images", X), c=Looked("labels", LABELS))
row("TARFlow.log_prob", F.log_prob, x=Looked("images", X), c=Looked("labels", LABELS))
row("check_input", check_input, x=Looked("images", X), cfg=F.cfg)
of_loss = dict(x=Looked("images", X), c=Looked("labels", LABELS), generator=RANDOM)
row("forward_loss", forward_loss, model=F, **of_loss)
for inverse in (invert_block, invert_block_uncached, jacobi.invert_block_jacobi):
    row(
        inverse.__name__,
        inverse,
        block=BLOCK,
        y=Looked("tokens", Z),
        c=Looked("label types", LABELS),
    )
row("start_decoding", start_decoding, block=BLOCK, c=Looked("label alone", LABELS))
of_noise = dict(model=Looked("F", F), z=Looked("noise", Z), c=Looked("labels", LABELS))
for inverse in (check_noise, exact_trajectory, exact_inverse):
    row(inverse.__name__, inverse, **of_noise)
row("jacobi_trajectory", jacobi.jacobi_trajectory, **of_noise)
row(
    "jacobi_trajectory from",
    jacobi.jacobi_trajectory,
    model=F,
    z=Z,
    c=LABELS,
    starts=Looked("list", [Z] * 3),
)
row("jacobi_inverse", jacobi.jacobi_inverse, **of_noise)
row("to_images", to_images, model=F, tokens=Looked("tokens", Z))
of_picture = dict(model=Looked("F", F), x=Looked("images", X), c=Looked("labels", LABELS))
row("round_trip_error", round_trip_error, **of_picture)
row("score_denoise", score_denoise, **of_picture)

# G
row("ReverseModel", G, z=Looked("tokens", Z), c=Looked("labels", LABELS))
of_noise = dict(model=Looked("G", G), z=Looked("noise", Z), c=Looked("labels", LABELS))
row("one_pass", one_pass, **of_noise)
row("guided_pass", guided_pass, **of_noise, w=Looked("w", 0.5))
row("per_block", per_block, w=Looked("w", 0.5), n=N, num_blocks=3, like=Z)
row(
    "sample_noise",
    sample_noise,
    cfg=Looked("config", F.cfg),
    n=Looked("count", 2),
    seed=Looked("count", 0),
)
row("check_pair", strategies.check_pair, forward_model=Looked("F", F), model=Looked("G", G))
row("reverse_loss", strategies.reverse_loss, forward_model=Looked("F", F))
row("mse", strategies.mse, a=Looked("same shape", X), b=Looked("same shape", OTHER))
of_pair = dict(trajectory=F(X, LABELS), out=G(Z, LABELS), x=Looked("same shape", X))
row("naive_distillation", strategies.naive_distillation, **of_pair)
row("hidden_alignment", strategies.hidden_alignment, **of_pair)

# metrics
row("Classifier", JUDGE, x=Looked("any images", X))
row("as_stored", evaluation.as_stored, x=Looked("any images", X))
row(
    "accuracy",
    evaluation.accuracy,
    classifier=JUDGE,
    x=Looked("any images", X),
    c=Looked("no -1", KNOWN),
)
row(
    "fd",
    evaluation.fd,
    classifier=JUDGE,
    x=Looked("any images", X),
    real=Looked("any images", OTHER),
)
row("moments", evaluation.moments, features=Looked("features", FEATURES))
two = dict(a=Looked("features", FEATURES), b=Looked("features", FEATURES + 1))
row("frechet_distance", evaluation.frechet_distance, **two)
row("kid", evaluation.kid, **two)
row(
    "polynomial_kernel", evaluation.polynomial_kernel, a=Looked("one feature", FEATURES), b=FEATURES
)
row(
    "distance_of_moments",
    evaluation.distance_of_moments,
    a=evaluation.moments(FEATURES),
    b=Looked("moments", evaluation.moments(FEATURES)),
)
row(
    "covered",
    evaluation.covered,
    queries=Looked("features", FEATURES),
    cloud=Looked("features", FEATURES),
)
row(
    "precision_recall",
    evaluation.precision_recall,
    real_features=Looked("features", FEATURES),
    fake_features=Looked("features", FEATURES),
)
row(
    "inception_score",
    evaluation.inception_score,
    probabilities=Looked("features", FEATURES.softmax(1)),
)
row(
    "feature_distance",
    distances.feature_distance(NET),
    a=Looked("same shape", X),
    b=Looked("same shape", OTHER),
)
row("FeatureNet", NET, x=Looked("any images", X))
row("as_photos", distances.as_photos, x=Looked("any images", X))

# editing
row(
    "check_edit",
    editing.check_edit,
    forward=Looked("F", F),
    x=Looked("finite images", X),
    c=Looked("labels", LABELS),
)
row(
    "encode",
    editing.encode,
    forward=Looked("F", F),
    x=Looked("finite images", X),
    c=Looked("labels", LABELS),
)
row(
    "decode",
    editing.decode,
    reverse=Looked("G or function", G),
    z=Looked("noise", Z),
    c=Looked("labels", LABELS),
)
both = dict(forward=Looked("F", F), reverse=Looked("G or function", G))
of_edit = dict(**both, x=Looked("finite images", X), c=Looked("labels", LABELS))
row("edit_class", editing.edit_class, **of_edit, to=Looked("labels", KNOWN))
row("reconstruct", editing.reconstruct, **of_edit)
row(
    "interpolate",
    editing.interpolate,
    **both,
    a=Looked("finite images", X),
    b=Looked("finite images", OTHER),
    c=Looked("labels", LABELS),
    steps=2,
)
row(
    "inpaint",
    editing.inpaint,
    **both,
    x=Looked("images", X),
    mask=Looked("mask", MASK),
    c=Looked("labels", LABELS),
    to=Looked("labels", KNOWN),
    eps=Looked("tokens", Z),
)
row(
    "paste",
    editing.paste,
    x=Looked("same shape", X),
    y=Looked("same shape", OTHER),
    mask=Looked("mask", MASK),
)
row("hide", editing.hide, x=X, mask=Looked("mask", MASK), fill=Looked("fill", OTHER))
row("token_mask", editing.token_mask, mask=Looked("mask alone", MASK), patch_size=2)
row("influence", editing.influence, fn=torch.sin, tokens=Looked("any tokens", Z))
row(
    "roc_curve",
    editing.roc_curve,
    inside=Looked("scores", SCORES),
    outside=Looked("scores", SCORES),
)
row("auc", editing.auc, inside=Looked("scores", SCORES), outside=Looked("scores", SCORES))

# programs
if WITH_COMPILER:
    of_native = dict(z=Looked("noise", Z), c=Looked("labels", LABELS))
    row("NativeInverse", native.NativeInverse(WIDE_F), **of_native)
    row("NativePass", native.NativePass(WIDE_G), **of_native)
row("NativeInverse of", native.NativeInverse, model=Looked("F", WIDE_F))
row("NativePass of", native.NativePass, model=Looked("G", WIDE_G))
row("compile_blocks", compile_blocks, model=Looked("F", F))
row("pack", pack, model=F, rows=Looked("rows", [9, 9, 9]))

# samplers and latents
ONE_PASS = sampling.one_pass_sampler(G)
row("exact_sampler", sampling.exact_sampler, F=Looked("F or coupling", F))
row("denoised", sampling.denoised, sampler=ONE_PASS, F=Looked("F", F))
row("one_pass_sampler", sampling.one_pass_sampler, G=Looked("G", G))
row("guided_sampler", sampling.guided_sampler, G=Looked("G", G), w=0.5)
row("Sampler", ONE_PASS, z=Looked("noise", Z), c=Looked("labels", LABELS))
row(
    "draw",
    sampling.draw,
    sampler=Looked("sampler", ONE_PASS),
    z=Looked("noise", Z),
    c=Looked("labels", LABELS),
)
row("grid_labels", sampling.grid_labels, cfg=F.cfg, n=Looked("count", 2))
row("noise_for", sampling.noise_for, cfg=GLOW.cfg, n=Looked("count", 2), seed=Looked("count", 0))
row("to_picture", sampling.to_picture, x=Looked("any images", X))
row("preview", autoencoder.preview, x=Looked("any images", LATENTS))
row("decode_all", autoencoder.decode_all, vae=Encoder(), x=Looked("any images", LATENTS))
row("decode_all of channels", autoencoder.decode_all, vae=Encoder(), x=Looked("channels", LATENTS))
row(
    "posterior_moments",
    autoencoder.posterior_moments,
    vae=Encoder(),
    pixels=Looked("bad pixels", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
)
row(
    "decoded",
    autoencoder.decoded(strategies.mse, Encoder(), checkpoint=False),
    a=Looked("same shape", LATENTS),
    b=Looked("same shape", LATENTS),
)


def good(arguments):
    """The good values of a row."""
    return {k: v.good if isinstance(v, Looked) else v for k, v in arguments.items()}


def wrong_values(looked):
    """Name → a wrong value."""
    return WRONG[looked.kind](looked.good)


def cases():
    """(function, argument, name of a wrong value) of the whole table."""
    for name, (_, arguments) in TABLE.items():
        for argument, value in arguments.items():
            if isinstance(value, Looked):
                yield from ((name, argument, wrong) for wrong in wrong_values(value))


@pytest.mark.parametrize("name", TABLE)
def test_what_is_right_is_taken(name):
    call, arguments = TABLE[name]
    call(**good(arguments))


@pytest.mark.parametrize("name,argument,wrong", list(cases()))
def test_what_is_wrong_is_refused_in_words(name, argument, wrong):
    call, arguments = TABLE[name]
    value = wrong_values(arguments[argument])[wrong]
    with pytest.raises(BitflowError):
        call(**{**good(arguments), argument: value})


def same(a, b):
    """Whether two results agree, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(u, v) for u, v in zip(a, b))
    return (
        same(tuple(vars(a).values()), tuple(vars(b).values())) if hasattr(a, "__dict__") else a == b
    )


INTEGERS = {"labels", "no -1", "label types", "label alone"}
LABELLED = [
    name
    for name, (_, arguments) in TABLE.items()
    if any(isinstance(v, Looked) and v.kind in INTEGERS for v in arguments.values())
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int8])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_every_integer_type_give_what_int64_gives(name, dtype):
    call, arguments = TABLE[name]
    small, large = {}, {}
    for k, v in arguments.items():
        kind, value = (v.kind, v.good) if isinstance(v, Looked) else (None, v)
        if kind in INTEGERS:
            value = value.clamp(min=0)
        small[k], large[k] = (value.to(dtype) if kind in INTEGERS else value), value
    if "generator" in small:  # both draw the same noise
        small["generator"], large["generator"] = (torch.Generator().manual_seed(1) for _ in "ab")
    assert same(call(**small), call(**large))


def emptied(value):
    """A batch without anything in it; other values as they are."""
    if isinstance(value, list):
        return [emptied(v) for v in value]
    return value[:0] if isinstance(value, torch.Tensor) and value.ndim else value


@pytest.mark.parametrize("name", TABLE)
def test_an_empty_batch_gives_an_empty_result_or_is_refused(name):
    call, arguments = TABLE[name]
    with suppress(BitflowError):
        found = call(**{k: emptied(v) for k, v in good(arguments).items()})
        for t in found if isinstance(found, (list, tuple)) else [found]:
            assert not isinstance(t, torch.Tensor) or not t.isnan().any()
            assert not isinstance(t, float) or t == t, "a mean of nothing is NaN"


# Public names that take tensors or models and stand in no row, and why
PARTS = "the inside of a layer; what calls it has looked"
ELEMENTWISE = "values of any shape"
ELSEWHERE = "tested where it is defined"
LEFT_OUT = {
    **dict.fromkeys(("attend", "rotate", "RMSNorm", "SwiGLU", "Layer", "ReverseBlock"), PARTS),
    **dict.fromkeys(("decode_step", "invert_blocks", "with_labels", "effnet_maps"), PARTS),
    **dict.fromkeys(("log_scale_and_shift", "PackedLinear"), PARTS),
    **dict.fromkeys(("safe_exp", "bounded", "to_bits", "rms", "imagenet_units"), ELEMENTWISE),
    **dict.fromkeys(("Identity",), ELEMENTWISE),
    **dict.fromkeys(("full_jacobian", "jacobian_check", "bits_per_dim"), ELSEWHERE),
    **dict.fromkeys(("uniform_noise_loss", "in_batches", "check_features"), ELSEWHERE),
    **dict.fromkeys(("guided_samplers", "choose_samplers", "check_strategy"), ELSEWHERE),
    **dict.fromkeys(("serial_steps", "unsupported_reason", "latent_scale_shift"), "reads a config"),
    **dict.fromkeys(("checkpoint_layers", "compile_layers"), "any module"),
    "capture_inverse": "needs a GPU",
    "Bijection": "abstract",
    "adaptive": "its c is a number",
}
MODULES = """data bijections coupling autoregressive transformer evaluation tarflow exact_inverse
improved_tarflow reverse_model inverse_strategies distances guidance editing speed imagenet
lab.sampling scale.autoencoder excursions.compiled excursions.glow excursions.jacobi
excursions.native excursions.rounding excursions.toys""".split()
KINDS = "Tensor", "Module", "Flow", "ReverseModel", "Bijection"
NAMES = {"x", "z", "c", "model", "forward", "reverse", "a", "b", "labels", "tokens"}


def takes_tensors(found) -> bool:
    """Whether a public name is called with tensors or models."""
    if isclass(found):
        return issubclass(found, nn.Module)
    if not isfunction(found):
        return False
    for p in signature(found).parameters.values():
        kind = str(p.annotation)
        if p.name in NAMES or (any(t in kind for t in KINDS) and "Config" not in kind):
            return True
    return False


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_stands_in_the_table(module):
    covered = {name.replace(".", " ").split()[0] for name in TABLE} | set(LEFT_OUT)
    module = import_module(f"bitflow_edu.{module}")
    public = [name for name in module.__all__ if takes_tensors(getattr(module, name))]
    assert [name for name in public if name not in covered] == []
