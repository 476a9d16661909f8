"""The reverse model: what its tokens see, its states, one pass, the noise it starts from."""

import pytest
import torch

from bitflow_edu.reverse_model import one_pass, sample_noise
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
