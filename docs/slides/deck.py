"""A deck from a lesson as it is stored: what of its cells is shown, and on which slide.

README.md says by which rules; marks in the cells are exceptions to them. No cell is executed.
"""

import itertools
import json
import re
from dataclasses import dataclass, field

import listing
import prose

MAX_WORDS = 48  # on a slide, without its title
MAX_ALONE = 60  # on a slide that is a list, and on the first one
ENOUGH = 30  # words that make a prediction clear
LONELY = 8  # words of a list item that says too little alone
MIN_BOLD = 6  # words of a phrase for which its sentence is shown
MAX_CODE = 14  # lines
MAX_OUTPUT = 10  # lines of what was printed
MAX_COLUMNS = 115  # of code, and of what was printed
MAX_TABLE = 60  # words
MAX_CONCLUSION = 30  # words below a picture, besides its caption
MAX_INTRODUCTION = 25  # words before a formula
HEIGHT = 510  # points that a slide of 1280 x 720 has below a title of one line
LONG_TITLE = 46  # letters; a longer one takes two lines
TEXT_MARKS = {"", "skip", "show"}
CODE_MARKS = {"skip", "code", "output"}  # any other word names a function or a class of the cell
DRAWING = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+\.svg)\)$", re.DOTALL)
TALL = re.compile(r"frac|sum|prod|int|matrix|left")  # of formulas
SKIPPED = re.compile(r"skip at first", re.IGNORECASE)
PREDICTION = re.compile(r"^(?:a )?predictions?\b", re.IGNORECASE)
ONLY_SAID = ("History", "To read", "What to read", "Who and when", "Where it comes from")
PRINTED = "Printed:"  # begins a note that is no prose
WORDLESS = ("code", "output", "picture", "formula", "table")  # they have limits of their own


