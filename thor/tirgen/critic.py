"""The critic's side of TIRGen: what it is shown, how its reply is read, and the contract that a rewrite must keep."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise

from thor.text import FenceParser
from thor.tirgen.draft import END_THINK, THINK
from thor.trajectory import ExecResult

MATH = ((r"\[", r"\]"), (r"\(", r"\)"), (r"\begin{", r"\end{"))
LONG_LINE = 300  # characters above which a single line is shown in parts


@dataclass(frozen=True)
class Rewrite:
    """Parts `first` to `last` of a step, to be replaced by reasoning and code. Both are empty if only named so far."""

    first: int  # counted from 0
    last: int  # inclusive
    logic: str = ""
    code: str = ""


# ---- what the critic is shown ---------------------------------------------------------------------------------------


def split_parts(text: str) -> list[str]:
    """Cut a step into parts whose concatenation is the step: sentences and lines, or the whole if it is one short line.

    Formulas, environments and list markers stay with what follows them.
    """
    if "\n" not in text.strip() and len(text) <= LONG_LINE:
        return [text]
    parts: list[str] = []
    for piece in re.findall(r"\s*(?:[^\n.!?]|[.!?](?!\s))*(?:[.!?]+(?=\s)|\n|$)\s*", text):
        last = parts[-1] if parts else ""
        if parts and (_is_open_math(last) or re.fullmatch(r"\W*(?:\w{1,2}[.)])?\s*", last)):
            parts[-1] += piece
        elif piece:
            parts.append(piece)
    return parts


def _is_open_math(part: str) -> bool:
    """Whether a part ends inside a formula. An inline formula with dollar signs ends with its line at the latest."""
    if any(part.count(opening) > part.count(closing) for opening, closing in MATH) or part.count("$$") % 2:
        return True
    return not part.endswith("\n") and bool(re.search(r"\$[^\s\d$.,;:!?)]", re.sub(r"\$[^$\n]*\$", "", part)))


def show_parts(parts: list[str]) -> str:
    """A step as the critic sees it: numbered, if it has several parts."""
    if len(parts) == 1:
        return parts[0].strip()
    return "\n".join(f"[{i}] {part.strip()}" for i, part in enumerate(parts, 1))


# ---- how its reply is read ------------------------------------------------------------------------------------------


def skip_thought(reply: str, opened: bool = False) -> str | None:
    """The reply after the critic's thought; None while the thought has not ended. opened: the prompt opens it."""
    thinks, end = opened or reply.lstrip().startswith(THINK), reply.find(END_THINK)
    if thinks:
        return reply[end + len(END_THINK) :] if end >= 0 else None
    return "" if THINK.startswith(reply.strip()) else reply  # it may still become "<think>"


def says_none(reply: str) -> bool:
    """Whether the critic decided that code cannot help: "none" or the like, with any remark behind it, and no block."""
    if first_block(reply).closed:
        return bool(NONE_LINE.match(reply))
    return bool(NONE.match(reply.strip()))


def first_block(text: str) -> FenceParser:
    parser = FenceParser()
    parser.feed(text)
    return parser


class CriticStop:
    """Stop rule of the critic: its first block closes, or its first line is "none". Blocks in its thought do not count.

    opened: the prompt opens its thought. one_block: False lets it write several blocks, until it ends the reply.
    """

    def __init__(self, opened: bool, one_block: bool) -> None:
        self.opened, self.one_block = opened, one_block
        self.start, self.reply = "", None  # the text while it may be thought; the parser of what follows

    def feed(self, piece: str) -> bool:
        if self.reply is None:
            self.start += piece
            piece = skip_thought(self.start, self.opened)
            if not piece:
                return False
            self.reply = FenceParser()
        closed = self.reply.feed(piece)
        return bool(NONE_LINE.match(self.reply.text)) or (self.one_block and closed)


NONE = re.compile(
    r"\W*(?:(?:the\s+)?answer(?:\s+is)?\W+|there\s+(?:is|are)\s+)?"
    r"(?:none(?:\s+(?:is\s+|are\s+)?(?:needed|required|necessary))?"
    r"|no\s+(?:\w+\s+)?(?:code|python|program|computation)(?:\s+is)?\s+(?:needed|required|necessary))"
    r"\b\W*?(?:[.,:;!(\n—–-]|$)",
    re.IGNORECASE,
)
NONE_LINE = re.compile(r"\W*none\W*\n", re.IGNORECASE)


