"""The critic's side of TIRGen: what it is shown, how its reply is read, and the contract that a rewrite must keep."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from thor.text import FenceParser
from thor.tirgen.draft import END_THINK, THINK
from thor.trajectory import ExecResult

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

    Displayed formulas and list markers stay with what follows them.
    """
    if "\n" not in text.strip() and len(text) <= LONG_LINE:
        return [text]
    parts: list[str] = []
    for piece in re.findall(r"\s*(?:[^\n.!?]|[.!?](?!\s))*(?:[.!?]+(?=\s)|\n|$)\s*", text):
        last = parts[-1] if parts else ""
        unfinished = last.count(r"\[") > last.count(r"\]") or last.count("$$") % 2
        if parts and (unfinished or re.fullmatch(r"\W*(?:\w{1,2}[.)])?\s*", last)):
            parts[-1] += piece
        elif piece:
            parts.append(piece)
    return parts


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


SPAN = re.compile(  # "[2-3]", "[2] to [3]", "Parts 2 to 3:", "2-3:", also in bold, at the start of a line
    r"^[*#>\s]*(?:(?:parts?|sentences?|lines?)\s*\[?|\[|(?=\d+(?:\s*[-–]\s*\d+)?\s*[:.)]))"
    r"(\d+)\]?(?:\s*(?:-|–|to)\s*\[?(\d+))?[\]:.)*]*\s*",
    re.IGNORECASE | re.MULTILINE,
)


def parse_rewrites(reply: str, count: int) -> tuple[list[Rewrite], str]:
    """Read the rewrites of a step with `count` parts from a reply without thought: (rewrites, "" or what is wrong).

    Each is "[first-last] reasoning" and a block. A step of one part needs no number. Of overlapping ones, the first
    counts.
    """
    rewrites: list[Rewrite] = []
    while (block := first_block(reply)).closed:
        logic, reply = reply[: block.open_at], reply[block.close_end :]
        rewrite = Rewrite(0, 0, logic.strip(), block.code)
        if count > 1:
            span = SPAN.search(logic)
            if not span:
                return rewrites, "no_span"
            first, last = int(span[1]) - 1, int(span[2] or span[1]) - 1
            rewrite = Rewrite(first, last, logic[span.end() :].strip(), block.code)
        if not 0 <= rewrite.first <= rewrite.last < count:
            return rewrites, "no_span"
        if all(rewrite.last < other.first or rewrite.first > other.last for other in rewrites):
            rewrites.append(rewrite)
        if count == 1:
            break
    rewrites.sort(key=lambda rewrite: rewrite.first)
    return rewrites, "" if rewrites else "no_code"


def parse_judgement(reply: str, count: int) -> tuple[list[Rewrite], str]:
    """Read the spans that a judging critic names, such as "2-4, 7": (rewrites without code, "" or what is wrong)."""
    rewrites: list[Rewrite] = []
    for first, last in re.findall(r"(\d+)(?:\s*(?:-|–|to)\s*\[?(\d+))?", reply):
        span = Rewrite(int(first) - 1, int(last or first) - 1)
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
    if is_constant(code) or claimed_numbers(logic) - numbers(known) - numbers(code):
        return "predicts_output"
    own = words(logic) | numbers(logic)
    new = own - words(f"{known} {step} {code}") - numbers(f"{known} {step}")
    if 3 * len(new) > 2 * len(own) and words(step.partition("```")[0]):  # else the step is a block without reasoning
        return "changes_reasoning"
    return ""


def states_output(logic: str, output: str, known: str) -> bool:
    """Whether reasoning already claims what the code then printed, and nothing before it did."""
    return bool(claimed_numbers(logic) & numbers(output) - numbers(known))


def is_constant(code: str) -> bool:
    """Whether code prints values that were worked out by hand. Code that cannot be parsed is left to its run."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    printed = all(isinstance(call.func, ast.Name) and call.func.id in ("print", "str") for call in calls)
    work = (ast.BinOp, ast.Compare, ast.comprehension, ast.For, ast.While)
    return printed and not any(isinstance(node, work) for node in nodes)


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
    text = re.sub(r"^\W*(?:step\s*)?\d+\s*[.):]\s", "", logic, flags=re.IGNORECASE | re.MULTILINE)
    small = {number for number in numbers(text) if len(number) == 1}
    stated = re.findall(r"(?:=|≈|\bis|\bare|\bgives?|\bget|\bequals?|\bobtain)\s*\W?\s*(\d)(?![\d.,]\d|\d)", text)
    return numbers(text) - (small - set(stated))


def words(text: str) -> set[str]:
    """Lower-case words of three letters or more, with underscores as spaces."""
    return set(re.findall(r"[^\W\d_]{3,}", text.lower()))


def agrees(output: str, replaced: str) -> bool:
    """Whether the text that code replaced came to the same result: every number of the output stands in it.

    What the actor wrote behind it can then stay. Otherwise that builds on another result.
    """
    found = numbers(output)
    if found:
        return found <= numbers(replaced)
    return "".join(output.split()).lower() in "".join(replaced.split()).lower()


def error_type(result: ExecResult) -> str:
    """The class of the exception, or else the status."""
    name = result.error.partition(":")[0]
    return name if result.status == "error" and name.isidentifier() else result.status
