"""What a TIRGen run reports: summary.json, its table, and trajectories in colour."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from typing import Any

from thor.demo import few_shot_actor, few_shot_critic
from thor.prompts import QUESTION, Prompt
from thor.terminal import Terminal
from thor.tirgen.critic import first_block
from thor.tirgen.draft import Draft
from thor.tirgen.filters import Rates, Selection
from thor.tirgen.roles import FEW_SHOT, Prompts
from thor.trajectory import Problem


class KeptStatistics:
    """Counts over the trajectories that the filter kept."""

    def __init__(self) -> None:
        self.histograms = {name: Counter() for name in ("calls", "characters", "pass_rate", "plain_pass_rate")}
        self.libraries: Counter[str] = Counter()
        self.count = 0

    def add(self, draft: Draft, rates: Rates) -> None:
        self.count += 1
        values = {
            "calls": len(draft.codes),
            "characters": _bin(len(draft.text)),
            "pass_rate": rates.pass_rate,
            "plain_pass_rate": rates.plain_pass_rate,
        }
        for name, value in values.items():
            self.histograms[name][round(value, 2) if isinstance(value, float) else value] += 1
        self.libraries.update({name for code in draft.codes for name in imported(code)})

    def to_dict(self) -> dict:
        with_code = self.count - self.histograms["calls"][0]
        counts = {name: _sorted(histogram) for name, histogram in self.histograms.items()}
        return (
            {"trajectories": self.count, "code_ratio": with_code / max(1, self.count)}
            | counts
            | {"libraries": dict(self.libraries.most_common())}
        )


def summary(selection: Selection, kept: KeptStatistics, excluded: dict[str, int]) -> dict:
    """The contents of summary.json. Tokens are those that the models sampled, for all tries."""
    tokens = selection.tokens
    return {
        "excluded_problems": excluded,
        "problems": len(selection.rates),
        "funnel": selection.funnel,
        "dropped": {stage: dict(reasons.most_common()) for stage, reasons in selection.reasons.items()},
        "rejected_rewrites": dict(selection.rejected.most_common()),
        "code_errors": dict(selection.errors.most_common()),
        "kept": kept.to_dict(),
        "tokens": dict(tokens) | {"per_kept_trajectory": tokens.total() / max(1, kept.count)},
    }


def table(report: dict) -> str:
    """The summary for people: one line per stage, then the counts."""
    funnel, dropped = report["funnel"], report["dropped"]
    width = max(map(len, funnel))
    lines = [
        f"{stage:{width}s} {count:7d}  {_counts(dropped.get(stage, {}))}".rstrip() for stage, count in funnel.items()
    ]
    kept, tokens = report["kept"], report["tokens"]
    lines.append(f"problems left out because of a test set: {_counts(report['excluded_problems']) or 'none'}")
    lines.append(f"replies of the critic that were rejected: {_counts(report['rejected_rewrites']) or 'none'}")
    lines.append(f"failed runs of code: {_counts(report['code_errors']) or 'none'}")
    lines.append(f"code ratio {kept['code_ratio']:.2f}, libraries: {_counts(kept['libraries']) or 'none'}")
    for name in ("calls", "characters", "pass_rate", "plain_pass_rate"):
        lines.append(f"{name.replace('_', ' ')}: {_counts(kept[name]) or 'none'}")
    if alignment := report["alignment"]:
        means = {name: alignment[name] for name in ("trajectories", "critic_solutions")}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {'none' if m is None else f'{m:.2f}'}" for name, m in means.items()
        )
        lines.append(f"mean log-prob of a token under the actor: {shown}")
    lines.append(f"tokens: {_counts({name: round(count) for name, count in tokens.items()})}")
    return "\n".join(lines)


def _counts(counts: dict) -> str:
    return ", ".join(f"{str(name).replace('_', ' ')} {count:,}" for name, count in counts.items())


def _sorted(histogram: Counter) -> dict[str, int]:
    order = sorted(histogram, key=lambda value: (value is None, value))
    return {"unknown" if value is None else str(value): histogram[value] for value in order}


def _bin(value: int) -> int:
    """The largest of 0, 100, 200, 500, 1000, 2000, ... that is not above the value."""
    edges = [0] + [digit * 10**power for power in range(2, 9) for digit in (1, 2, 5)]
    return max(edge for edge in edges if edge <= value)


def imported(code: str) -> set[str]:
    """Top-level names of the modules that code imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def preview(drafts: Iterable[Draft], stream=None) -> None:
    """Print trajectories. In a terminal, thought, code and output have different colours."""
    terminal = Terminal(stream)
    for draft in drafts:
        terminal.write("question", f"\n--- {draft.name}: {draft.problem.question}\n")
        for text, own in draft.segments:
            block = first_block(text if own else "")
            cut = block.open_at if block.closed else len(text) if own else 0
            terminal.write("thought", text[:cut])
            terminal.write("code" if own else "output", text[cut:])
        terminal.write("answer", f"\n({draft.problem.answer})\n")


def dry_run(problems: list[Problem], excluded: dict[str, int], prompts: Prompts, settings: Any) -> str:
    """What a run would do: the prompts for the first problem, and the number of tries."""
    question = problems[0].question if problems else QUESTION
    lines = []
    for name, prompt in zip(prompts._fields, prompts, strict=True):
        if name != "judge" or settings.critic_calls == 2:
            lines.append(f"---- prompt of the {name} ----\n{show_prompt(name, prompt, question)}\n")
    tries = len(problems) * settings.tries, len(problems) * settings.plain_tries
    lines.append(f"problems left out because of a test set: {_counts(excluded) or 'none'}")
    lines.append(f"{len(problems):,} problems, {tries[0]:,} tries, and {tries[1]:,} of plain reasoning")
    return "\n".join(lines)


def show_prompt(name: str, prompt: Prompt | str, question: str) -> str:
    """A prompt as text, before a tokenizer renders it."""
    if prompt == FEW_SHOT:
        start = few_shot_actor(question) if name == "actor" else few_shot_critic(question, "")
        return f"{start}Question: {question}\n" + ("" if name == "actor" else "Step: {step}\nRewrite:")
    turns = {"system": prompt.system, "user": prompt.user.replace(QUESTION, question)}
    return "\n".join(f"{role}: {text}" for role, text in turns.items() if text)