NAME = r"(?:parts?|sentences?|lines?)\s*"
RANGE = r"(?<!\d)(\d{1,6})(?!\d)(?:\s*(?:-|–|to)\s*(\d{1,6})(?!\d))?"
BRACKETS = r"\[\s*\d[\d\s,;&–-]*(?:(?:to|and)[\d\s,;&–-]+)*\]"
MARKS = r"(?:[:.)*`\s]|[–—-]\s)*"  # behind the number
SPANS = [  # where a span is named, at the start of a line; the first of these that occurs counts
    re.compile(rf"^(?:[*#>`\t -]|\d+[.)][\t ])*{pattern}{MARKS}", re.IGNORECASE | re.MULTILINE)
    for pattern in (
        # "[2-3]", "1. [2], [3]", "Parts [2] to [3]"
        rf"(?:{NAME})?({BRACKETS}(?:\s*(?:[,;&–-]|to|and)?\s*{BRACKETS})*)",
        rf"{NAME}({RANGE})(?!\w|\.\d)",  # "Parts 2 to 3:"
    )
]
BARE_SPAN = re.compile(rf"^[*#>`\t -]*\(?({RANGE})\s*[:.)](?!\d){MARKS}", re.MULTILINE)  # "2-3:", "(2)"


def read_ranges(text: str) -> list[tuple[int, int]]:
    """The ranges of parts in a text such as "[2-3], 5 and [7] to [9]", counted from 0."""
    found = re.findall(RANGE, re.sub(r"[\[\]*`]", " ", text))
    return [(int(first) - 1, int(last or first) - 1) for first, last in found]


def read_span(logic: str, count: int) -> Rewrite | None:
    """The span that reasoning begins with, and the reasoning behind it; None unless these are neighbouring parts."""
    patterns = SPANS if re.search(rf"\b{NAME}\[?\d", logic, re.IGNORECASE) else [*SPANS, BARE_SPAN]
    span = next(filter(None, (pattern.search(logic) for pattern in patterns)), None)
    ranges = sorted(read_ranges(span[1])) if span else []
    neighbours = all(b[0] <= a[1] + 1 for a, b in pairwise(ranges))
    if not ranges or not neighbours or any(not 0 <= first <= last < count for first, last in ranges):
        return None
    return Rewrite(ranges[0][0], max(last for _, last in ranges), logic[span.end() :].strip())


def parse_rewrites(reply: str, count: int) -> tuple[list[Rewrite], str]:
    """Read the rewrites of a step with `count` parts from a reply without thought: (rewrites, "" or what is wrong).

    Each is "[first-last] reasoning" and a block. A step of one part needs no number. Of overlapping ones, the first
    counts.
    """
    rewrites: list[Rewrite] = []
    while (block := first_block(reply)).closed:
        logic, reply = reply[: block.open_at], reply[block.close_end :]
        rewrite = read_span(logic, count) if count > 1 else Rewrite(0, 0, logic.strip())
        if rewrite is None:
            return rewrites, "no_span"
        rewrite = replace(rewrite, code=block.code)
        if all(rewrite.last < other.first or rewrite.first > other.last for other in rewrites):
            rewrites.append(rewrite)
        if count == 1:
            break
    rewrites.sort(key=lambda rewrite: rewrite.first)
    return rewrites, "" if rewrites else "no_code"


def parse_judgement(reply: str, count: int) -> tuple[list[Rewrite], str]:
    """Read the spans that a judging critic names, such as "2-4, 7": (rewrites without code, "" or what is wrong).

    Only lines that hold nothing but such names count, because numbers in a remark are no parts.
    """
    other = re.compile(r"\b(?:the|answer|parts?|sentences?|lines?|to|and)\b|\*\*|[\d\s\[\](),;:.&`–>#-]", re.IGNORECASE)
    named = "\n".join(line for line in reply.splitlines() if not other.sub("", line))
    rewrites: list[Rewrite] = []
    for first, last in read_ranges(named):
        span = Rewrite(first, last)
        taken = any(span.first <= other.last and span.last >= other.first for other in rewrites)
        if 0 <= span.first <= span.last < count and not taken:
            rewrites.append(span)
    rewrites.sort(key=lambda rewrite: rewrite.first)
    return rewrites, "" if rewrites else "no_span"


