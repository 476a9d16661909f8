"""kill -9 at random moments, go on, and compare with work that nobody touched, bit for bit.

    python tests/kills.py              20 kills: of F, of G, of an evaluation, of a cache of latents
    python tests/kills.py --kills 4    fewer (one of each)

Writes results/kills.json: how many kills hit, how many values were compared, how many differ,
and the steps between the newest whole checkpoint and the last logged step that a kill lost at most.
Not a test that pytest collects: it takes many minutes, most of them to start programs. Moments
are counted in seconds of the processor, which do not depend on what else it does (Linux).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bitflow_edu.io.checkpoints import read_metrics, read_state
from bitflow_edu.io.models import checkpoints_of, newest_checkpoint
from bitflow_edu.io.results import measurement, save_results
from bitflow_edu.scale.autoencoder import tiny_vae
from bitflow_edu.scale.image_sources import synthetic_images

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ["--preset", "mnist-mini-smoke", "--device", "cpu"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OFTEN = ["--train-{}.checkpoint-every", "14", "--train-{}.log-every", "1", "--steps", "60"]


def begin(words):
    command = [sys.executable, "-m", "bitflow_edu.cli", *map(str, words)]
    output = tempfile.TemporaryFile()
    process = subprocess.Popen(command, env=ENV, stdout=output, stderr=output)
    process.output = output
    return process


def check_ended(process, *codes):
    """The process ended with one of these codes, or what it said is shown."""
    process.output.seek(0)
    assert process.returncode in codes, process.output.read().decode()[-2000:]


class Training:
    """F or G; what counts are all tensors of the last checkpoint, and the logged losses."""

    def __init__(self, home, stage):
        self.home, self.name = home, stage
        self.more = ["--forward", home / "whole-forward"] if stage == "reverse" else []

    def words(self, name, again):
        often = [word.format(self.name) for word in OFTEN]
        words = ["train", self.name, *SMOKE, *often, *self.more, "--out", self.home / name]
        return [*words, "--resume"] if again else words

    def result(self, name):
        state = read_state(newest_checkpoint(self.home / name))
        lines = read_metrics(self.home / name / "metrics.jsonl")
        losses = {"losses": torch.tensor([[m["step"], m["loss"]] for m in lines])}
        return {**state["averaged"], **state["training"], **losses}

    def finished(self, name):
        return (self.home / name / "checkpoints" / "step-00000060").exists()

    def lost(self, name):
        """Finished steps that are in no whole checkpoint."""
        log = self.home / name / "metrics.jsonl"
        saved = [int(p.name[5:]) for p in checkpoints_of(self.home / name)]
        logged = [m["step"] for m in read_metrics(log)] if log.exists() else []
        return max([0, *logged]) - max([0, *saved])


class Evaluation:
    """A stream of samples of both models; what counts are all values in the results file."""

    name = "evaluate"

    def __init__(self, home):
        self.home = home

    def words(self, name, again):
        pair = ["--forward", self.home / "whole-forward", "--reverse", self.home / "whole-reverse"]
        words = ["evaluate", *SMOKE, *pair, "--features", "mnist-cnn", "--no-timing", "--n", 80]
        words += ["--batch-size", 4, "--work", self.home / name, "--out", self.out(name)]
        return [*words, "--resume"] if again else words

    def out(self, name):
        return self.home / f"{name}.json"

    def result(self, name):
        lines = json.loads(self.out(name).read_text(encoding="utf-8"))["measurements"]
        return {(m["row"], m["metric"]): torch.tensor(m["value"]) for m in lines}

    def finished(self, name):
        return self.out(name).exists()


class Latents:
    """Shards of latents; what counts are their bytes."""

    name = "cache-latents"

    def __init__(self, home):
        self.home, self.vae = home, tiny_vae(home / "vae")
        synthetic_images(home / "images", 240, "train")

    def words(self, name, again):
        words = ["cache-latents", "--source", self.home / "images", "--vae", self.vae]
        words += ["--image-size", 16, "--per-shard", 8, "--batch-size", 4, "--device", "cpu"]
        return [*words, "--out", self.home / name]

    def result(self, name):
        shards = sorted((self.home / name / "train" / "shards").glob("*.safetensors"))
        return {p.name: torch.tensor(bytearray(p.read_bytes())) for p in shards}

    def finished(self, name):
        return (self.home / name / "train" / "index.json").exists()


def wait_until(process, seconds) -> float:
    """Wait until a process has ended, or used the processor for so long: what it had used."""
    used = 0.0
    while process.poll() is None and used < seconds:
        time.sleep(0.02)
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            used = max(used, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"))
    return used


def whole(work):
    """The undisturbed result, and how many seconds it took."""
    process = begin(work.words(f"whole-{work.name}", False))
    seconds = wait_until(process, float("inf"))
    check_ended(process, 0)
    return work.result(f"whole-{work.name}"), seconds


def disturbed(work, name, kills, seconds, draw) -> list:
    """The same, killed at most so many times, and gone on with: the steps that each kill lost."""
    hits, again = [], False
    while not work.finished(name):
        process, again = begin(work.words(name, again)), True
        last = len(hits) >= kills
        wait_until(process, float("inf") if last else draw.uniform(0.4, 1.0) * seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hits.append(work.lost(name) if isinstance(work, Training) else 0)
        check_ended(process, 0, -signal.SIGKILL)
    return hits


def check(work, kills, draw):
    """Kill it until there were enough, in as many tries as it takes: lines, and what differs."""
    expected, seconds = whole(work)
    tries = count = 0
    hits, other = [], []
    while len(hits) < kills and tries < 3 * kills:
        name, tries = f"{work.name}-{tries}", tries + 1
        hits += disturbed(work, name, kills - len(hits), seconds, draw)
        found = work.result(name)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        other += [f"{name} {k}" for k in expected if not torch.equal(expected[k], found[k])]
        count += len(expected)
    print(f"{work.name}: {len(hits)} kills in {tries} tries, {len(other)} of {count} values differ")
    numbers = {"kills": len(hits), "values": count, "differing_values": len(other)}
    if isinstance(work, Training):
        numbers["steps_lost_at_most"] = max(hits)
    return [measurement(work.name, metric, value) for metric, value in numbers.items()], other


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default=str(ROOT / "results"), help="where the file goes")
    args, lines, wrong = parser.parse_args(), [], []
    draw, start = random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        works = [Training(home, "forward"), Training(home, "reverse"), Evaluation(home)]
        works.append(Latents(home))
        for i, work in enumerate(works):
            found, other = check(work, args.kills // 4 + (i < args.kills % 4), draw)
            lines, wrong = lines + found, wrong + other
    command = f"python tests/kills.py --kills {args.kills} --seed {args.seed}"
    config = {"seed": args.seed, "preset": SMOKE[1]}
    took = time.perf_counter() - start
    print(save_results(Path(args.results), "kills", SMOKE[1], command, config, lines, took))
    sys.exit(f"these differ: {wrong[:5]}" if wrong else 0)


if __name__ == "__main__":
    main()
