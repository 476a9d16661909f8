"""What PyTorch computes, for check.js to compare with: python reference.py FILE.json"""

import copy
import json
import sys
from pathlib import Path

import torch

from bitflow_edu.data import add_noise, load_data
from bitflow_edu.editing import inpaint, interpolate
from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.guidance import guided_pass
from bitflow_edu.io.datasets import DataConfig, resize
from bitflow_edu.io.files import asset
from bitflow_edu.io.models import load_model
from bitflow_edu.reverse_model import ReverseModel, one_pass, sample_noise
from bitflow_edu.tarflow import TARFlow, log_prob

PAIRS = {"mnist-mini": (3, -1), "mnist": (7,), "cifar10-mini": (3,)}  # shipped models, labels

NARROW = 0.25  # a κ that binds


def flat(tensor):
    """A tensor as a plain list, row after row."""
    return tensor.detach().flatten().tolist()


def noisy_image(cfg):
    """A picture `(1, C, H, W)` that F could have seen in training; of colours, noise will do."""
    generator = torch.Generator().manual_seed(1)
    if cfg.channels > 1:
        return torch.rand(1, cfg.channels, cfg.image_size, cfg.image_size, generator=generator) - 1
    test = load_data(DataConfig("mnist-mini", image_size=cfg.image_size), "test")
    return add_noise(test.x[:1], cfg.noise_std, generator)


def edits(F, G, x, c):
    """The edits of lesson 15: half of the tokens resampled, and five images between two."""
    mask = torch.ones(F.cfg.image_size, F.cfg.image_size, dtype=torch.bool)
    mask[F.cfg.image_size // 2 :] = False
    eps = sample_noise(F.cfg, 1, seed=3).double()
    return {
        "eps": flat(eps),
        "inpaint": flat(inpaint(F, G, x, mask, c, eps=eps)),
        "interpolate": flat(interpolate(F, G, x, x.flip(-1), c, steps=5)),
    }


def clipped(F, x, z, c):
    """F and its inverse where every block clips so narrowly that it shows."""
    narrow = copy.deepcopy(F)
    for block in narrow.blocks:
        block.clip = NARROW
    return {"clipped": flat(narrow(x, c).z), "clipped_inverse": flat(exact_inverse(narrow, z, c))}


def load_pair(name):
    """F and G that come with the course, in float64."""
    F = load_model(asset(f"{name}/forward"), TARFlow)
    G = load_model(asset(f"{name}/reverse"), ReverseModel)
    return F.double().requires_grad_(False), G.double().requires_grad_(False)


def reference(name, F, G, label):
    """Inputs and results of one pair."""
    x, c = noisy_image(F.cfg).double(), torch.tensor([label])
    z, w = sample_noise(F.cfg, 1, seed=5).double(), 0.75
    trajectory = F(x, c)
    guide = one_pass if G.cfg.max_guidance else guided_pass
    return {
        "name": name,
        "inputs": {"x": flat(x), "z": flat(z), "c": label, "w": w, "narrow": NARROW},
        "states": [flat(state) for state in trajectory.states],
        "logdet": trajectory.logdet.item(),
        "log_prob": log_prob(trajectory).item(),
        "exact_inverse": flat(exact_inverse(F, z, c)),
        "one_pass": flat(one_pass(G, z, c)),
        "guided": flat(guide(G, z, c, w)),
        **edits(F, G, x, c),
        **clipped(F, x, z, c),
    }


def resized():
    """A picture of 28×28 pixels, and the same at the size of the small models."""
    pixels = load_data(DataConfig("mnist-mini", image_size=28), "test").pixels[:1]
    return {"pixels": flat(pixels), "small": flat(resize(pixels, 16))}


def main(path):
    """Write the reference values of every pair."""
    torch.set_num_threads(1)
    models = {name: load_pair(name) for name in PAIRS}
    torch.set_default_dtype(torch.float64)  # so that rounding is not what is compared
    pairs = [reference(name, *models[name], c) for name in PAIRS for c in PAIRS[name]]
    Path(path).write_text(json.dumps({"pairs": pairs, "resize": resized()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
