"""A deck in Marp's Markdown: one file that holds its pictures."""

import base64
import html
import re

DARK = re.compile(r"@media \(prefers-color-scheme: dark\) *\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}")
FORMULA_AND_SIGN = re.compile(r"(?<![$\w])(\$[^$\n]+\$)([.,;:?!)'’]\w*)")
SIZES = {"large": 62, "usual": 84, "wide": 100, "widest": 115}  # columns of code that fit

FRONT = """---
marp: true
theme: bitflow
math: mathjax
paginate: true
lang: en
title: "{title}"
footer: "{footer}"
---
"""


def drawing(path):
    """A drawing as an address; its colours for dark pages are left out, since slides are light."""
    svg = DARK.sub("", path.read_text(encoding="utf-8"))
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def picture(block, folder):
    """An image element; `folder` is where paths of drawings begin."""
    if block.data.endswith(".svg"):
        source = drawing(folder / block.data)
    else:
        source = f"data:image/png;base64,{block.data}"
    return f'<div class="picture"><img alt="{html.escape(block.text)}" src="{source}"></div>'


def held_together(text):
    """No line begins with the full stop that follows a formula."""
    return FORMULA_AND_SIGN.sub(r'<span class="together">\1\2</span>', text)


def block_markdown(block, folder):
    """What Marp is to draw for a block."""
    if block.kind == "picture":
        return picture(block, folder)
    if block.kind == "formula":
        return block.text
    if block.kind in ("code", "output"):
        language = "python" if block.kind == "code" else "text"
        longest = max(map(len, block.text.splitlines()))
        size = next((name for name, fit in SIZES.items() if longest <= fit), "widest")
        text = f"```{language}\n{block.text}\n```"
        return f'<div class="{block.kind} {size}">\n\n{text}\n\n</div>'
    return f'<div class="{block.kind}">\n\n{held_together(block.text)}\n\n</div>'


def joined(blocks, folder):
    """All blocks of a slide; items in a row are one list."""
    parts, items = [], []
    for block in [*sorted(blocks, key=lambda block: block.kind == "caption"), None]:
        if block is not None and block.kind == "list":
            items.append(held_together(block.text))
            continue
        if items:
            parts.append('<div class="list">\n\n' + "\n".join(items) + "\n\n</div>")
            items = []
        if block is not None:
            parts.append(block_markdown(block, folder))
    return parts


def notes(slide):
    """What is said, as a comment. A first line that is no field of YAML keeps it a note."""
    if not slide.notes:
        return []
    text = "\n\n".join(slide.notes).replace("-->", "→")
    return [f"<!--\nNotes\n\n{text}\n-->"]


def slide_markdown(slide, folder):
    """One slide."""
    level = "#" if slide.kind == "lead" else "##"
    kind = [f"<!-- _class: {slide.kind} -->"] if slide.kind else []
    return "\n\n".join(
        [*kind, f"{level} {slide.title}", *joined(slide.blocks, folder), *notes(slide)]
    )


def deck_markdown(deck, footer, folder):
    """The whole deck."""
    title = deck.slides[0].title.replace('"', "'")
    front = FRONT.format(title=title, footer=footer)
    return front + "\n" + "\n\n---\n\n".join(slide_markdown(s, folder) for s in deck.slides) + "\n"