@dataclass
class Block:
    """One thing on a slide: its kind, which theme.css knows, and its text."""

    kind: str
    text: str  # Markdown; of code and output what it is; of a picture what one sees there
    data: str = ""  # of a picture: its PNG in base64 or its path; of a caption: all of it

    @property
    def words(self):
        """How many words it adds to a slide."""
        return 0 if self.kind in WORDLESS else prose.words(self.text)

    @property
    def height(self):
        """About how many points it takes."""
        lines = self.text.splitlines()
        if self.kind == "picture":
            return 300
        if self.kind == "formula":
            rows = 1 + self.text.count(r"\\")
            return 40 + (95 if TALL.search(self.text) else 60) * rows
        if self.kind in ("code", "output"):
            return 60 + 29 * len(lines)
        if self.kind == "table":
            return 40 * len(lines)
        return 24 + 48 * (1 + len(self.text) // 64)


@dataclass
class Slide:
    """A title, what is shown below it, and what is said."""

    title: str
    kind: str = ""  # lead: the first one
    blocks: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    @property
    def words(self):
        """Words below the title."""
        return sum(block.words for block in self.blocks)

    @property
    def height(self):
        """About how many points its blocks take."""
        return sum(block.height for block in self.blocks)

    @property
    def kinds(self):
        """The kinds of its blocks, in order."""
        return [block.kind for block in self.blocks]

    @property
    def room(self):
        """How many words it may hold."""
        return MAX_ALONE if self.kind == "lead" or set(self.kinds) == {"list"} else MAX_WORDS

    def fit_caption(self, room=MAX_WORDS):
        """As many sentences of the caption as there is room for; none: no caption."""
        for block in [block for block in self.blocks if block.kind == "caption"]:
            room -= self.words - block.words
            block.text = prose.as_many_as_fit(prose.sentences(block.data), room)
            if block.words > room:
                self.blocks.remove(block)

    def has_room_for(self, block):
        """Whether a block may stand below what is there."""
        if block.kind == "conclusion" and self.kinds in (["picture"], ["picture", "caption"]):
            return True  # the caption makes room for it
        listed = block.kind == "list" and set(self.kinds) == {"list"}
        if self.blocks and self.words + block.words > (MAX_ALONE if listed else MAX_WORDS):
            return False
        if "picture" in self.kinds:
            return False
        if block.kind == "list" and "code" in self.kinds:
            return False
        if self.blocks and (block.kind == "picture" or self.kinds[-1] in ("prediction", "output")):
            return False  # what came is seen when the slide is turned, and alone
        second_line = 46 if len(self.title) > LONG_TITLE else 0
        return self.height + block.height + second_line <= HEIGHT


class Deck:
    """The slides of a lesson, filled from its cells in order."""

    def __init__(self):
        self.slides = []
        self.skipping = 0  # the level of the heading whose section is left out; 0: none
        self.exercises = False  # whether cells belong to the exercises
        self.had_formula = False  # whether the text just before had one: then its code is shown
        self.printed = ""  # what cells printed since the last text

    def open(self, title, kind=""):
        """Begin a slide."""
        self.close()
        self.slides.append(Slide(title, kind))

    def close(self):
        """A slide with nothing to show shows what is said first on it."""
        if not self.slides or self.slides[-1].blocks:
            return
        slide = self.slides[-1]
        told = [note for note in slide.notes if not note.startswith((PRINTED, "|", "("))]
        whole = [prose.sentences(note) for note in told if not note.endswith(":")]
        said = whole[0] if whole else told[:1]
        if slide.kind == "lead":  # "After this lesson you can", without what it needs
            said = list(itertools.takewhile(lambda sentence: not prose.lead(sentence), said))
        if said:
            slide.blocks.append(Block("text", prose.as_many_as_fit(said, slide.room)))
        else:
            self.slides.pop()
            self.slides[-1].notes += slide.notes

    def drop_lonely_names(self):
        """The name of one point, alone on a slide, is only said."""
        kept = []
        for slide in self.slides:
            name = [block.kind for block in slide.blocks] == ["list"] and slide.words < LONELY
            if name and kept[-1].title == slide.title:
                kept[-1].notes += slide.notes
            else:
                kept.append(slide)
        self.slides = kept

    def show(self, block):
        """Put a block on the slide, or on a new one with the same title."""
        if not self.slides[-1].has_room_for(block):
            self.slides.append(Slide(self.slides[-1].title))
        self.slides[-1].blocks.append(block)
        self.slides[-1].fit_caption()

    def say(self, text):
        """Add to the notes."""
        if text.strip():
            self.slides[-1].notes.append(text.strip())

    # ---- text

    def text_cell(self, source):
        """Headings, paragraphs, lists, formulas, drawings."""
        self.answer()
        self.had_formula, before = False, ""
        for mark, text in prose.paragraphs(source):
            if text.startswith("$$") and not self.skipping:
                self.formula(text, before, mark)
            elif match := re.match(r"(#+) (.*)", text):
                self.heading(len(match[1]), match[2], mark)
            elif not self.skipping and not text.startswith("▶ ["):  # links to run it elsewhere
                self.paragraph(text, mark)
            before = text

    def heading(self, level, text, mark):
        """A heading begins a slide, or a section that is left out."""
        if self.skipping and level > self.skipping:
            return
        self.skipping = level if mark == "skip" or SKIPPED.search(text) else 0
        if self.skipping:
            return
        if self.exercises and level > 2:
            self.show(Block("list", f"- {re.sub(r'^[0-9]+[.] ', '', text)}"))
        else:
            self.open(text, "lead" if level == 1 else "")
            self.exercises = text == "Exercises"

    def formula(self, text, before, mark):
        """A formula, with the sentence that leads to it."""
        self.had_formula = True
        if mark == "skip" or self.exercises:
            return
        leading = prose.sentences(before)[-1] if before[:1].isalpha() else ""
        introduction = Block("text", leading if leading[-1:] != "." else "")
        formula, slide = Block("formula", text), self.slides[-1]
        together = slide.height + introduction.height + formula.height <= HEIGHT
        short = 1 < introduction.words <= min(MAX_INTRODUCTION, MAX_WORDS - slide.words)
        shown = any(introduction.text in block.text for block in slide.blocks)
        if introduction.text and together and short and not shown:
            self.show(introduction)
        self.show(formula)

    def paragraph(self, text, mark):
        """Show what of a paragraph is to be seen, and say it all."""
        if match := DRAWING.match(text):
            if mark != "skip":
                self.show(Block("picture", prose.one_line(match[1]), match[2]))
            return
        if text.startswith("```"):
            self.say(text)
            return
        if mark == "show":
            self.show(Block("table" if prose.is_table(text) else "text", prose.without_links(text)))
        elif mark != "skip":
            self.excerpt(text)
        self.say(prose.without_links(text))

    def excerpt(self, text):
        """Show what stands out in a paragraph."""
        if prose.is_caption(text) and not SKIPPED.search(text):
            self.caption(re.sub(r"(?<![*])[*](?![*])", "", text))
        elif prose.is_list(text):
            self.list(text)
        elif prose.is_table(text):
            if prose.words(text) <= MAX_TABLE:
                self.show(Block("table", prose.without_links(text)))
        elif self.exercises:
            self.exercise(text)
        elif self.slides[-1].kind != "lead":
            self.sentences(text)

    def sentences(self, text):
        """Predictions, the door to the next lesson, names of points, and bold sentences."""
        found, lead = prose.sentences(text), prose.lead(text).rstrip(".:?")
        if lead == "Next":
            self.open("Next")
            rest = prose.as_many_as_fit(
                prose.sentences(text.split("**", 2)[2].lstrip(" .:")), MAX_WORDS
            )
            self.show(Block("text", rest[:1].upper() + rest[1:]))
        elif predicted := from_prediction(found):
            self.show(Block("prediction", prose.as_many_as_fit(predicted, MAX_WORDS)))
        elif lead.startswith(ONLY_SAID):
            return
        elif 2 < prose.words(lead) < 12 and found[0].strip("*.:?") == lead:
            self.show(Block("list", f"- {found[0]}"))
        else:
            for sentence in found:
                longest = max((prose.words(phrase) for phrase in prose.bold(sentence)), default=0)
                if longest >= MIN_BOLD and prose.words(sentence) <= MAX_WORDS:
                    self.statement(sentence)

    def statement(self, sentence):
        """A question stands alone; what was found stands below its picture, if that has room."""
        asks = sentence.rstrip("*").endswith("?")
        wide = prose.words(sentence) > MAX_CONCLUSION
        below = "picture" in self.slides[-1].kinds and not (asks or wide)
        self.show(Block("conclusion" if below else "statement", sentence))

    def list(self, text):
        """A list by the first sentences of its items, on as many slides as it needs."""
        found = prose.items(text)
        shown = [prose.gist(prose.ITEM.sub("", item)) for item in found]
        if sum(map(prose.words, shown)) > MAX_WORDS:
            shown = [prose.clause(sentence) for sentence in shown]
        for number, (item, sentence) in enumerate(zip(found, shown), 1):
            sign = "-" if item.startswith(("-", "*")) else f"{number}."
            self.show(Block("list", f"{sign} {sentence.rstrip(';,')}"))

    def exercise(self, text):
        """The name of an exercise, and its first sentence where the name says little."""
        if not prose.lead(text):
            return
        shown = re.sub(r"^[*][*][0-9]+[.] ", "**", prose.gist(text))
        self.show(Block("list", f"- {shown}"))

    def caption(self, text):
        """A caption goes to the last picture, if that has none."""
        for slide in reversed(self.slides):
            if slide.title != self.slides[-1].title:
                return
            if "picture" in slide.kinds:
                if "caption" not in slide.kinds:
                    slide.blocks.append(Block("caption", "", text))
                    slide.fit_caption()
                return

    # ---- code

    def code_cell(self, cell):
        """Pictures and conclusions that a cell left; code after its formula, or where marked."""
        directives, source = prose.directives("".join(cell["source"]))
        marks = directives.get("slide", "").replace(",", " ").split()
        if "skip" in marks or self.skipping or self.exercises:
            return
        parts = [mark for mark in marks if mark not in CODE_MARKS]
        code = listing.shown_code(source, parts)
        exported = {"export", "exporti"} & directives.keys()
        short = len(code.splitlines()) <= MAX_CODE
        if parts or "code" in marks or (self.had_formula and exported and short):
            self.code(Block("code", code))
        self.had_formula = False
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"]).rstrip()
        if printed and "output" in marks:
            self.show(Block("output", printed))
        elif printed:
            self.printed = printed
            self.say(f"{PRINTED}\n{printed}")
        self.outputs(cell["outputs"], directives.get("fig-alt", ""))

    def code(self, block):
        """Code, below what is said of it first, where nothing else is there."""
        slide = self.slides[-1]
        said = [note for note in slide.notes if not note.startswith(PRINTED)]
        if not slide.blocks and said:
            text = Block("text", prose.sentences(said[0])[0])
            if text.words <= MAX_INTRODUCTION and text.height + block.height <= HEIGHT:
                self.show(text)
        self.show(block)

    def answer(self):
        """Show what was printed last, where nothing else has answered a prediction."""
        unanswered = self.slides and self.slides[-1].kinds[-1:] == ["prediction"]
        lines = self.printed.splitlines()
        if unanswered and 0 < len(lines) <= MAX_OUTPUT and max(map(len, lines)) <= MAX_COLUMNS:
            self.show(Block("output", self.printed))
        self.printed = ""

    def outputs(self, outputs, alt):
        """Pictures and conclusions."""
        data = [output.get("data", {}) for output in outputs]
        for found in sorted(data, key=lambda found: "image/png" not in found):
            if "image/png" in found:
                png = "".join(found["image/png"]).replace("\n", "")
                self.show(Block("picture", alt.strip("\"'"), png))
            elif "text/markdown" in found:
                self.conclusion("".join(found["text/markdown"]))

    def conclusion(self, text):
        """What the code concluded from its numbers: sentences, a list or a table."""
        for _, part in prose.paragraphs(text):
            if prose.is_table(part):
                if prose.words(part) <= MAX_TABLE:
                    self.show(Block("table", prose.without_links(part)))
                self.say(part)
            elif prose.is_list(part):
                self.list(part)
                self.say(prose.without_links(part))
            else:
                shown = prose.as_many_as_fit(prose.sentences(part), MAX_CONCLUSION)
                self.show(Block("conclusion", shown))
                self.say(prose.without_links(part))


def from_prediction(found):
    """The sentences from the one that is marked, in bold, as a prediction; none: [].

    A short question comes with what stands before it."""
    for i, sentence in enumerate(found):
        if any(PREDICTION.match(phrase) for phrase in prose.bold(sentence)):
            first = i
            while first > 0 and prose.words(" ".join(found[first - 1 :])) < ENOUGH:
                first -= 1
            return found[first:]
    return []


def deck_of(path):
    """The deck of a notebook."""
    deck = Deck()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            deck.text_cell("".join(cell["source"]))
        elif cell["cell_type"] == "code":
            deck.code_cell(cell)
    deck.close()
    deck.drop_lonely_names()
    return deck