# ---- the contract of a rewrite --------------------------------------------------------------------------------------

FAULTS = {  # reason -> what the critic is told
    "no_code": "it has no complete ```python block",
    "no_span": "it does not name the numbers of the parts that a block replaces",
    "thought_unfinished": "its thought did not end",
    "no_reasoning": "there is no reasoning before the block",
    "goes_on": "the reasoning gives an answer or a second block; it must only say what the block computes",
    "predicts_output": "the reasoning or the code contains a result that only running the code can give",
    "changes_reasoning": "the reasoning is not that of the step",
}


def contract_fault(rewrite: Rewrite, step: str, known: str) -> str:
    """Why a rewrite breaks the contract, a key of FAULTS, or "".

    step: the actor's text that it replaces. known: question and solution before it, whose numbers it may repeat.
    """
    logic, code = rewrite.logic, rewrite.code
    if not re.search(r"\w", logic):
        return "no_reasoning"
    if re.search(r"```|\\boxed|\\fbox|</?think>", logic) or "\\boxed" in code or len(logic) > 2 * len(step) + 200:
        return "goes_on"
    if is_constant(code) or claimed_numbers(logic) - numbers(known) - numbers(code) - percentages(logic, code):
        return "predicts_output"
    if remarked_outputs(code) - numbers(known):
        return "predicts_output"
    own = words(logic) | numbers(logic)
    new = own - words(f"{known} {step} {code}") - numbers(f"{known} {step}")
    if 3 * len(new) > 2 * len(own) and words(step.partition("```")[0]):  # else the step is a block without reasoning
        return "changes_reasoning"
    return ""


def states_output(logic: str, output: str, known: str) -> bool:
    """Whether reasoning already claims what the code then printed, and nothing before it did."""
    if numbers(output):
        return bool(claimed_numbers(logic) & numbers(output) - numbers(known))
    asks = re.search(r"\b(?:whether|if)\b", logic, re.IGNORECASE)  # "Check whether it is true" claims nothing
    stated = re.search(rf"{RESULT}\s{{0,3}}\W{{0,3}}{_spaced(output)}(?!\w)", logic, re.IGNORECASE)
    return bool(output.strip() and stated and not asks)


def remarked_outputs(code: str) -> set[str]:
    """The numbers that comments and strings of code call its output and that the code itself does not have."""
    constants = [node.value for node in parse_nodes(code) or [] if isinstance(node, ast.Constant)]
    remarks = [*re.findall("#.*", code), *(value for value in constants if isinstance(value, str))]
    own = numbers(" ".join(str(value) for value in constants if not isinstance(value, str)))
    return numbers(" ; ".join(found[1] or found[2] for remark in remarks for found in REMARK.finditer(remark))) - own


def _spaced(output: str) -> str:
    """A pattern for the start of an output, with any spaces between its words and signs."""
    return r"\s*".join(map(re.escape, re.findall(r"\w+|\S", output[:200])))


PLAIN_CALLS = {"print", "str", "int", "float", "bool", "round", "abs", "len", "repr", "format", "type", "list", "tuple"}
WORK = (
    ast.BinOp,
    ast.AugAssign,
    ast.Compare,
    ast.BoolOp,
    ast.Not,
    ast.Subscript,
    ast.comprehension,
    ast.For,
    ast.While,
)


def parse_nodes(code: str) -> list[ast.AST] | None:
    """All nodes of the syntax tree, or None if the code cannot be parsed."""
    try:
        return list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_plain_call(call: ast.Call) -> bool:
    """Whether a call only prints, converts or formats."""
    function = call.func
    if isinstance(function, ast.Attribute):  # a method of a string
        text = function.value
        return isinstance(text, (ast.Constant, ast.JoinedStr)) or (isinstance(text, ast.Call) and is_plain_call(text))
    return isinstance(function, ast.Name) and function.id in PLAIN_CALLS


def is_constant(code: str) -> bool:
    """Whether code prints values that were worked out by hand. Code that cannot be parsed is left to its run."""
    nodes = parse_nodes(code)
    if nodes is None or any(isinstance(node, WORK) for node in nodes):
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    # abs, len and int in another base do compute
    return all(
        is_plain_call(c) and not (_name(c) in ("abs", "len") or (_name(c) == "int" and c.args[1:])) for c in calls
    )


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", "")


