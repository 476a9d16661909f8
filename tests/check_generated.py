"""Fail when nbdev_clean, nbdev_export or the README would leave a difference: new files count.

What is compared is the state before and after, so that uncommitted work does not matter.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WATCHED = ("nbs", "bitflow_edu", "README.md", "pyproject.toml")


def state():
    """Contents of every file that is generated or cleaned, by path."""
    files = [
        p
        for w in WATCHED
        for p in ([ROOT / w] if (ROOT / w).is_file() else sorted((ROOT / w).rglob("*")))
    ]
    skip = ("__pycache__", ".ipynb_checkpoints")
    return {
        str(p.relative_to(ROOT)): p.read_bytes()
        for p in files
        if p.is_file() and not any(s in p.parts for s in skip)
    }


def main():
    """Run the generators and name what they changed."""
    before, bin_ = state(), Path(sys.executable).parent
    for command in (
        [bin_ / "nbdev_clean"],
        [bin_ / "nbdev_export"],
        [sys.executable, ROOT / "nbs" / "make_readme.py"],
    ):
        subprocess.run(command, cwd=ROOT, check=True)
    after = state()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit(
            "changed by nbdev_clean, nbdev_export or make_readme.py, commit the result: "
            + ", ".join(changed)
        )


if __name__ == "__main__":
    main()
