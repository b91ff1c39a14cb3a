"""Tests of run_infer.py: names, limits, resuming, ranks, interruptions, comparisons."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from run_infer import Settings, check, run_name, stages
from thor.data import BENCHMARKS
from thor.metrics import table
from thor.run_folder import Run
from thor.settings import UserError, parse_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(tmp_path, model) -> list[str]:
    """Flags of a small evaluation: five problems of two files, two samples each."""
    for name, count in (("one", 3), ("two", 2)):
        rows = [json.dumps({"question": f"{i} + 2 = ?", "answer": "4"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return ["--data", "one.jsonl,two.jsonl", "--model", str(model), "--samples", "2", "--max_tokens", "24"]


def start(cwd: Path, *flags: str, ranks: int = 1, **options) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "run_infer.py"), *flags],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def infer(cwd: Path, *flags: str, ranks: int = 1) -> str:
    """Run run_infer.py and return what it prints."""
    with start(cwd, *flags, ranks=ranks) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def test_model_is_named_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/sft-7b/final", "models/Qwen3-8B"):
        Path(folder).mkdir(parents=True)
    names = {
        "Qwen/Qwen2.5-Math-7B": "Qwen/Qwen2.5-Math-7B",
        "vllm:Qwen/Qwen2.5-Math-7B": "Qwen/Qwen2.5-Math-7B",
        "smollm2-135m": "smollm2-135m",
        "http://host:8000": "http://host:8000",
        "http://host:8000#Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        "runs/sft-7b/final": "sft-7b",
        "vllm:runs/sft-7b/final/": "sft-7b",
        "models/Qwen3-8B": "Qwen3-8B",
    }
    for model, name in names.items():
        assert run_name(Settings(model=model, self_correct=0), tools=True) == name
    assert run_name(Settings(model="a/b", self_correct=2), tools=True) == "a/b + self-correction"
    assert run_name(Settings(model="a/b", self_correct=2), tools=False) == "a/b without code"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(question="?", data="gsm8k"), "exclude each other"),
        (Settings(data="gsm8k", compare=["a"]), "exclude each other"),
        (Settings(temperature=0.0), "--temperature 0: .*--self_correct 0"),
        (Settings(temperature=0.0, self_correct=0, samples=2), "--temperature 0: .*--samples 1"),
    ],
)
def test_contradicting_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check(settings)


@pytest.mark.parametrize("name", ["infer-qwen2.5-7b", "infer-qwen3-8b"])
def test_settings_files_of_the_paper_are_complete(name):
    settings = parse_settings(Settings, "", ["--config", str(ROOT / "docs/configs" / f"{name}.yaml")])
    check(settings)
    assert set(settings.data.split(",")) == {"aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench"}
    assert set(settings.data.split(",")) <= set(BENCHMARKS) and settings.samples == 4 == settings.self_correct
    assert None not in (settings.max_tokens, settings.max_rounds, settings.temperature)


def test_evaluation_writes_results_of_all_sources(tmp_path, model, flags):
    out = infer(tmp_path, *flags, "--out", "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert f"{model} is not the demo model, so the defaults are: max_rounds 5, temperature 0.6" in out
    assert list(results["sources"]) == ["one", "two"] and results["complete"] and results["seconds"] > 0
    assert (results["problems"], results["samples"]) == (5, 2)
    assert (results["sources"]["one"]["problems"], results["sources"]["two"]["problems"]) == (3, 2)
    text = (tmp_path / "run/results.md").read_text()
    assert text in out and "5 problems, 2 samples of each" in text and "| average" in text
    records = [json.loads(line) for line in (tmp_path / "run/trajectories.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in records][:3] == [("one/0", 0), ("one/0", 1), ("one/1", 0)]
    accuracy = [sum(r["reward"] for r in records if r["source"] == s) / n for s, n in (("one", 6), ("two", 4))]
    assert results["accuracy"][0] == pytest.approx(sum(accuracy) / 2)


def test_killed_evaluation_is_resumed_to_the_same_file_on_any_number_of_ranks(tmp_path, flags):
    infer(tmp_path, *flags, "--out", "whole")
    whole = (tmp_path / "whole/trajectories.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    infer(tmp_path, *flags, "--out", "killed")
    log = tmp_path / "killed/trajectories.jsonl"
    (tmp_path / "killed/results.json").unlink()
    for ranks, left in ((1, lines[6:8] + lines[:3] + ['{"id": "cut']), (2, lines[:2]), (2, [])):
        log.write_text("".join(left))
        out = infer(tmp_path, *flags, "--out", "killed", "--resume", ranks=ranks)
        assert log.read_text() == whole and "interrupted" not in out
        tables = [(tmp_path / name / "results.md").read_text().partition("\n")[2] for name in ("whole", "killed")]
        assert tables[0] == tables[1]  # the benchmarks in the order of --data, too
        assert sorted(p.name for p in log.parent.glob("traj*")) == ["trajectories.jsonl"]
    assert out.count("5 problems") == 1  # only rank 0 prints


def test_interrupted_evaluation_prints_what_is_done_and_says_so(tmp_path, flags):
    rows = [json.dumps({"question": f"{i} + 2 = ?", "answer": "4"}) + "\n" for i in range(2000)]
    (tmp_path / "one.jsonl").write_text("".join(rows))
    interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # background jobs ignore it
    flags = [*flags, "--rows", "4", "--out", "run"]
    with start(tmp_path, *flags, **interruptible) as process:
        log = tmp_path / "run/trajectories.jsonl"
        for _ in range(6000):
            if log.exists() and log.stat().st_size > 2000:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors, errors
    results = json.loads((tmp_path / "run/results.json").read_text())
    done = results["problems"]
    assert not results["complete"] and 0 < done < 2002
    assert f"interrupted, the numbers cover the {done} that are done" in out and "| accuracy %" in out
    assert out.rstrip().endswith((tmp_path / "run/results.md").read_text().rstrip())


def test_runs_are_compared(tmp_path, flags):
    infer(tmp_path, *flags, "--out", "a")
    infer(tmp_path, *flags, "--out", "b", "--seed", "1")
    for name, reward in (("a", 0.0), ("b", 1.0)):
        path = tmp_path / name / "trajectories.jsonl"
        records = [json.loads(line) | {"reward": reward} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = infer(tmp_path, "--compare", "a", "b")
    assert "+100.0 [+100.0, +100.0]" in out and "| average" in out
    assert "100.0 [100-100]" in infer(tmp_path, "--compare", "b")
    with start(tmp_path, "--compare", "a", "missing") as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and "--compare missing: has no trajectories.jsonl" in errors
    path.write_text(path.read_text() + '{"id": "a"}\n')
    with start(tmp_path, "--compare", "b") as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and f"--compare b/{path.name}:11: not a sample of run_infer.py" in errors


def test_resuming_a_finished_evaluation_adds_no_time(tmp_path, flags):
    infer(tmp_path, *flags, "--out", "run")
    before = (tmp_path / "run/results.json").read_text()
    infer(tmp_path, *flags, "--out", "run", "--resume")
    assert (tmp_path / "run/results.json").read_text() == before


def test_stages_of_a_model_are_found_in_the_folders_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, model, values in (("sft", "smollm2-135m", [0.1, 0.2]), ("rl", "runs/sft/final", [0.2, 0.3, 0.4])):
        folder = Path("runs", name)
        Run(str(folder), Settings(model=model), resume=False).start()
        (folder / "final").mkdir()
        records = [
            {"data": data, "accuracy": [value, value - 0.1, value + 0.1], "code_pass_rate": [None] * 3, "problems": 64}
            for value in values
            for data in ("synthetic", "other")
        ]
        (folder / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = stages("../runs/rl/final")
    assert [(name, row["accuracy"][0]) for name, row in rows] == [("base", 0.1), ("after SFT", 0.2), ("after RL", 0.4)]
    assert "| 64       | 40.0 [30-50] | -" in table(rows)
    assert stages("smollm2-135m") == []