CJK = "\u3040-\u30ff\u3400-\u9fff"
NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")


def numbers(text: str) -> set[str]:
    """The numbers in a text, in one spelling: 1,200 and 1200.0 are 1200."""
    found = set()
    for number in NUMBER.findall(text):
        number = number.replace(",", "")
        found.add((number.rstrip("0").rstrip(".") if "." in number else number).lstrip("0") or "0")
    return found


def claimed_numbers(logic: str) -> set[str]:
    """The numbers in reasoning that may be results: not list markers, nor single digits that nothing calls a result."""
    text = LIST_MARKER.sub("", logic)
    small = {number for number in numbers(text) if len(number) == 1}
    stated = re.findall(rf"{RESULT}\s{{0,3}}\W?\s{{0,3}}(\d)(?![\d.,]\d|\d)", text)
    return numbers(text) - (small - set(stated))


def percentages(logic: str, code: str) -> set[str]:
    """The numbers before a percent sign that code has as a fraction: 20% as 0.2, 1.2 or 0.8."""
    factors, found = set(values(code)), set()
    for number in re.findall(rf"(?<![\d.,])((?>{NUMBER.pattern}))\s?\\?%", logic):
        share = Decimal(number.replace(",", "")) / 100
        found |= numbers(number) if factors & {share, 1 + share, 1 - share} else set()
    return found


def words(text: str) -> set[str]:
    """Lower-case words of three letters or more, with underscores as spaces. Each character of Chinese is a word."""
    return set(re.findall(rf"[{CJK}]|(?:(?![{CJK}])[^\W\d_]){{3,}}", text.lower()))


RESULT = r"(?:=|≈|\bis|\bare|\bgives?|\bgets?|\bequals?|\bobtains?)"  # what announces a result
REMARK = re.compile(
    r"(?:\b(?:prints?|outputs?|results?|returns?|answer)\b\W{0,4}(?:is|are|will be|should be)?|=>|->)"
    rf"\W{{0,4}}({NUMBER.pattern})|^#\W*({NUMBER.pattern})\W*$",
    re.IGNORECASE,
)
SIGNED = rf"(?:(?<![\w)\]}}.])-)?(?>{NUMBER.pattern})"  # a minus behind a number or bracket is an operator
STATED = re.compile(rf"{RESULT}\s{{0,3}}[^\w\s+-]{{0,3}}\s{{0,3}}({SIGNED})(?!\s{{0,3}}[-+*/^×·÷]\s{{0,3}}[\d(])")
LIST_MARKER = re.compile(r"^[^\w\n]*(?:step *)?\d+ *[.):]\s", re.IGNORECASE | re.MULTILINE)


def values(text: str, pattern: str | re.Pattern = SIGNED) -> list[Decimal]:
    """The numbers in a text, with their signs."""
    return [Decimal(number.replace(",", "")) for number in re.findall(pattern, text.replace("−", "-"))]


def results(text: str, known: str) -> list[Decimal]:
    """The numbers that a text works out: those that are not known, and those that it calls a result."""
    text, given = LIST_MARKER.sub("", text), set(values(known))
    return [number for number in values(text) if number not in given] + values(text, STATED)


def agrees(output: str, replaced: str, known: str = "", rest: Iterable[str] = ()) -> bool:
    """Whether the text that code replaced came to the same result, so that what the actor wrote behind it can stay.

    If it states no result, the first text of `rest` that does is compared, and without any the answer is yes.
    known: question, solution before it and code. Its numbers are no results, unless the text calls them so.
    """
    found = values(output)
    if not found:
        return bool(re.search(rf"(?<!\w){_spaced(output)}(?!\w)", replaced, re.IGNORECASE))
    for text in (replaced, *rest):
        if claims := results(text, known):
            return all(any(_is_rounded(number, claim) for claim in claims) for number in found)
    return True


def _is_rounded(number: Decimal, claim: Decimal) -> bool:
    """Whether `claim` is the number, perhaps rounded to the decimals of the claim."""
    decimals = -claim.as_tuple().exponent
    return number == claim or (decimals > 0 and abs(number - claim) <= Decimal(5).scaleb(-decimals - 1))


def error_type(result: ExecResult) -> str:
    """The class of the exception, or else the status."""
    name = result.error.partition(":")[0]
    return name if result.status == "error" and name.isidentifier() else result.status
