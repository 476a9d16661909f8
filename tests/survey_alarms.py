#!/usr/bin/env python3
"""Count the false alarms of `bitflow_edu.scale.alarms`; writes results/watching.json.

Usage: survey_alarms.py RUNS [RUNS …] [--data-root DATA] [--results DIR]
RUNS are folders of trainings (searched for metrics.jsonl); DATA holds CIFAR-10, left out without.
"""

import argparse
import time
from pathlib import Path

import torch

from bitflow_edu.data import load_data
from bitflow_edu.io.checkpoints import read_metrics
from bitflow_edu.io.datasets import DataConfig, described
from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.results import measurement, save_results
from bitflow_edu.lab.hub import load_pretrained
from bitflow_edu.lab.sampling import draw, exact_sampler, noise_for, one_pass_sampler
from bitflow_edu.scale.alarms import (
    EXCURSION,
    GROUPS,
    LEAST,
    WINDOW,
    alike,
    check_samples,
    restlessness,
    sample_reference_of,
    watch_labels,
)
from bitflow_edu.scale.failures import SPREADS


def kind_of(path: str) -> str:
    """Flows of chapter 02 are known for their temper."""
    if "nice" in path:
        return "NICE"
    return "Glow and RealNVP" if "glow" in path or "realnvp" in path else "F and G"


def trainings(folders: list) -> dict:
    """Kind → the metrics of each training of at least 30 lines; copies of a run count once."""
    found = {}
    for path in sorted(p for folder in folders for p in Path(folder).rglob("metrics.jsonl")):
        try:
            lines = read_metrics(path)
        except BitflowError:
            continue
        if len(lines) >= 30 and "grad_norm" in lines[0]:
            found.setdefault(kind_of(str(path)), {})[str(lines[-1]["loss"])] = lines
    return found


def of_trainings(kind: str, runs: list) -> list:
    """How far the lines of healthy trainings stray."""
    restless = [restlessness(lines) for lines in runs]

    def most(key, digits):
        return round(max(r[key] for r in restless), digits)

    found = [
        measurement(kind, "trainings", len(runs)),
        measurement(kind, "lines", sum(map(len, runs))),
        measurement(kind, "largest_loss_excursion", most("loss", 2), "spreads"),
        measurement(kind, "largest_gradient_excursion", most("log_grad_norm", 2), "spreads"),
        measurement(kind, "lines_past_limit", sum(r["above"] for r in restless)),
    ]
    if kind == "F and G":
        found.append(measurement(kind, "largest_z_gain", most("z_gain", 4), "loss spreads"))
    return found


def of_groups(row: str, reference, groups) -> list:
    """How many groups of images set off an alarm."""
    alarms = [check_samples(x, reference.labels, reference) for x in groups]
    alarmed = measurement(row, "groups_with_alarm", sum(map(bool, alarms)))
    return [measurement(row, "groups", len(alarms)), alarmed]


def of_digits() -> list:
    """Real digits, and samples of the pair that comes with the course."""
    train, test = (load_data(DataConfig(), split) for split in ("train", "test"))
    (F, G), labels = load_pretrained("mnist-mini"), watch_labels(train.labels)
    clean = sample_reference_of(train, labels, F.cfg.patch_size)
    noisy = sample_reference_of(train, labels, F.cfg.patch_size, F.cfg.noise_std)
    z = [noise_for(F.cfg, len(labels), seed) for seed in range(50)]
    one_pass = [draw(one_pass_sampler(G), noise, labels) for noise in z]
    exact = [draw(exact_sampler(F), noise, labels) for noise in z[:10]]
    return [
        *of_groups("100 test digits", clean, groups_of(test, labels, 200)),
        *of_groups("100 samples of G", clean, one_pass),
        *of_groups("100 samples of F, against noisy digits", noisy, exact),
    ]


def groups_of(data, labels, n: int) -> list:
    """n random groups of images with the labels wanted."""
    g = torch.Generator().manual_seed(0)
    return [data[alike(labels, data.labels, g)].x for _ in range(n)]


def of_photographs(root: Path) -> list:
    """Real photographs."""
    cfg = DataConfig("cifar10", 32, 3)
    train, test = (load_data(cfg, split, root) for split in ("train", "test"))
    labels = watch_labels(train.labels)
    name = "CIFAR-10 (JPEG copy)" if "copy" in described(cfg, root) else "CIFAR-10"
    normal, groups = sample_reference_of(train, labels, 4), groups_of(test, labels, 100)
    return of_groups(f"100 test images of {name}", normal, groups)


def main():
    """Measure, print, store."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("runs", nargs="+", type=Path)
    ap.add_argument("--data-root", type=Path)
    ap.add_argument("--results", type=Path, default=Path("results"))
    args, start = ap.parse_args(), time.perf_counter()
    found = []
    for kind, runs in sorted(trainings(args.runs).items()):
        found += of_trainings(kind, list(runs.values()))
    found += of_digits()
    command = "python tests/survey_alarms.py RUNS"
    if args.data_root:
        found += of_photographs(args.data_root)
        command += " --data-root DATA"
    config = {"window": WINDOW, "least": LEAST, "excursion": EXCURSION}
    config |= {"spreads": SPREADS, "groups": GROUPS}
    wall_s = time.perf_counter() - start
    print(save_results(args.results, "watching", "", command, config, found, wall_s))


if __name__ == "__main__":
    main()
