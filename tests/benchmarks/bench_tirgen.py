"""Time and peak memory of TIRGen's filter on fabricated tries.

    python tests/benchmarks/bench_tirgen.py --problems 12500 --tries 8

Writes the tries to a temporary drafts.jsonl, filters it and writes the rows, as run_tirgen.py does at its end. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from thor.tirgen.draft import Draft
from thor.tirgen.filters import FilterSettings, select
from thor.tirgen.store import read_drafts, write_rows
from thor.trajectory import ExecResult, Problem

WORDS = ["let", "the", "number", "of", "all", "positive", "integers", "be", "such", "that", "we", "compute", "a", "sum"]


def fabricate(rng: random.Random, problem: Problem, name: str, chars: int, plain: bool) -> Draft:
    """A try with up to three calls and about this many characters of prose, which some filters drop."""
    draft = Draft(problem, name, plain=plain, finished=rng.random() < 0.95, correct=rng.random() < 0.6)
    draft.append("<think>\n")
    for call in range(0 if plain else rng.randint(0, 3)):
        prose = " ".join(rng.choices(WORDS, k=chars // 5)) + f" in step {call}.\n"
        code = f"import math\nprint(math.comb({rng.randint(9, 99)}, 5))\n"
        draft.append_block(f"{prose}```python\n{code}```\n", code, ExecResult("ok", "123\n"))
    draft.append(
        " ".join(rng.choices(WORDS, k=chars // 5)) + f"\n</think>\nThe answer is \\boxed{{{rng.randint(1, 9)}}}."
    )
    return draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12_500)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--chars", type=int, default=2_000, help="of prose between two calls")
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "drafts.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for i in range(args.problems):
                problem = Problem(f"p/{i}", f"What is problem {i}?", "4")
                for k in range(args.tries):
                    draft = fabricate(rng, problem, f"p/{i}#{k}", args.chars, plain=k == 0)
                    file.write(json.dumps(draft.to_record()) + "\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        selection = select(read_drafts([path]), FilterSettings(min_substantial=0.6, keep_one_call=0.5))
        filtered = time.process_time()
        statistics = write_rows(Path(folder, "tir.jsonl"), selection)
        end = time.process_time()
        result = {
            "tries": args.problems * args.tries,
            "file_mb": round(path.stat().st_size / 1e6),
            "rows": statistics.count,
            "filter_seconds": round(filtered - start, 1),
            "rows_seconds": round(end - filtered, 1),
            "peak_mb_before": before // 1024,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
