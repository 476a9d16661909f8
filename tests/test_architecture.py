"""The house: arrows run downwards, nothing runs in circles, modules stay small enough to read."""

import ast
import configparser
import sys
from collections import Counter
from pathlib import Path

import pytest

import bitflow_edu

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bitflow_edu"
LESSONS = (
    "data bijections coupling autoregressive transformer training evaluation tarflow exact_inverse "
    "improved_tarflow reverse_model inverse_strategies distances guidance editing speed imagenet "
    "neighbours"
).split()
WINGS = {"io": 0, "scale": 2, "lab": 3, "cli": 4}
LESSON = 1
EXCURSIONS = LESSON, LESSONS.index("speed") - 0.5  # they need lessons up to 15; lesson 16 uses them
LATE_EXCURSIONS = {"excursions.alignment": (LESSON, len(LESSONS))}  # after the last lesson
MAX_LINES, MAX_NAMES = 500, 450
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("_modidx.py", "__init__.py")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def own_imports(module: str):
    """The package's own modules that a module imports, wherever in it."""
    package = module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "bitflow_edu":
            base = []
        else:
            continue
        target = ".".join([*base, *filter(None, [node.module])]).removeprefix("bitflow_edu")
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            found = inner if inner in FILES else target.strip(".")
            if found:
                yield found


GRAPH = {name: set(own_imports(name)) for name in FILES}


def place(module: str) -> tuple:
    """Where a module stands: its wing, and for a lesson its number in the course."""
    wing, dot, _ = module.partition(".")
    if not dot:
        return LESSON, LESSONS.index(module)
    if wing == "excursions":
        return LATE_EXCURSIONS.get(module, EXCURSIONS)
    return (WINGS[wing],)


def test_every_module_has_a_place():
    assert [m for m in FILES if "." not in m and m not in LESSONS] == []
    assert {m.split(".")[0] for m in FILES if "." in m} == {*WINGS, "excursions"}


def test_imports_are_of_modules_that_exist():
    assert {(m, t) for m, targets in GRAPH.items() for t in targets if t not in FILES} == set()


@pytest.mark.parametrize("module", FILES)
def test_arrows_run_downwards(module):
    assert [t for t in GRAPH[module] if place(t) > place(module)] == []


def test_nothing_runs_in_circles():
    done = set()

    def visit(module, path):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in GRAPH[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


def required_packages() -> set:
    """What is always installed."""
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    words = settings["DEFAULT"]["requirements"].split()
    names = {word.split(">")[0].split("=")[0] for word in words}
    return (names - {"pillow", "pyyaml"}) | {"PIL", "yaml"}


@pytest.mark.parametrize("module", FILES)
def test_only_optional_packages_are_imported_inside_functions(module):
    always, late = required_packages() | set(sys.stdlib_module_names), []
    for node in ast.walk(TREES[module]):
        if node in TREES[module].body or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
        if isinstance(node, ast.ImportFrom) and node.level:
            late.append(f"line {node.lineno}: the package itself")
        # need a package or a system that is not always there, or cost every start half a second
        optional = ("torch.utils.tensorboard", "resource", "torchvision")
        optional += ("torch.distributed.fsdp", "torch.distributed.tensor")
        late += [
            f"line {node.lineno}: {n}"
            for n in names
            if n.split(".")[0] in always and n not in optional
        ]
    assert late == []


@pytest.mark.parametrize("module", FILES)
def test_modules_can_be_read_in_one_sitting(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def exported(module: str) -> list:
    """`__all__` of a module."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_few_names_are_exported_and_each_once():
    names = Counter(name for module in FILES for name in exported(module))
    assert sum(names.values()) <= MAX_NAMES
    assert [name for name, count in names.items() if count > 1] == []


def test_what_a_user_reaches_for():
    assert len(bitflow_edu.__all__) <= 12
    for name in bitflow_edu.__all__:
        assert getattr(bitflow_edu, name).__doc__, name
