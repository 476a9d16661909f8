"""The original architecture against an independent implementation under the published names."""

import pytest
import torch
import torch.nn.functional as nnf

from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.excursions.apple_weights import (
    apple_config,
    apple_state_dict,
    load_apple_state_dict,
)
from bitflow_edu.io.files import BitflowError
from bitflow_edu.tarflow import TARFlow, TARFlowConfig
from bitflow_edu.transformer import TransformerConfig

small = TransformerConfig(width=16, head_dim=8, num_layers=1)


def random_state(channels=3, patch=2, side=3, width=128, blocks=3, layers=2, classes=3, seed=0):
    """A published state dict with random values everywhere."""
    g = torch.Generator().manual_seed(seed)
    T, D = side * side, channels * patch**2
    state = {"var": torch.ones(T, D)}

    def rand(*shape, size=0.15):
        return size * torch.randn(*shape, generator=g)

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = rand(outputs, inputs, size=inputs**-0.5)
        state[f"{name}.bias"] = rand(outputs)

    for i in range(blocks):
        b = f"blocks.{i}"
        linear(f"{b}.proj_in", D, width)
        linear(f"{b}.proj_out", width, 2 * D)
        state[f"{b}.proj_out.weight"] *= 0.2
        state[f"{b}.pos_embed"] = rand(T, width)
        state[f"{b}.attn_mask"] = torch.ones(T, T).tril()
        if classes:
            state[f"{b}.class_embed"] = rand(classes, 1, width)
        for j in range(layers):
            a = f"{b}.attn_blocks.{j}"
            linear(f"{a}.attention.qkv", width, 3 * width)
            linear(f"{a}.attention.proj", width, width)
            linear(f"{a}.mlp.main.0", width, 4 * width)
            linear(f"{a}.mlp.main.2", 4 * width, width)
            for norm in (f"{a}.attention.norm", f"{a}.mlp.norm"):
                state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + rand(width), rand(width)
    return state


