"""Code for a slide: a cell, or functions and methods of it, without docstrings."""

import ast
import re

DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def shown_code(source, names=()):
    """The code, or of it what the names name, without docstrings. `A.f` is method f of class A."""
    lines = source.strip("\n").splitlines()
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:  # a command of IPython
        return "\n".join(lines)
    hidden, places = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                hidden |= set(lines_of(node.body[0]))
            places[node.name] = lines_of(node)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, DEFINITIONS):
                    places[f"{node.name}.{inner.name}"] = lines_of(inner)
    if not names:
        return squeezed(lines, range(1, len(lines) + 1), hidden)
    parts, opened = [], ""
    for name in names:
        owner = name.rpartition(".")[0]
        if owner and owner != opened:
            head = next(n for n in places[owner] if lines[n - 1].startswith("class "))
            parts.append(squeezed(lines, [head, *places[name]], hidden))
        else:
            parts.append(squeezed(lines, places[name], hidden, indented=bool(owner)))
        opened = owner
    return "\n\n".join(parts)


def lines_of(node):
    """The numbers of the lines of a statement, its decorators included."""
    decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
    return range(min([node.lineno, *decorators]), node.end_lineno + 1)


def squeezed(lines, numbers, hidden, indented=False):
    """Lines of these numbers, but for hidden ones, moved to the left, no two empty in a row."""
    kept = [lines[number - 1] for number in numbers if number not in hidden]
    if not indented:
        indent = min((len(line) - len(line.lstrip()) for line in kept if line), default=0)
        kept = [line[indent:] for line in kept]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
