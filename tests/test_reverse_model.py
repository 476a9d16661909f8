"""The reverse model: what its tokens see, its states, one pass, the noise it starts from."""

import pytest
import torch
import torch.nn as nn

from bitflow_edu.reverse_model import ReverseBlock, one_pass, sample_noise
from bitflow_edu.tarflow import ClassEmbedding
from bitflow_edu.transformer import Transformer, checkpoint_layers
from conftest import small_flow, small_reverse


@pytest.mark.parametrize("modern", [False, True])
def test_every_token_sees_every_other(modern):
    flow = small_flow()
    G = small_reverse(flow, modern)
    z, c = torch.randn(1, 9, 4), torch.tensor([1])
    for t in range(9):
        moved = z.clone()
        moved[:, t] += 1.0
        change = (G(moved, c).projected[0] - G(z, c).projected[0]).abs().amax(dim=(0, 2))
        assert (change > 1e-6).all(), f"token {t} does not reach all others"


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("token_states", [True, False])
def test_one_pass_is_the_forward_pass_without_its_extras(denoise, token_states):
    flow = small_flow()
    G = small_reverse(flow, denoise=denoise, token_states=token_states)
    z, c = sample_noise(G.cfg, 3), torch.tensor([0, 2, -1])
    out = G(z, c)
    torch.testing.assert_close(one_pass(G, z, c), out.image)
    assert len(out.hidden) == flow.cfg.num_blocks + 1 and len(out.projected) == flow.cfg.num_blocks
    torch.testing.assert_close(out.hidden[-1], G.embed(z))


def test_noise_of_an_image_does_not_depend_on_how_many_there_are():
    G = small_reverse(small_flow())
    assert torch.equal(sample_noise(G.cfg, 5, seed=7)[:2], sample_noise(G.cfg, 2, seed=7))


def test_hidden_distillation_passes_on_the_projected_states_and_alignment_does_not():
    flow = small_flow()
    z, c = torch.randn(2, 9, 4), torch.tensor([0, 1])
    for token_states in (True, False):
        G = small_reverse(flow, token_states=token_states)
        before = one_pass(G, z, c)
        with torch.no_grad():
            G.projections[1][1].weight.mul_(1.5)
        assert torch.equal(before, one_pass(G, z, c)) == (not token_states)


def test_token_states_carry_no_more_than_a_token_can_hold():
    """Between blocks nothing but D numbers of each token pass: a state's rank is at most D = 4."""
    flow, c = small_flow(), torch.zeros(200, dtype=torch.long)
    processes = []
    for token_states in (True, False):
        G = small_reverse(flow, token_states=token_states)
        at = G(torch.randn(200, 9, 4), c).hidden[1][:, 0]
        processes.append(torch.linalg.matrix_rank(at - at.mean(0), rtol=1e-4))
    assert processes[0] <= 4 < processes[1]


def noise_and_labels(G):
    return sample_noise(G.cfg, 3), torch.tensor([0, 2, -1])


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("options", [{}, {"denoise": False}, {"token_states": True}])
def test_w_as_a_token_leaves_the_image_its_tokens_and_matters(modern, options):
    flow = small_flow()
    G = small_reverse(flow, modern, max_guidance=2.0, scale_token=True, **options)
    z, c = noise_and_labels(G)
    lengths = []
    for layer in (layer for block in G.blocks for layer in block.transformer.layers):
        layer.register_forward_hook(lambda layer, args, out: lengths.append(out.shape[1]))
    out = G(z, c, 1.5)
    assert set(lengths) == {10} and all(h.shape == (3, 9, 16) for h in out.hidden)
    torch.testing.assert_close(one_pass(G, z, c, 1.5), out.image)
    by_scale = [one_pass(G, z, c, w) for w in (None, 0.0, 1.0, 2.0)]
    assert torch.equal(by_scale[0], by_scale[1])
    assert not torch.allclose(by_scale[1], by_scale[2], atol=1e-4)
    assert not torch.allclose(by_scale[2], by_scale[3], atol=1e-4)
    table = torch.zeros(3, flow.cfg.num_blocks + 1)
    table[1] = 2.0  # one image's scale is its own
    mixed = one_pass(G, z, c, table)
    torch.testing.assert_close(mixed[[0, 2]], by_scale[1][[0, 2]])
    torch.testing.assert_close(mixed[1], by_scale[3][1])


