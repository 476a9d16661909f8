"""Malformed input for commands, files and functions: at random, and repeatable by seed and case.

    python tests/fuzz.py [--seconds 100] [--seed 0]     as many cases as fit into the time
    python tests/fuzz.py --seed 0 --case 17             one case again, with all that it printed

Each case runs in a process of its own, with bounds on memory and time. A case fails on a
traceback, an exit code other than 0 and 2, a crash, a hang, too much memory, or a file that was
written outside its output folder. Faults with the same last line count as one.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.update(MPLBACKEND="agg", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import bitflow_edu as b
from bitflow_edu import editing, guidance
from bitflow_edu.cli.main import main as bitflow
from bitflow_edu.data import Images, image_grid, patchify, unpatchify
from bitflow_edu.io.datasets import DataConfig
from bitflow_edu.io.files import BitflowError, asset
from bitflow_edu.scale.image_sources import find_source, synthetic_images

try:
    import resource
except ImportError:  # on Windows
    resource = None

MEMORY, SECONDS = 2 << 30, 30  # a case may take so many bytes more than its start, and CPU seconds
FILE_BYTES = 1 << 30
SMOKE = "--preset mnist-mini-smoke --device cpu".split()
LATENTS = "--preset imagenet256-b2-smoke --device cpu".split()


@dataclass
class Case:
    """What is tried: a command or a call, in folders of its own."""

    rng: random.Random
    home: Path  # of this case; only `out` below it may be written to
    material: Path  # intact files, never to be changed
    log: Path  # a file for what is done, as it is done: a case may not end by itself

    def copy(self, name: str) -> Path:
        """A piece of the material, to be damaged."""
        source, to = self.material / name, self.home / "in" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to)
        return to

    def run(self, *words) -> int:
        """A command; its output folder is the working folder."""
        words = [str(word) for word in words]
        self.note("bitflow " + " ".join(words).replace(str(self.home.parent), ""))
        return bitflow(words)

    def note(self, text):
        """Add to the description."""
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"; {str(text)[:300]}")


# --- odd values ---------------------------------------------------------------------------------

WORDS = "-1 0 1 3 1e9 0.5 nan inf -inf 1e400 0x10 9007199254740993 ../../x a/b /nowhere/x".split()
WORDS += ["", " ", "9" * 40, "x" * 300, "é", "%s", "{}", "[1, 2]", "null", "0,1,,7", "--", "*"]
WORDS += ["\n", "\udcff", "true", "-", "{0..9}", "cpu", "3,-1", "mnist-mini", "<b>"]
VALUES = [None, True, False, -1, 0, 1, 3, 0.5, -0.0, 10**9, 10**30, 1e308, float("nan")]
VALUES += [float("inf"), "", "x", "x" * 300, "NaN", "3", "../../x", [], {}, [1, 2], {"a": 1}, [[]]]


def nodes(tree, path=()):
    """The paths of all values in nested lists and dicts, the root's too."""
    yield path
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from nodes(tree[key], (*path, key))