def reference_layer(state, a, mask, h, heads):
    """Attention and MLP of the layer whose names start with a, over tokens `(N, T, W)`."""
    N, T, W = h.shape

    def linear(name, v):
        return v @ state[f"{a}.{name}.weight"].T + state[f"{a}.{name}.bias"]

    def norm(name):
        weight, bias = state[f"{a}.{name}.weight"], state[f"{a}.{name}.bias"]
        return nnf.layer_norm(h, (W,), weight, bias)

    parts = linear("attention.qkv", norm("attention.norm")).split(W, dim=2)
    q, k, v = (part.reshape(N, T, heads, W // heads).transpose(1, 2) for part in parts)
    scores = (q @ k.transpose(2, 3)) / (W // heads) ** 0.5
    y = torch.where(mask > 0, scores, -torch.inf).softmax(3) @ v
    h = h + linear("attention.proj", y.transpose(1, 2).reshape(N, T, W))
    return h + linear("mlp.main.2", nnf.gelu(linear("mlp.main.0", norm("mlp.norm"))))


def reference_parameters(state, i, x, labels, heads):
    """α and μ of block i for tokens in the block's own order, from the raw tensors."""
    b = f"blocks.{i}"

    def linear(name, v):
        return v @ state[f"{b}.{name}.weight"].T + state[f"{b}.{name}.bias"]

    positions = state[f"{b}.pos_embed"]
    h = linear("proj_in", x) + (positions.flip(0) if i % 2 else positions)
    if f"{b}.class_embed" in state:
        table = state[f"{b}.class_embed"]
        h = h + torch.stack([table[k] if k >= 0 else table.mean(0) for k in labels.tolist()])
    layers = sum(name.startswith(b) and name.endswith("qkv.weight") for name in state)
    for j in range(layers):
        h = reference_layer(state, f"{b}.attn_blocks.{j}", state[f"{b}.attn_mask"], h, heads)
    out = nnf.pad(linear("proj_out", h), (0, 0, 1, 0))[:, :-1]
    return out.split(x.shape[2], dim=2)


def num_blocks(state):
    return sum(name.endswith("pos_embed") for name in state)


def reference_forward(state, images, labels, patch, heads):
    """z `(N, T, D)` and the log-determinant as the mean over dimensions."""
    x, logdet = nnf.unfold(images, patch, stride=patch).transpose(1, 2), 0
    for i in range(num_blocks(state)):
        x = x.flip(1) if i % 2 else x
        alpha, mu = reference_parameters(state, i, x, labels, heads)
        x, logdet = (x - mu) * torch.exp(-alpha), logdet - alpha.mean(dim=(1, 2))
        x = x.flip(1) if i % 2 else x
    return x, logdet


def reference_sample(state, z, labels, patch, side, heads):
    """Token by token, the whole block again for each."""
    x = z * state["var"].sqrt()
    for i in reversed(range(num_blocks(state))):
        x = x.flip(1) if i % 2 else x.clone()
        for t in range(1, x.shape[1]):
            alpha, mu = reference_parameters(state, i, x, labels, heads)
            x = x.clone()
            x[:, t] = x[:, t] * alpha[:, t].exp() + mu[:, t]
        x = x.flip(1) if i % 2 else x
    return nnf.fold(x.transpose(1, 2), (side * patch,) * 2, patch, stride=patch)


@pytest.mark.parametrize("classes", [3, 0])
def test_the_published_architecture_number_for_number(classes):
    state = random_state(classes=classes)
    model = load_apple_state_dict(state)
    cfg = model.cfg
    assert (cfg.image_size, cfg.num_blocks) == (6, 3)
    assert (cfg.transformer.num_layers, cfg.transformer.head_dim) == (2, 64)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 6, 6, generator=g)
    labels = torch.tensor([0, -1, 2, 1]) if classes else torch.full((4,), -1)
    with torch.no_grad():
        trajectory = model(images, labels)
    z, logdet = reference_forward(state, images, labels, 2, 2)
    torch.testing.assert_close(trajectory.z, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory.logdet / z[0].numel(), logdet, rtol=0, atol=1e-5)
    noise = 0.5 * torch.randn(4, 9, 12, generator=g)
    right = reference_sample(state, noise, labels, 2, 3, 2)
    torch.testing.assert_close(exact_inverse(model, noise, labels), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [3, 0])
def test_written_back_as_it_was(classes):
    state = random_state(classes=classes)
    again = apple_state_dict(load_apple_state_dict(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_a_prior_with_variances_is_refused():
    state = random_state()
    state["var"] = 0.5 + torch.rand(9, 12, generator=torch.Generator().manual_seed(2))
    with pytest.raises(BitflowError, match="var is not 1"):
        load_apple_state_dict(state)


def test_the_shape_of_the_public_checkpoint():
    """AFHQ at 256×256: patch 8, 768 channels, 8 blocks of 8 layers."""
    T, D, W = 1024, 192, 768
    with torch.device("meta"):
        state = {
            "blocks.0.proj_in.weight": torch.empty(W, D),
            "blocks.0.pos_embed": torch.empty(T, W),
            "blocks.0.class_embed": torch.empty(3, 1, W),
        }
        for i in range(8):
            for j in range(8):
                state[f"blocks.{i}.attn_blocks.{j}.mlp.norm.weight"] = torch.empty(W)
    cfg = apple_config(state)
    assert (cfg.image_size, cfg.patch_size, cfg.num_classes) == (256, 8, 3)
    assert (cfg.num_blocks, cfg.transformer.num_layers, cfg.transformer.width) == (8, 8, 768)


def test_all_names_that_do_not_fit_are_listed():
    state = random_state()
    del state["blocks.1.attn_blocks.0.mlp.norm.bias"], state["blocks.2.pos_embed"]
    state["blocks.9.surprise"] = torch.zeros(1)
    state["blocks.0.proj_out.bias"] = torch.zeros(7)
    cfg = apple_config(random_state())
    with pytest.raises(BitflowError) as e:
        load_apple_state_dict(state, cfg)
    for word in (
        "missing blocks.1.attn_blocks.0.mlp.norm.bias",
        "missing blocks.2.pos_embed",
        "not known blocks.9.surprise",
        "blocks.0.proj_out.bias is (7,), not (24,)",
    ):
        assert word in str(e.value)
    with pytest.raises(BitflowError, match="blocks.0.proj_in.weight"):
        load_apple_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(BitflowError, match="5 channels"):
        load_apple_state_dict(random_state(), apple_config(random_state(), channels=5))


@pytest.mark.parametrize(
    "change",
    [
        dict(clip=1.0),
        dict(logit_alpha=0.1),
        dict(block_layers=(2, 1, 1, 1)),
        dict(transformer=TransformerConfig(width=16, head_dim=8, mlp="swiglu")),
    ],
)
def test_only_the_original_architecture_is_written(change):
    with pytest.raises(BitflowError, match="original architecture"):
        apple_state_dict(TARFlow(TARFlowConfig(**{"transformer": small, **change})))
