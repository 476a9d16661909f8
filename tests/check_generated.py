"""Fail when what writes notebooks, modules or the README would leave a difference, in any folder.

New files count, and so do modules that no notebook writes any more. What is compared is the
state before and after, so that uncommitted work does not matter.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("finish_notebooks.py", "make_readme.py")
WATCHED = ("nbs", "bitflow_edu", "README.md", "pyproject.toml")


def state():
    """Contents of every file that is generated or cleaned, by path."""
    found = {}
    for watched in (ROOT / w for w in WATCHED):
        for path in [watched, *watched.rglob("*")]:
            passing = {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
            if path.is_file() and not passing:
                found[str(path.relative_to(ROOT))] = path.read_bytes()
    return found


def orphans():
    """Modules whose notebook was moved or deleted: nbdev_export leaves them where they are."""
    found = []
    for path in sorted((ROOT / "bitflow_edu").rglob("*.py")):
        source = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
        if source and not (path.parent / source[1]).exists():
            found.append(str(path.relative_to(ROOT)))
    return found


def main():
    """Run the generators and name what they changed."""
    before, bin_ = state(), Path(sys.executable).parent
    finish, readme = ([sys.executable, ROOT / "nbs" / name] for name in SCRIPTS)
    for command in ([bin_ / "nbdev_clean"], finish, [bin_ / "nbdev_export"], readme):
        subprocess.run(command, cwd=ROOT, check=True)
    after = state()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        by = f"changed by nbdev_clean, nbdev_export, {' or '.join(SCRIPTS)}, commit the result: "
        sys.exit(by + ", ".join(changed))
    if left := orphans():
        sys.exit("no notebook writes these any more, delete them: " + ", ".join(left))


if __name__ == "__main__":
    main()
