"""Markdown of a notebook in pieces: paragraphs, sentences, list items; words and marks."""

import re

MAX_SECOND = 25  # words of a second sentence that explains a name
DIRECTIVE = re.compile(r"^#\| *([\w-]+):? *(.*)\n?", re.MULTILINE)
MARK = re.compile(r"<!-- *slide: *(.*?) *-->\n?")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\([^)\s]+\)")
FENCED = re.compile(r"^(```.*?^```)$", re.DOTALL | re.MULTILINE)
DETAILS = re.compile(r"<details>.*?</details>", re.DOTALL)
INLINE_FORMULA = re.compile(r"\$[^$]+\$")
HALF_OPEN = re.compile(r"\[[^][()]*\)")  # an interval such as [0, 1)
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")
NOT_AN_END = re.compile(r"(?:\bal|\be\.g|\bi\.e|\bvs|\b[A-Z]|^\d+)\.$")
AFTER_A_SENTENCE = re.compile(r"(?<=[.!?:])([*)\"”]*)\s+(?=[A-Z0-9$`(*“\"ℒ])")


def directives(source):
    """nbdev's directives of a code cell, name and value, and the code without them."""
    return dict(DIRECTIVE.findall(source)), DIRECTIVE.sub("", source)


def without_marks(text):
    """The text as readers see it; the site shows lessons through this as well."""
    return MARK.sub("", text)


def without_links(text):
    """Links as plain words: a deck leads nowhere."""
    return LINK.sub(r"\1", text)


def one_line(text):
    """A paragraph on one line, without links."""
    return re.sub(r"\s+", " ", without_links(text)).strip()


def words(text):
    """How many words a reader sees; a formula within a sentence is one."""
    return len(INLINE_FORMULA.sub("x", text.replace("|", " ")).split())


def paragraphs(text):
    """Pairs of a mark ("" for none) and the paragraph behind it. Headings stand alone."""
    parts = []
    for i, piece in enumerate(FENCED.split(DETAILS.sub("", text))):
        if i % 2 == 0:  # not code
            piece = MARK.sub(r"\n\n<!-- slide: \1 -->\n\n", piece)
            piece = re.sub(r"^(#{1,6} .*)$", r"\n\1\n", piece, flags=re.MULTILINE)
        parts += re.split(r"\n\s*\n", piece) if i % 2 == 0 else [piece]
    found, mark = [], ""
    for part in parts:
        if match := MARK.fullmatch(part.strip()):
            mark = match[1]
        elif part.strip():
            found.append((mark, part.strip()))
            mark = ""
    return found


def whole(piece):
    """Whether formulas, code, bold text and brackets that begin in a piece also end there."""
    even = all(piece.count(sign) % 2 == 0 for sign in ("$", "`", "**"))
    piece = HALF_OPEN.sub("", piece)
    return even and piece.count("(") == piece.count(")")


def sentences(text):
    """The sentences of a paragraph."""
    found, piece = [], ""
    parts = AFTER_A_SENTENCE.split(one_line(text))
    for body, closing in zip(parts[::2], [*parts[1::2], ""]):
        piece = f"{piece} {body}{closing}".strip()
        ends = piece.rstrip('*)"”')
        if whole(piece) and not NOT_AN_END.search(ends) and not ends.endswith(":"):
            found.append(piece)
            piece = ""
    return [*found, piece] if piece else found


def clause(sentence):
    """A sentence up to its first colon or semicolon, where that says something by itself."""
    for sign in re.finditer(r"[:;](?= )", sentence):
        start = sentence[: sign.start()]
        if whole(start) and words(start) > 5:
            return start + "."
    return sentence


def gist(text):
    """The first sentence, and the second one where the first is but a name."""
    found = sentences(text)
    if words(found[0]) < 5 and len(found) > 1:
        second = found[1] if words(found[1]) < MAX_SECOND else clause(found[1])
        if words(second) < MAX_SECOND:
            return f"{found[0]} {second}"
    return found[0]


def as_many_as_fit(found, limit):
    """The first sentences, together at most `limit` words; the first one always."""
    taken = found[:1]
    for sentence in found[1:]:
        if words(" ".join([*taken, sentence])) > limit:
            break
        taken.append(sentence)
    return " ".join(taken)


def bold(text):
    """The bold phrases of a paragraph, not what stands between two of them."""
    return text.split("**")[1::2]


def lead(text):
    """The bold phrase that a paragraph begins with; "" for none."""
    return bold(text)[0] if text.startswith("**") and text.count("**") > 1 else ""


def is_list(text):
    """Whether a paragraph is a list."""
    return bool(ITEM.match(text))


def items(text):
    """The items of a list, each with its sign, without lists within them."""
    found = []
    for line in text.splitlines():
        if ITEM.match(line):
            found.append(line)
        elif not ITEM.match(line.strip()):
            found[-1] += " " + line.strip()
    return found


def is_table(text):
    """Whether a paragraph is a table."""
    lines = text.splitlines()
    return len(lines) > 2 and all(line.startswith("|") for line in lines)


def is_caption(text):
    """Whether a paragraph is a caption: it begins in italics."""
    return text.startswith("*") and not text.startswith(("**", "* "))
