"""The original architecture against a plain, independent implementation under the published parameter names."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
import torch.nn.functional as nnf

from bitflow_edu.data import BitflowError
from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.tarflow import (
    TARFlow,
    TARFlowConfig,
    apple_config,
    apple_state_dict,
    load_apple_state_dict,
    log_prob,
)
from bitflow_edu.training import load_model, save_model
from bitflow_edu.transformer import TransformerConfig


def random_state(channels=3, patch=2, side=3, width=128, blocks=3, layers=2, classes=3, seed=0):
    """A published state dict with random values everywhere."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape, size=0.15: size * torch.randn(*shape, generator=g)
    T, D, state = (
        side * side,
        channels * patch**2,
        {"var": torch.ones(side * side, channels * patch**2)},
    )

    def linear(name, inputs, outputs):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            rand(outputs, inputs, size=inputs**-0.5),
            rand(outputs),
        )

    for i in range(blocks):
        b = f"blocks.{i}"
        linear(f"{b}.proj_in", D, width)
        linear(f"{b}.proj_out", width, 2 * D)
        state[f"{b}.proj_out.weight"] *= 0.2
        state[f"{b}.pos_embed"], state[f"{b}.attn_mask"] = rand(T, width), torch.ones(T, T).tril()
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


def reference_advice(state, i, x, labels, heads):
    """α and μ of block i for tokens in the block's own order, from the raw tensors."""
    p = lambda name: state[f"blocks.{i}.{name}"]
    lin = lambda name, v: v @ p(f"{name}.weight").T + p(f"{name}.bias")
    pos = p("pos_embed").flip(0) if i % 2 else p("pos_embed")
    h = lin("proj_in", x) + pos
    if f"blocks.{i}.class_embed" in state:
        table = p("class_embed")
        h = h + torch.stack([table[k] if k >= 0 else table.mean(0) for k in labels.tolist()])
    N, T, W = h.shape
    for j in range(
        sum(f"blocks.{i}.attn_blocks.{k}.attention.qkv.weight" in state for k in range(99))
    ):
        a = f"attn_blocks.{j}."
        normed = nnf.layer_norm(
            h, (W,), p(a + "attention.norm.weight"), p(a + "attention.norm.bias")
        )
        q, k, v = (
            part.reshape(N, T, heads, W // heads).transpose(1, 2)
            for part in lin(a + "attention.qkv", normed).split(W, dim=2)
        )
        scores = (q @ k.transpose(2, 3)) / (W // heads) ** 0.5
        y = torch.where(p("attn_mask") > 0, scores, -torch.inf).softmax(3) @ v
        h = h + lin(a + "attention.proj", y.transpose(1, 2).reshape(N, T, W))
        normed = nnf.layer_norm(h, (W,), p(a + "mlp.norm.weight"), p(a + "mlp.norm.bias"))
        h = h + lin(a + "mlp.main.2", nnf.gelu(lin(a + "mlp.main.0", normed)))
    out = nnf.pad(lin("proj_out", h), (0, 0, 1, 0))[:, :-1]
    return out.split(x.shape[2], dim=2)


def reference_forward(state, images, labels, patch, heads):
    """z `(N, T, D)` and the log-determinant as the mean over dimensions."""
    x, logdet = nnf.unfold(images, patch, stride=patch).transpose(1, 2), 0
    for i in range(sum(f"blocks.{k}.pos_embed" in state for k in range(99))):
        x = x.flip(1) if i % 2 else x
        alpha, mu = reference_advice(state, i, x, labels, heads)
        x, logdet = (x - mu) * torch.exp(-alpha), logdet - alpha.mean(dim=(1, 2))
        x = x.flip(1) if i % 2 else x
    return x, logdet


def reference_sample(state, z, labels, patch, side, heads):
    """Token by token, the whole block again for each."""
    x = z * state["var"].sqrt()
    for i in reversed(range(sum(f"blocks.{k}.pos_embed" in state for k in range(99)))):
        x = x.flip(1) if i % 2 else x.clone()
        for t in range(1, x.shape[1]):
            alpha, mu = reference_advice(state, i, x, labels, heads)
            x = torch.cat(
                [
                    x[:, :t],
                    x[:, t : t + 1] * alpha[:, t : t + 1].exp() + mu[:, t : t + 1],
                    x[:, t + 1 :],
                ],
                dim=1,
            )
        x = x.flip(1) if i % 2 else x
    return nnf.fold(x.transpose(1, 2), (side * patch,) * 2, patch, stride=patch)


@pytest.mark.parametrize("classes", [3, 0])
def test_the_published_architecture_number_for_number(classes):
    state = random_state(classes=classes)
    model = load_apple_state_dict(state)
    assert (
        model.cfg.image_size == 6
        and model.cfg.num_blocks == 3
        and model.cfg.transformer.num_layers == 2
        and model.cfg.transformer.head_dim == 64
    )
    g = torch.Generator().manual_seed(1)
    images, labels = (
        torch.randn(4, 3, 6, 6, generator=g),
        torch.tensor([0, -1, 2, 1]) if classes else torch.full((4,), -1),
    )
    with torch.no_grad():
        trajectory = model(images, labels)
    z, logdet = reference_forward(state, images, labels, 2, 2)
    torch.testing.assert_close(trajectory.z, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory.logdet / z[0].numel(), logdet, rtol=0, atol=1e-5)
    noise = 0.5 * torch.randn(4, 9, 12, generator=g)
    torch.testing.assert_close(
        exact_inverse(model, noise, labels),
        reference_sample(state, noise, labels, 2, 3, 2),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("classes", [3, 0])
def test_written_back_as_it_was(classes):
    state = random_state(classes=classes)
    again = apple_state_dict(load_apple_state_dict(state))
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


def test_a_prior_with_variances_is_kept(tmp_path):
    state = random_state()
    state["var"] = 0.5 + torch.rand(9, 12, generator=torch.Generator().manual_seed(2))
    model = load_apple_state_dict(state)
    noise, labels = 0.5 * torch.randn(2, 9, 12), torch.tensor([0, 1])
    save_model(model, tmp_path)
    for m in (model, load_model(tmp_path, TARFlow)):
        torch.testing.assert_close(
            exact_inverse(m, m.noise(noise), labels),
            reference_sample(state, noise, labels, 2, 3, 2),
            rtol=0,
            atol=1e-5,
        )
    assert torch.equal(apple_state_dict(model)["var"], state["var"])


def test_the_shape_of_the_public_checkpoint():
    """AFHQ at 256×256: patch 8, 768 channels, 8 blocks of 8 layers."""
    with torch.device("meta"):
        T, D, W = 1024, 192, 768
        state = {
            "blocks.0.proj_in.weight": torch.empty(W, D),
            "blocks.0.pos_embed": torch.empty(T, W),
            "blocks.0.class_embed": torch.empty(3, 1, W),
        }
        state.update(
            {
                f"blocks.{i}.attn_blocks.{j}.mlp.norm.weight": torch.empty(W)
                for i in range(8)
                for j in range(8)
            }
        )
    cfg = apple_config(state)
    assert (
        cfg.image_size,
        cfg.patch_size,
        cfg.num_blocks,
        cfg.transformer.num_layers,
        cfg.transformer.width,
        cfg.num_classes,
    ) == (256, 8, 8, 8, 768, 3)


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
    with pytest.raises(BitflowError, match="no TARFlow state dict"):
        load_apple_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(BitflowError, match="no square image"):
        load_apple_state_dict(random_state(), apple_config(random_state(), channels=5))


def test_only_the_original_architecture_is_written():
    small = TransformerConfig(width=16, head_dim=8, num_layers=1)
    for change in (
        dict(clip=1.0),
        dict(logit_alpha=0.1),
        dict(block_layers=(2, 1, 1, 1)),
        dict(transformer=TransformerConfig(width=16, head_dim=8, mlp="swiglu")),
    ):
        with pytest.raises(BitflowError, match="original architecture"):
            apple_state_dict(TARFlow(TARFlowConfig(**{"transformer": small, **change})))
    for bad, word in (
        (dict(clip=-1.0), "clip is -1"),
        (dict(block_layers=(1, 2)), "4 blocks"),
        (dict(block_layers=(1, 0, 1, 1)), "at least 1 layer"),
    ):
        with pytest.raises(BitflowError, match=word):
            TARFlowConfig(transformer=small, **bad)


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_clipping_bounds_the_advice_and_the_stretch(clip):
    small = TransformerConfig(width=16, head_dim=8, num_layers=1)
    flow = TARFlow(
        TARFlowConfig(
            image_size=8,
            patch_size=2,
            num_classes=3,
            clip=clip,
            block_layers=(2, 1, 1, 1),
            transformer=small,
        )
    ).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(
                5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
            )
    x, c = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, -1])
    assert [len(b.transformer.layers) for b in flow.blocks] == [2, 1, 1, 1]
    for block in flow.blocks:
        alpha, mu = block.parameters_of(torch.randn(3, 16, 4, dtype=torch.float64), c)
        assert alpha.abs().max() <= clip and mu.abs().max() <= clip
    trajectory = flow(x, c)
    assert torch.isfinite(trajectory.z).all() and torch.isfinite(log_prob(trajectory)).all()
    torch.testing.assert_close(exact_inverse(flow, trajectory.z, c), x, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(clip=st.floats(0.1, 3.0), scale=st.floats(0.01, 100.0), seed=st.integers(0, 99))
def test_under_clipping_no_weights_overflow(clip, scale, seed):
    small = TransformerConfig(width=16, head_dim=8, num_layers=1)
    flow, g = (
        TARFlow(
            TARFlowConfig(image_size=8, patch_size=2, num_classes=3, clip=clip, transformer=small)
        ),
        torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    x, c = 3 * torch.randn(2, 1, 8, 8, generator=g), torch.tensor([0, -1])
    trajectory = flow(x, c)
    assert torch.isfinite(trajectory.z).all() and torch.isfinite(log_prob(trajectory)).all()
    assert torch.isfinite(
        exact_inverse(flow, torch.randn(trajectory.z.shape, generator=g), c)
    ).all()
