"""Put the playground into one HTML file that runs from file://, without a network.

    python docs/playground/build.py [MODELS] [FILE.html]

MODELS is a folder of data/ with a pair of models, mnist-mini by default.
"""

import base64
import gzip
import json
import re
import sys
from pathlib import Path

from bitflow_edu.data import load_data
from bitflow_edu.io.datasets import DataConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILE = ROOT / "build" / "playground.html"
IMPORT = re.compile(r'^import \{[^}]*\} from "([^"]+)";\n', re.MULTILINE)
TOP_LEVEL = re.compile(r"^(?:async )?(?:function\*?|class|const|let) (\w+)", re.MULTILINE)


def modules_of(path, seen=()):
    """A JavaScript module and all that it imports, in the order in which they can run."""
    found = list(seen)
    for name in IMPORT.findall(path.read_text(encoding="utf-8")):
        imported = (path.parent / name).resolve()
        if imported not in found:
            found = modules_of(imported, found)
    return [*found, path]


def bundle(path):
    """The modules as one script: no imports, no exports, every name there once."""
    parts, owners = [], {}
    for module in modules_of(path):
        text = IMPORT.sub("", module.read_text(encoding="utf-8"))
        text = re.sub(r"^export ", "", text, flags=re.MULTILINE)
        for name in TOP_LEVEL.findall(text):
            if name in owners:
                sys.exit(f"{name} is defined in {owners[name]} and in {module.name}; rename one")
            owners[name] = module.name
        parts.append(f"// ---- {module.relative_to(HERE)}\n{text}")
    return "\n".join(parts)


def as_base64(data):
    """Bytes as text."""
    return base64.b64encode(data).decode("ascii")


def element(name, kind, text):
    """A script element that the browser does not run."""
    return f'<script type="{kind}" id="{name}">{text}</script>\n'


def test_digits(image_size, per_class=2):
    """Digits that no model has seen, the first ones of each class: {labels, …} and their bytes."""
    test = load_data(DataConfig("mnist-mini", image_size=image_size), "test")
    rows = [int((test.labels == c).nonzero()[i, 0]) for i in range(per_class) for c in range(10)]
    chosen = test[rows]
    facts = {"labels": chosen.labels.tolist(), "pixels_per_digit": image_size**2}
    return facts, chosen.pixels.numpy().tobytes()


def measured(name):
    """A sentence with the times of PyTorch from results/, or nothing where none were measured."""
    path = ROOT / "results" / f"demo-{name}.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    ms = {}
    for line in found["measurements"]:
        if line["metric"] == "ms_per_image" and line["batch"] == 1:
            ms[line["row"]] = line["value"]
    hardware = f"{found['hardware']['cpu']}, {found['hardware']['cores']} cores"
    times = f"{ms['exact']:.1f} ms and one pass of G {ms['one-pass']:.1f} ms"
    return f"In PyTorch ({hardware}) the exact inverse of one image takes {times}."


def data_of(name):
    """The weights as they are shipped (bfloat16), compressed; test digits; facts about both."""
    folder, parts, facts = ROOT / "data" / name, [], {}
    for kind in ("forward", "reverse"):
        facts[kind] = json.loads((folder / kind / "config.json").read_text(encoding="utf-8"))
        packed = gzip.compress((folder / kind / "model.safetensors").read_bytes(), 9, mtime=0)
        parts.append(element(kind, "text/plain", as_base64(packed)))
    cfg = facts["forward"]["config"]
    if cfg["channels"] != 1:
        sys.exit(f"{name} has {cfg['channels']} channels; one can draw digits in grey only")
    facts["test_digits"], pixels = test_digits(cfg["image_size"])
    facts["about"] = f"Models: {name}, as shipped, in bfloat16; computed in float64. "
    facts["about"] += measured(name)
    parts.append(element("test-digits", "text/plain", as_base64(pixels)))
    return "".join(parts) + element("facts-json", "application/json", json.dumps(facts))


def main(name="mnist-mini", file=FILE):
    """Write the page and say how large it is."""
    page = (HERE / "index.html").read_text(encoding="utf-8")
    script = bundle(HERE / "page" / "main.js")
    if "</script" in script:
        sys.exit("a module holds </script, which would end the page's script")
    inserts = {
        "/* STYLE */": (HERE / "style.css").read_text(encoding="utf-8"),
        "/* SCRIPT */": script,
        "<!-- DATA -->": data_of(name),
    }
    for mark, text in inserts.items():
        page = page.replace(mark, text, 1)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(page, encoding="utf-8")
    print(f"{file}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