def mutated(case: Case, tree):
    """A tree with one or two values replaced, left out, or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(case.rng.choice((1, 1, 2))):
        path, value = case.rng.choice(list(nodes(tree))), case.rng.choice(VALUES)
        if not path:
            if case.rng.random() < 0.3:
                case.note(f"all of it = {value!r}")
                return value
            continue
        inside = tree
        for key in path[:-1]:
            inside = inside[key]
        way = case.rng.choice(("replace", "replace", "replace", "delete", "add"))
        case.note(f"{way} {'.'.join(map(str, path))}: {value!r}")
        if way == "delete":
            del inside[path[-1]]
        elif way == "add" and isinstance(inside, dict):
            inside[case.rng.choice(("x", "", "__class__", "self"))] = value
        else:
            inside[path[-1]] = value
    return tree


class Code:
    """Whoever unpickles this writes a file where none may be."""

    def __reduce__(self):
        return os.mkdir, ("../unpickled",)


def damaged(case: Case, data: bytes) -> bytes:
    """Bytes that were cut, flipped, grown, emptied, or exchanged for a pickle."""
    rng, at = case.rng, case.rng.randrange(len(data) + 1)
    way = rng.choice(("cut", "flip", "insert", "zeros", "empty", "append", "pickle", "head"))
    case.note(f"bytes: {way} at {at}")
    if way == "cut":
        return data[:at]
    if way == "flip":
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if way in ("insert", "append"):
        at = at if way == "insert" else len(data)
        return data[:at] + rng.randbytes(rng.randrange(1, 50)) + data[at:]
    if way == "zeros":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    if way == "head":
        return rng.randbytes(16) + data[16:]
    return b"" if way == "empty" else pickle.dumps(Code())


def damage_json(case: Case, path: Path, lines: bool = False):
    """Change a JSON file, or one line of a file of JSON lines."""
    text = path.read_text(encoding="utf-8")
    if case.rng.random() < 0.25:
        path.write_bytes(damaged(case, text.encode()))
    elif lines:
        rows = text.splitlines()
        k = case.rng.randrange(len(rows))
        rows[k] = json.dumps(mutated(case, json.loads(rows[k])))
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(mutated(case, json.loads(text))), encoding="utf-8")


DTYPES = "float64 float16 bfloat16 int64 int32 uint8 bool".split()


def odd_tensor(case: Case, t: torch.Tensor) -> torch.Tensor:
    """A tensor of another type, shape or value."""
    way = case.rng.choice(("dtype", "shape", "grown", "nan", "huge", "empty", "scalar"))
    case.note(way)
    if way == "dtype":
        return t.to(getattr(torch, case.rng.choice(DTYPES)))
    if way == "shape":
        return t.reshape(-1) if t.dim() != 1 else t[None]
    if way == "grown":
        return torch.cat([t, t]) if t.dim() else t[None]
    if way == "nan":
        return torch.full_like(t, float("nan")) if t.is_floating_point() else t
    if way == "huge":
        return torch.full_like(t, 3e38) if t.is_floating_point() else t
    return torch.zeros(0) if way == "empty" else torch.zeros(())


def damage_tensors(case: Case, path: Path):
    """Change a safetensors file: a tensor, its header, or its bytes."""
    data, way = path.read_bytes(), case.rng.choice(("tensor", "tensor", "header", "bytes"))
    if way == "bytes":
        return path.write_bytes(damaged(case, data))
    if way == "header":
        (size,) = struct.unpack("<Q", data[:8])
        header = json.dumps(mutated(case, json.loads(data[8 : 8 + size]))).encode()
        length = case.rng.choice((len(header),) * 4 + (0, 2**63, 10**8))
        return path.write_bytes(struct.pack("<Q", length) + header + data[8 + size :])
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    name = case.rng.choice(sorted(tensors))
    case.note(name)
    if case.rng.random() < 0.25:
        t = tensors.pop(name)
        if case.rng.random() < 0.5:
            tensors[case.rng.choice(("x", "", name + ".x"))] = t
    else:
        tensors[name] = odd_tensor(case, tensors[name]).contiguous()
    save_file(tensors, path)


# --- the families of cases ----------------------------------------------------------------------


def use_checkpoint(case: Case, model: Path, kind: str) -> int:
    """A command that reads a checkpoint."""
    f = model if kind == "f" else case.material / "f"
    samples = ["sample", "--checkpoint", model, "--n", 3, "--device", "cpu", "--out", "s.png"]
    ways = [["info", "--checkpoint", model], samples, [*samples, "--w", 1, "--labels", "0,1"]]
    if kind == "f":
        ways += [[*samples, "--denoise"]]
        ways += [["train", "reverse", *SMOKE, "--forward", f, "--steps", 1, "--out", "g"]]
    if kind in "fg":
        pair = ["--forward", f, "--reverse", model] if kind == "g" else ["--forward", f]
        few = ["--n", 4, "--no-timing", "--out", "e.json"]
        ways += [["evaluate", *SMOKE, *pair, *few]]
    return case.run(*case.rng.choice(ways))


def config_of_a_model(case: Case) -> int:
    """A checkpoint whose config.json is not what it was."""
    kind = case.rng.choice(("f", "g", "glow"))
    model = next(case.copy(kind).glob("checkpoints/*"))
    damage_json(case, model / "config.json")
    return use_checkpoint(case, model, kind)


def weights_of_a_model(case: Case) -> int:
    """A checkpoint whose weights are not what they were."""
    kind = case.rng.choice(("f", "g", "glow"))
    model = next(case.copy(kind).glob("checkpoints/*"))
    damage_tensors(case, model / "model.safetensors")
    return use_checkpoint(case, model, kind)


def files_of_a_run(case: Case) -> int:
    """A run that is gone on with, or looked at, after a file of it was changed."""
    kind = case.rng.choice(("f", "g"))
    run = case.copy(kind)
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix != ".png"]
    path = case.rng.choice(files)
    case.note(path.relative_to(run))
    if case.rng.random() < 0.15:
        path.unlink()
        if case.rng.random() < 0.5:
            path.mkdir()
    elif path.suffix == ".json":
        damage_json(case, path)
    elif path.suffix == ".jsonl":
        damage_json(case, path, lines=True)
    elif path.suffix == ".safetensors":
        damage_tensors(case, path)
    else:
        path.write_bytes(damaged(case, path.read_bytes()))
    out = case.home / "out" / "run"
    shutil.move(run, out)
    stage = ["forward"] if kind == "f" else ["reverse", "--forward", case.material / "f"]
    every = [f"--train-{stage[0]}.checkpoint-every", 1]
    if case.rng.random() < 0.5:  # there is a step to do
        shutil.rmtree(out / "checkpoints" / "step-00000002")
        case.note("without step 2")
    resume = ["train", *stage, *SMOKE, "--steps", 2, *every, "--resume", "--out", out]
    return case.run(*case.rng.choice((resume, resume, resume, ["watch", out])))


def options(case: Case) -> int:
    """Commands with options that make no sense, or a little."""
    rng, f, g = case.rng, case.material / "f", case.material / "g"
    short = ["--n", 3, "--device", "cpu"]
    commands = {
        ("sample", "--checkpoint", g, *short): "--labels --temperature --w --columns --seed --out "
        "--vae --device --checkpoint --denoise",
        ("info", *SMOKE[:2]): "--fields --yaml --mfu --peak-tflops --seed --data-root --config "
        "--preset --forward.patch-size --forward.num-blocks --train-forward.lr --data.num-classes",
        ("train", "forward", *SMOKE, "--steps", 1): "--out --batch-size --lr --patch-size --seed "
        "--sharding --minutes --data-root --resume --train-forward.log-every --num-samples "
        "--train-forward.num-microbatches --train-forward.warmup --train-forward.ema --name",
        ("train", "reverse", *SMOKE, "--steps", 1, "--forward", f): "--strategy --out --batch-size "
        "--reverse.max-guidance --distances --train-reverse.precision --seed --forward",
        ("evaluate", *SMOKE, "--forward", f, "--reverse", g, "--n", 4, "--no-timing"): "--w --out "
        "--features --weights --reference --rows --vae --batch-size --work --seed --resume",
        ("watch", f): "--tensorboard --run",
        ("export", g, "--format", "torch", "--out", "e"): "--w --half --states --format --out",
        ("cache-latents", "--source", case.material / "pictures", "--out", "l", "--vae", "x"): ""
        "--split --image-size --precision --per-shard --num-classes --max-corrupt --workers",
    }
    words = list(rng.choice(list(commands.items())))
    command, flags = list(words[0]), words[1].split()
    for _ in range(rng.randrange(1, 4)):
        flag = rng.choice(flags)
        command.append(flag)
        if rng.random() < 0.9:
            word = rng.choice(WORDS)  # a mirror is written wherever it is named, so not outside
            command.append("a/b" if flag == "--tensorboard" and "/" in word else word)
    if rng.random() < 0.1:
        command.insert(rng.randrange(len(command)), rng.choice(WORDS))
    return case.run(*command)


def preset(case: Case) -> int:
    """YAML with odd fields, tags, aliases, depth."""
    rng, path = case.rng, case.home / "in" / "preset.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (case.material / "preset.yaml").read_text(encoding="utf-8")
    odd = {
        "tag": "num_samples: !!python/object/apply:os.mkdir [../tagged]\n",
        "nested": "num_samples: " + "[" * 5000 + "\n",
        "aliases": "a: &a [x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n"
            for i in range(9)
        ),
        "itself": "&a [*a]\n",
        "binary": "name: !!binary aGk=\nnum_samples: !!set {1, 2}\n",
        "date": "name: 2001-01-01\nforward: 12:30:45\n",
        "merge": "<<: {num_samples: 3}\n? [1, 2]\n: 3\n",
    }  # fmt: skip
    way = rng.choice(("fields", "fields", "fields", "fields", "bytes", *odd))
    case.note(way)
    if way == "fields":
        tree = mutated(case, yaml.safe_load(text))
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    else:
        path.write_bytes(damaged(case, text.encode()) if way == "bytes" else odd[way].encode())
    given = ["--config", path]
    train = ["train", "forward", *given, "--device", "cpu", "--steps", 1]
    return case.run(*rng.choice((["info", *given], train, [*train, "--out", "f"])))


def picture(case: Case) -> bytes:
    """An image file of any mode, size and format, or something that is none."""
    rng = case.rng
    mode = rng.choice("1 L LA La P PA RGB RGBA RGBa CMYK YCbCr HSV LAB I F I;16 I;16B".split())
    size = rng.choice(((1, 1), (8, 8), (1, 900), (900, 1), (17, 5)))
    form = rng.choice("PNG JPEG GIF BMP TIFF WEBP PPM ICO EPS TGA PDF".split())
    case.note(f"{form} {mode} {size}")
    data = io.BytesIO()
    try:
        Image.new(mode, size).save(data, form)
    except (OSError, ValueError, KeyError):
        data = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    found = data.getvalue()
    if form == "PNG" and rng.random() < 0.2:  # claims to be 60,000 pixels wide
        case.note("wide")
        return found[:16] + struct.pack(">II", 60000, 60000) + found[24:]
    return damaged(case, found) if rng.random() < 0.3 else found


NAMES = "a.png a.jpg A.JPEG .hidden.png a.tif é.bmp a.png.txt a.webp a.eps x..png a.jpg~".split()


def image_folder(case: Case) -> int:
    """Folders of pictures that are none, or odd ones, in odd places."""
    rng, root = case.rng, case.copy("pictures")
    classes = [p for p in sorted(root.glob("*/*")) if p.is_dir()]
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice(classes) / rng.choice(("", "", "", "more", ".more")) / rng.choice(NAMES)
        way = rng.choice(("file", "file", "file", "file", "folder", "link", "loop", "gone"))
        case.note(f"{way} {path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        if way == "file":
            path.write_bytes(picture(case))
        elif way == "folder":
            path.mkdir()
        elif way == "link":
            path.symlink_to("nowhere.png")
        elif way == "loop":
            path.symlink_to("..", target_is_directory=True)
        else:
            shutil.rmtree(rng.choice(classes), ignore_errors=True)
    small = ["--preset", "image-folder-smoke", "--device", "cpu", "--data-root", root]
    if rng.random() < 0.5:
        split, size = rng.choice(("train", "test", "val", "")), rng.choice((1, 8, 33))
        b.load_data(DataConfig("image-folder", size, rng.choice((1, 3)), 2), split, root)
        return 0
    return case.run("train", "forward", *small, "--steps", 1, "--out", "f")


def tar_of(case: Case, path: Path):
    """A tar file of samples, with odd names, kinds and labels."""
    rng = case.rng
    mode = rng.choice(("w", "w", "w:gz"))
    with tarfile.open(path, mode) as tar:
        for i in range(rng.randrange(0, 4)):
            name = rng.choice((f"{i:03d}", "../../x", "/x", "a/b.c", "", "é", "s" * 200))
            for kind in rng.sample(("jpg", "cls", "png", "json", "input.jpg", "JPG", "txt"), 2):
                member = tarfile.TarInfo(f"{name}.{kind}")
                odd = rng.choice((b"0", b"1", b"-1", b"99999999999999999999", b"x", b"", b"\xff"))
                data = picture(case) if kind.lower() in ("jpg", "png", "input.jpg") else odd
                member.type = rng.choice(
                    (tarfile.REGTYPE,) * 5 + (tarfile.SYMTYPE, tarfile.DIRTYPE)
                )
                member.linkname, member.size = "../../x", len(data)
                case.note(f"{member.name[-20:]} {member.type!r} {odd[:5]!r}")
                tar.addfile(member, io.BytesIO(data))
    if rng.random() < 0.3:
        path.write_bytes(damaged(case, path.read_bytes()))


def tars(case: Case) -> int:
    """Tar shards as `cache-latents` reads them."""
    path = case.home / "in" / case.rng.choice(("s.tar", "s-000.tar", "é.tar", "s.tar.gz"))
    path.parent.mkdir(parents=True)
    tar_of(case, path)
    source = case.rng.choice((path, path, path.parent / "*", path.parent / "s-{000..002}.tar"))
    if (case.material / "vae").exists() and case.rng.random() < 0.6:
        small = "--image-size 16 --batch-size 4 --num-classes 10 --device cpu --out l".split()
        return case.run("cache-latents", "--source", source, "--vae", case.material / "vae", *small)
    opened = find_source(source, num_classes=10).open()
    for k in range(len(opened.names)):
        list(opened.read(k))
    return 0


def arrays(case: Case) -> int:
    """A data set in arrays that is not what it says."""
    rng, root = case.rng, case.copy("arrays")
    path = root / "mnist-mini.npz"
    with np.load(path) as file:
        found = {name: file[name] for name in file}
    name = rng.choice(sorted(found))
    way = rng.choice("dtype shape gone object values short bytes bytes".split())
    case.note(f"{name}: {way}")
    if way == "bytes":
        path.write_bytes(damaged(case, path.read_bytes()))
    else:
        a = found.pop(name)
        new = {
            "dtype": a.astype(rng.choice((np.float32, np.int64, np.bool_, np.complex64, "U3"))),
            "shape": a.reshape(-1)[: len(a)] if a.ndim > 1 else a[:, None],
            "object": np.array([Code()] * len(a), dtype=object),
            "values": np.full_like(a, rng.choice((0, 10, 200))),
            "short": a[: rng.randrange(3)],
        }
        found |= {} if way == "gone" else {name: new[way]}
        np.savez(path, **found)
    train = ["train", "forward", *SMOKE, "--steps", 1, "--data-root", root, "--out", "f"]
    models = ["--forward", case.material / "f", "--n", 4, "--no-timing"]
    evaluate = ["evaluate", *SMOKE, *models, "--data-root", root, "--out", "e.json"]
    return case.run(*rng.choice((train, evaluate)))


def latents(case: Case) -> int:
    """Cached latents whose index or shards were changed."""
    root = case.copy("latents")
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    path = case.rng.choice(files)
    case.note(path.relative_to(root))
    if path.suffix == ".json":
        damage_json(case, path)
    elif path.suffix == ".safetensors":
        damage_tensors(case, path)
    else:
        path.write_bytes(damaged(case, path.read_bytes()))
    train = ["train", "forward", *LATENTS, "--steps", 1, "--data-root", root, "--out", "f"]
    source = ["--source", case.material / "pictures", "--vae", case.material / "vae"]
    again = ["cache-latents", *source, "--image-size", 16, "--out", root, "--device", "cpu"]
    return case.run(*case.rng.choice((train, train, again)))


def tensor_of(case: Case, *shape) -> torch.Tensor:
    """A tensor of this shape, or nearly, of one type or another."""
    rng, shape = case.rng, list(shape)
    way = rng.choice(("right", "right", "less", "more", "longer", "empty", "type", "nan"))
    if shape and way in ("less", "more", "longer", "empty"):
        k = rng.randrange(len(shape))
        shape = {
            "less": shape[:k] + shape[k + 1 :],
            "more": shape[:k] + [1] + shape[k:],
            "longer": shape[:k] + [shape[k] + 1] + shape[k + 1 :],
            "empty": shape[:k] + [0] + shape[k + 1 :],
        }[way]
    t = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if way == "type":
        t = (t * 100).to(getattr(torch, rng.choice(DTYPES)))
    if way == "nan":
        t = t * float("nan")
    case.note(f"{t.dtype} {tuple(t.shape)}{' nan' if way == 'nan' else ''}")
    return t


def labels_of(case: Case, n: int):
    """Labels for n images, or nearly."""
    ways = ([0] * n, [-1] * n, [0] * (n + 1), [10] * n, [-2] * n, [0.0] * n, [], [[0]] * n)
    c = torch.tensor(case.rng.choice(ways))
    if case.rng.random() < 0.2:
        c = c.to(getattr(torch, case.rng.choice(DTYPES)))
    case.note(f"labels {c.dtype} {c.flatten()[:1].tolist()} {tuple(c.shape)}")
    return c


def calls(case: Case) -> int:
    """Public functions with tensors of other shapes, types and values."""
    F = b.load_model(case.material / "f", b.TARFlow)
    G = b.load_model(case.material / "g", b.ReverseModel)
    n, cfg, rng = 2, F.cfg, case.rng
    z = tensor_of(case, n, cfg.num_tokens, cfg.token_dim)
    x = tensor_of(case, n, cfg.channels, cfg.image_size, cfg.image_size)
    c, w = labels_of(case, n), rng.choice((None, 0, 1.0, -1, float("nan"), x))
    number, word = rng.choice((0, -1, 1, 3, 0.5, float("nan"), 2**63)), rng.choice(WORDS)
    pixels = tensor_of(case, n, 1, 16, 16)
    table = {
        "one_pass": lambda: b.one_pass(G, z, c, w),
        "one_pass of F": lambda: b.one_pass(F, z, c),
        "exact_inverse": lambda: b.exact_inverse(F, z, c),
        "exact_inverse of G": lambda: b.exact_inverse(G, z, c),
        "F": lambda: F(x, c),
        "G": lambda: G(z, c),
        "guided_pass": lambda: guidance.guided_pass(G, z, c, w),
        "Guidance": lambda: guidance.Guidance(number),
        "encode": lambda: editing.encode(F, x, c),
        "decode": lambda: editing.decode(G, z, c, w),
        "edit_class": lambda: editing.edit_class(F, G, x, c, labels_of(case, n)),
        "inpaint": lambda: editing.inpaint(F, G, x, tensor_of(case, 16, 16) > 0, c),
        "patchify": lambda: patchify(x, number),
        "unpatchify": lambda: unpatchify(z, number, 1),
        "Images": lambda: Images(pixels, c, tuple("0123456789")).draw(torch.arange(2)),
        "image_grid": lambda: image_grid(x, number),
        "load_pretrained": lambda: b.load_pretrained(word),
        "find_preset": lambda: b.find_preset(word),
        "load_model": lambda: b.load_model(case.material / word, b.TARFlow),
        "DataConfig": lambda: DataConfig("mnist-mini", number, 1, 10),
        "load_data": lambda: b.load_data(DataConfig("mnist-mini", 16, 1, 10), word),
    }
    name = rng.choice(sorted(table))
    case.note(f"{name}, w = {w if w is not x else 'images'}, number = {number!r}, word = {word!r}")
    table[name]()
    return 0


FAMILIES = (options, config_of_a_model, weights_of_a_model, files_of_a_run, preset, calls)
FAMILIES += (image_folder, tars, arrays, latents, calls, options)


# --- a case in a process of its own -------------------------------------------------------------


def make_material(folder: Path):
    """Small intact models, runs, pictures, arrays and latents."""
    few = ["--steps", "2", "--device", "cpu", "--preset"]
    each = [[f"--train-{stage}.checkpoint-every", "1"] for stage in ("forward", "reverse")]
    with contextlib.redirect_stdout(io.StringIO()):
        bitflow(["train", "forward", *few, "mnist-mini-smoke", "--out", f"{folder}/f", *each[0]])
        words = ["--forward", f"{folder}/f", "--out", f"{folder}/g"]
        bitflow(["train", "reverse", *few, "mnist-mini-smoke", *words, *each[1]])
        bitflow(["train", "forward", *few, "mnist-glow-smoke", "--out", f"{folder}/glow"])
        bitflow(["info", *SMOKE[:2], "--yaml", f"{folder}/preset.yaml"])
    for split in ("train", "test"):
        synthetic_images(folder / "pictures", 16, split)
    (folder / "arrays").mkdir()
    with np.load(asset("mnist-mini.npz")) as file:
        np.savez(folder / "arrays" / "mnist-mini.npz", **{name: file[name][:60] for name in file})
    try:
        from bitflow_edu.scale.autoencoder import tiny_vae

        tiny_vae(folder / "vae")
    except BitflowError:  # without diffusers there are no latents to damage
        return
    source = ["--source", folder / "pictures", "--vae", folder / "vae", "--out", folder / "latents"]
    small = "--image-size 16 --per-shard 8 --device cpu".split()
    with contextlib.redirect_stdout(io.StringIO()):
        for split in ("train", "test"):
            bitflow(["cache-latents", *map(str, source), *small, "--split", split])


def limit():
    """Bound this process's memory, processor time and files, where the system can."""
    if resource is None:
        return
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def child(seed: int, number: int, work: Path):
    """Carry out one case; what it says goes into files beside its folders."""
    torch.set_num_threads(1)
    home, material = case_home(work), work / "material"
    (home / "out").mkdir(parents=True)
    said, errors = (os.open(work / n, os.O_WRONLY | os.O_CREAT) for n in ("stdout", "stderr"))
    os.dup2(said, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
    if number < 0:
        make_material(material)
        assert (material / "preset.yaml").exists() and (material / "g").exists(), "no material"
        return
    case = Case(random.Random(f"{seed}/{number}"), home, material, work / "description")
    family = FAMILIES[number % len(FAMILIES)]
    os.chdir(home / "out")
    try:
        limit()
        code = family(case)
    except BitflowError:
        code = 2
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)