def test_a_token_without_a_place_is_not_turned():
    """Rotary angles: 0 for w's token, and the image's tokens keep theirs; nothing is saved."""
    G = small_reverse(small_flow(), max_guidance=2.0, scale_token=True)
    plain = small_reverse(small_flow(), max_guidance=2.0)
    for block, other in zip(G.blocks, plain.blocks):
        assert not block.transformer.angles[0].any()
        assert torch.equal(block.transformer.angles[1:], other.transformer.angles)
    assert not any("angles" in name for name in G.state_dict())


def test_a_model_in_double_precision_takes_w():
    G = small_reverse(small_flow(), max_guidance=2.0).double()
    z, c = sample_noise(G.cfg, 3, seed=0).double(), torch.tensor([0, 1, -1])
    exact, rounded = one_pass(G, z, c, 0.5), one_pass(G.float(), z.float(), c, 0.5)
    assert exact.dtype == torch.float64 and torch.allclose(exact.float(), rounded, atol=1e-5)


def test_a_scale_token_needs_a_scale():
    """Without w there is no token: the very same G."""
    flow = small_flow()
    G, plain = (small_reverse(flow, scale_token=token) for token in (True, False))
    assert G.cfg.num_extra_tokens == 0 and G.state_dict().keys() == plain.state_dict().keys()
    z, c = noise_and_labels(G)
    assert torch.equal(one_pass(G, z, c), one_pass(plain, z, c))


@pytest.mark.parametrize("max_guidance", [0.0, 2.0])
def test_a_block_without_a_scale_token_is_as_it_was(max_guidance):
    """Names, initial numbers and outputs of G as earlier versions made and stored it."""
    cfg = small_reverse(small_flow(), max_guidance=max_guidance).cfg
    width, side = cfg.transformer.width, cfg.image_size // cfg.patch_size
    torch.manual_seed(0)
    block = ReverseBlock(cfg)
    torch.manual_seed(0)
    embed = ClassEmbedding(cfg.num_classes, width, cfg.embed_std)
    transformer = Transformer(cfg.transformer, side, causal=False)
    parts = {"class_embed": embed, "transformer": transformer}
    if max_guidance:
        into, out = nn.Linear(1, width), nn.Linear(width, width)
        parts["scale_embed"] = nn.Sequential(into, nn.SiLU(), out)
    weights = {f"{p}.{k}": v for p, m in parts.items() for k, v in m.state_dict().items()}
    made = block.state_dict()
    assert list(made) == list(weights) and all(torch.equal(made[k], weights[k]) for k in weights)
    h, c, w = torch.randn(3, 9, width), torch.tensor([0, 2, -1]), torch.rand(3)
    wanted = h + embed(c)
    if max_guidance:
        wanted = wanted + parts["scale_embed"](w[:, None])[:, None]
    assert torch.equal(block(h, c, w), transformer(wanted))


@pytest.mark.parametrize("modern", [False, True])
def test_layers_of_a_g_with_a_scale_token_are_checkpointed(modern):
    """The longer row of tokens passes where activations are computed anew; same gradients."""
    flow, gradients = small_flow(), []
    for again in (False, True):
        G = small_reverse(flow, modern, max_guidance=2.0, scale_token=True)
        if again:
            checkpoint_layers(G)
        G(*noise_and_labels(G), 1.0).image.square().sum().backward()
        gradients.append([p.grad for p in G.blocks.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
