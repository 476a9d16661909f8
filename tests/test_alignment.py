"""Alignment for any trajectory: F's, a flow's path, a larger G's states."""

import pytest
import torch

from bitflow_edu.data import add_noise, patchify, unpatchify
from bitflow_edu.excursions.alignment import alignment_loss, ode_path, states_of
from bitflow_edu.inverse_strategies import hidden_alignment, naive_distillation, reverse_loss
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.neighbours import Neighbour, NeighbourConfig, few_steps, heun
from conftest import shake, small_flow, small_reverse, small_transformer

CFG = NeighbourConfig(6, 1, 2, 3, 3, transformer=small_transformer())


def batch(n=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 1, 2, -1])[:n]


@pytest.mark.parametrize("strategy", [hidden_alignment, naive_distillation])
def test_with_the_trajectory_of_f_it_is_stage_two(strategy):
    F = small_flow()
    G, (x, c) = small_reverse(F), batch()

    def by_F(x, c, generator):
        return F(add_noise(x, F.cfg.noise_std, generator), c), x

    losses = alignment_loss(by_F, strategy), reverse_loss(F, strategy)
    given, known = (loss(G, x, c, torch.Generator().manual_seed(5))[0] for loss in losses)
    assert torch.equal(given, known)


def test_the_path_of_a_flow_has_a_state_for_every_block_and_can_be_gone_back():
    flow, (x, c) = shake(build(Neighbour, CFG, 0)).double(), batch(dtype=torch.float64)
    with torch.no_grad():
        trajectory, image = ode_path(flow, 3, steps=20, noise_std=0.0)(x, c, None)
    assert len(trajectory.states) == 4 and torch.equal(image, x)
    assert torch.equal(trajectory.states[0], patchify(x, 2))
    back = few_steps(flow, unpatchify(trajectory.z, 2, 1), c, 60, heun)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


def test_the_path_begins_at_the_noise_of_f():
    flow, (x, c) = shake(build(Neighbour, CFG, 0)).double(), batch(dtype=torch.float64)
    trajectory, image = ode_path(flow, 3, noise_std=0.25)(x, c, torch.Generator().manual_seed(4))
    noisy = add_noise(x, 0.25, torch.Generator().manual_seed(4))
    assert torch.equal(image, x)
    torch.testing.assert_close(trajectory.states[0], 0.8 * patchify(noisy, 2))  # t = 0.25 / 1.25
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(BitflowError, match="noise_std is"):
            ode_path(flow, 3, noise_std=wrong)


def test_a_student_sees_what_its_teacher_reads():
    F = small_flow()
    teacher, student, (x, c) = small_reverse(F), small_reverse(F, seed=2), batch()
    trajectory, image = states_of(teacher)(x, c, torch.Generator().manual_seed(1))
    out = teacher(trajectory.z, c)
    assert torch.equal(image, out.image)
    for state, read in zip(trajectory.states, out.projected):
        assert torch.equal(state, read)
    loss = alignment_loss(states_of(teacher))
    own, _ = loss(teacher, x, c, torch.Generator().manual_seed(1))
    other, logged = loss(student, x, c, torch.Generator().manual_seed(1))
    assert own == 0 < other and {"image", "depth_0", "depth_2"} <= set(logged)
    other.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.blocks.parameters())


def test_what_is_refused():
    flow, F = build(Neighbour, CFG, 0), small_flow()
    for blocks, steps in ((0, 1), (3, 0)):
        with pytest.raises(BitflowError, match="must be 1 or more"):
            ode_path(flow, blocks, steps)
    with pytest.raises(BitflowError, match="a Neighbour belongs here"):
        ode_path(F, 3)
    with pytest.raises(BitflowError, match="a ReverseModel belongs here"):
        states_of(flow)