def case_home(work: Path) -> Path:
    """The folder of a case, deep enough for `../..` to end where it is seen."""
    return work / "a" / "b" / "c" / "case"


def listing(work: Path) -> dict:
    """Every file that a case must leave as it is, with its size and time."""
    skip = (case_home(work) / "out", case_home(work) / "in", work / "stdout", work / "stderr")
    found = {}
    for folder, _, names in os.walk(work):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            if not any(path == s or s in path.parents for s in (*skip, work / "description")):
                status = path.lstat()
                times = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
                found[str(path.relative_to(work))] = times
    return found


def start(seed: int, number: int, work: Path) -> multiprocessing.Process | None:
    """A case in a new process, waited for; None for one that took too long and was ended."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    process = context.Process(target=child, args=(seed, number, work))
    process.start()
    process.join(240 if number < 0 else 2 * SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process


@dataclass
class Fault:
    """What went wrong in a case."""

    key: str  # equal for equal faults
    place: str  # innermost line of this package
    number: int  # of the case
    description: str


def fault_in(text: str) -> tuple:
    """The last line of a traceback with its numbers left out, and where it arose."""
    tail = text[text.rindex("Traceback (most recent call last)") :]
    tail = re.split(r"\n\n(?:During handling|The above exception)", tail)[-1]
    raised = [line for line in tail.splitlines() if re.match(r"[A-Za-z_][\w.]*(:|$)", line)]
    raised = [line for line in raised if not line.startswith("Traceback")] or ["no last line"]
    places = re.findall(r'bitflow_edu/(\S+)", line (\d+), in (\S+)', tail)
    place = "{}:{} {}".format(*places[-1]) if places else "outside of bitflow_edu"
    line = re.sub(r"/\S+", "/…", raised[-1])
    return re.sub(r"\d+", "#", line)[:160], place


def judge(process, before: dict, work: Path) -> tuple | None:
    """What was wrong with a finished case, and where; None for nothing."""
    text = (work / "stderr").read_text(encoding="utf-8", errors="replace")
    if new := sorted(set(listing(work).items()) ^ set(before.items())):
        return f"a file outside the output folder: {re.sub(r'[0-9]+', '#', new[0][0])}", ""
    if process is None or process.exitcode in (-24, -9):  # SIGXCPU, SIGKILL
        return f"a hang of more than {SECONDS} s", text.strip()[-100:]
    if "Traceback (most recent call last)" in text:
        return fault_in(text)
    if process.exitcode not in (0, 2):
        return f"exit code {process.exitcode}", text.strip()[-100:]
    return None


def run_case(seed: int, number: int, work: Path) -> Fault | None:
    """One case, judged."""
    shutil.rmtree(work / "a", ignore_errors=True)
    for name in ("stdout", "stderr", "description"):
        (work / name).unlink(missing_ok=True)
        (work / name).touch()
    case_home(work).mkdir(parents=True)
    before = listing(work)
    process = start(seed, number, work)
    found = judge(process, before, work)
    if found is None:
        return None
    family = FAMILIES[number % len(FAMILIES)].__name__
    return Fault(*found, number, family + (work / "description").read_text(encoding="utf-8"))


def report(faults: list, seed: int):
    """Print each kind of fault once, with the case that shows it."""
    kinds = {}
    for fault in faults:
        kinds.setdefault(fault.key, []).append(fault)
    for i, (key, found) in enumerate(sorted(kinds.items(), key=lambda item: -len(item[1])), 1):
        first = found[0]
        print(f"\n{i}. {key}\n   {len(found)} cases; {first.place}")
        print(f"   {first.description[:500]}")
        print(f"   again: python tests/fuzz.py --seed {seed} --case {first.number}")


def main() -> int:
    """The script; 1 where a fault was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, with its output")
    args = parser.parse_args()
    begun, faults, number = time.monotonic(), [], 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        case_home(work).mkdir(parents=True)
        made = start(args.seed, -1, work)
        if made is None or made.exitcode:
            sys.exit((work / "stderr").read_text(encoding="utf-8")[-3000:])
        if args.case is not None:
            fault = run_case(args.seed, args.case, work)
            print((work / "description").read_text(encoding="utf-8"))
            print((work / "stdout").read_text(errors="replace")[-3000:])
            print((work / "stderr").read_text(errors="replace")[-6000:])
            report([fault] if fault else [], args.seed)
            return int(fault is not None)
        while time.monotonic() - begun < args.seconds:
            if fault := run_case(args.seed, number, work):
                faults.append(fault)
            number += 1
    report(faults, args.seed)
    print(f"\n{number} cases, seed {args.seed}: {len(faults)} with a fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
