"""Tests of the command line: one-line errors, --help, settings, and printed results."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest

import run_infer
import run_rl
import run_sft
import run_tirgen
from run_infer import Printer
from thor.demo import DEMO_MODEL
from thor.prompts import PROMPT_FILE, load_prompt
from thor.settings import fill_defaults, parse_settings, setting

ROOT = Path(__file__).parent.parent


def run_script(script: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run run_<script>.py with these flags."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / f"run_{script}.py", *flags],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(path: Path, *lines: str) -> str:
    """Write a file of these lines and return its path."""
    path.write_text("\n".join(lines) + ("\n" if lines else ""), encoding="utf-8")
    return str(path)


# ---- scripts --------------------------------------------------------------------------------------------------------

GOOD_ROW = json.dumps({"question": "2 + 2 = ? é", "answer": "4"})


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("tirgen", ["--nope", "1"], ["unrecognized arguments: --nope"]),
        ("rl", ["--lr", "fast"], ["--lr", "fast"]),
        ("rl", ["--estimator", "ppo3"], ["--estimator ppo3"]),
        ("rl", ["--group", "1"], ["--group 1"]),
        ("rl", ["--sampler", "magic"], ["--sampler magic"]),
        ("rl", ["--warmup", "2"], ["--warmup 2", "at most 1"]),
        ("rl", ["--eval_samples", "4", "--eval_temperature", "0"], ["--eval_temperature 0", "--eval_samples 1"]),
        ("rl", ["--data", "code.jsonl"], ["--data code.jsonl", "HumanEval/0 has no answer"]),
        ("infer", ["--rows", "0"], ["--rows 0"]),
        ("rl", ["--temperature", "0"], ["--temperature 0"]),
        ("infer", ["--timeout", "0", "question?"], ["--timeout 0"]),
        ("infer", ["--data", "missing.jsonl"], ["--data", "missing.jsonl"]),
        ("sft", ["--data", "missing.jsonl"], ["--data missing.jsonl", "run_tirgen.py"]),
        ("infer", ["--data", "no_answer.jsonl"], ["--data no_answer.jsonl:2", "answer"]),
        ("infer", ["--data", "empty.jsonl"], ["empty.jsonl"]),
        ("infer", ["--data", "invalid.jsonl"], ["--data invalid.jsonl:2"]),
        ("sft", ["--data", "no_answer.jsonl", "--model", "MODEL"], ["--data no_answer.jsonl:1"]),
        ("sft", ["--data", "empty.jsonl", "--model", "MODEL"], ["empty.jsonl", "empty"]),
        ("infer", ["--model", "hollow", "--data", "good.jsonl"], ["hollow", "no weights"]),
        ("infer", ["--model", "./nowhere", "question?"], ["./nowhere", "no such model folder"]),
        ("infer", ["--model", "nobody/nothing", "question?"], ["nobody/nothing"]),
        ("infer", ["--data", "good.jsonl", "--out", "full"], ["--out full", "not empty", "--resume"]),
        ("infer", ["a question", "--temperature", "0"], ["--temperature 0", "--self_correct 0"]),
        ("tirgen", ["--actor_prompt", "magic"], ["--actor_prompt magic", "few-shot"]),
        ("tirgen", ["--shard", "3/2"], ["--shard 3/2", "1/8"]),
        ("tirgen", ["--data", "good.jsonl", "--exclude", "good.jsonl"], ["--exclude good.jsonl", "no problem is left"]),
        ("tirgen", ["--tries", "0"], ["--tries 0"]),
        ("rl", ["--config", "settings.yaml"], ["settings.yaml", "learning_rate"]),
        ("sft", ["--prompt", "tol"], ["--prompt tol", "tool-base"]),
        ("rl", ["--prompt", "settings.yaml"], ["--prompt settings.yaml", "no field is named 'learning_rate'"]),
        *(
            (script, ["--actor" if script == "tirgen" else "--model", "refusing", "--data", data], ["no turns today"])
            for script, data in (("tirgen", "good.jsonl"), ("sft", "row.jsonl"), ("rl", "good.jsonl"))
        ),
        ("infer", ["--model", "refusing", "question?"], ["cannot render the prompt: no turns today"]),
    ],
)
def test_bad_input_is_a_one_line_error_and_writes_no_files(tmp_path, model, script, flags, expected):
    write(tmp_path / "good.jsonl", GOOD_ROW)
    write(tmp_path / "no_answer.jsonl", GOOD_ROW, '{"question": "why?"}')
    write(tmp_path / "invalid.jsonl", GOOD_ROW, "{'question': 1}")
    write(tmp_path / "empty.jsonl")
    code = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}
    write(tmp_path / "code.jsonl", json.dumps(code))
    write(tmp_path / "settings.yaml", "learning_rate: 1")
    (tmp_path / "hollow").mkdir()
    write(tmp_path / "hollow" / "config.json", (model / "config.json").read_text())
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "something", "precious")
    segments = [{"text": "\\boxed{1}", "sampled": True}]
    write(tmp_path / "row.jsonl", json.dumps({"id": "1", "question": "1?", "answer": "1", "segments": segments}))
    shutil.copytree(model, tmp_path / "refusing")
    write(tmp_path / "refusing" / "chat_template.jinja", "{{ raise_exception('no turns today') }}")
    before = sorted(tmp_path.rglob("*"))
    done = run_script(script, *[str(model) if f == "MODEL" else f for f in flags], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(message) == 1 and all(part in message[0] for part in expected), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", ["tirgen", "sft", "rl", "infer"])
def test_help_lists_all_settings_and_topics(script, tmp_path):
    done = run_script(script, "--help", cwd=tmp_path)
    module = __import__(f"run_{script}")
    assert done.returncode == 0
    for field in module.Settings.__dataclass_fields__.values():
        assert f"--{field.name}" in done.stdout and field.metadata["help"]
        assert f"\n{field.metadata['topic']}:\n" in done.stdout


def test_prompt_is_stored_with_the_model_and_used_by_the_next_stage(tmp_path, model):
    segments = [{"text": "It is \\boxed{4}.", "sampled": True}]
    row = json.dumps({"id": "a", "question": "2 + 2?", "answer": "4", "segments": segments})
    write(tmp_path / "tir.jsonl", *[row] * 2)
    own = write(tmp_path / "own.yaml", "system: Be brief.", "chat_kwargs: {enable_thinking: false}", "tools: false")
    flags = ["--data", "tir.jsonl", "--epochs", "1", "--evaluate", "False", "--report_to", "none"]
    for prompt, source, folder in (("own.yaml", model, "a"), ("", tmp_path / "a/final", "b"), ("tool", "b/final", "c")):
        flag = ["--prompt", prompt] if prompt else []
        done = run_script("sft", *flags, *flag, "--model", str(source), "--out", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("--prompt tool: differs from the prompt" in done.stdout) == (prompt == "tool")
    prompts = [load_prompt(tmp_path / folder / "final" / PROMPT_FILE) for folder in "abc"]
    assert prompts == [load_prompt(own), load_prompt(own), load_prompt("tool")]


def test_rl_and_infer_run_end_to_end(tmp_path, model):
    data = write(tmp_path / "data.jsonl", *[GOOD_ROW] * 3)
    small = ["--prompts", "2", "--group", "4", "--max_tokens", "24", "--iterations", "2", "--evaluate", "False"]
    done = run_script("rl", "--data", data, "--model", str(model), "--out", "runs/rl", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs/rl/metrics.jsonl").read_text().splitlines()) == 2
    flags = ["--data", data, "--model", "runs/rl/final", "--out", "runs/x", "--max_tokens", "24"]
    done = run_script("infer", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "accuracy %" in done.stdout, done.stderr
    summary = json.loads((tmp_path / "runs/x/results.json").read_text())
    assert summary["problems"] == 3 and 0 <= summary["accuracy"][0] <= 1
    # a run that is resumed after its first trajectory completes the file
    path = tmp_path / "runs/x/trajectories.jsonl"
    path.write_text(path.read_text().splitlines()[0] + '\n{"incomplete')
    done = run_script("infer", *flags, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and len(path.read_text().splitlines()) == 3, done.stderr


def test_piped_output_has_no_colors(tmp_path, model):
    done = run_script("infer", "What is 2 + 2?", "--model", str(model), "--max_tokens", "30", cwd=tmp_path)
    assert done.returncode == 0 and "answer:" in done.stdout and "\033" not in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_ended_by_ctrl_c_can_be_resumed(tmp_path, model):
    data = write(tmp_path / "data.jsonl", *[GOOD_ROW] * 4)
    flags = ["--data", data, "--model", str(model), "--prompts", "2", "--group", "4", "--max_tokens", "24"]
    flags += ["--iterations", "400", "--evaluate", "False", "--out", "rl"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, ROOT / "run_rl.py", *flags],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    ) as p:
        for _ in range(600):
            if (tmp_path / "rl/checkpoints/latest.pt").exists():
                break
            time.sleep(0.1)
        p.send_signal(signal.SIGINT)
        _, stderr = p.communicate(timeout=60)
        assert p.returncode == 130 and b"--resume" in stderr, stderr[-500:]
    reached = len((tmp_path / "rl/metrics.jsonl").read_text().splitlines())
    config = json.loads((tmp_path / "rl/config.json").read_text())
    config["iterations"] = reached + 1  # as if the first command had set this number
    (tmp_path / "rl/config.json").write_text(json.dumps(config))
    flags[flags.index("400")] = str(reached + 1)
    done = run_script("rl", *flags, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(reached + 1)) and (tmp_path / "rl/final/config.json").exists()


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """Settings of a small script."""

    lr: float = setting(0.5, "learning rate", "optimisation")
    name: str = setting("x", "a name", "run")
    flag: bool = setting(False, "a switch", "run")
    rows: int = setting(8, "rows of the cache", "memory", min=1)
    mode: Literal["fast", "slow"] = setting("fast", "how to run", "run")
    report_to: str = setting("none", "trackers", "run")
    share: float | None = setting(None, "a share above 0", "run", above=0, max=1)
    decay: float = setting(0.9, "a share below 1", "run", min=0, below=1)


def test_settings_from_defaults_config_and_flags(tmp_path):
    config = write(tmp_path / "c.yaml", "lr: 0.25", "flag: true")
    assert parse_settings(Demo, "", []) == Demo()
    assert parse_settings(Demo, "", ["--config", config]) == Demo(0.25, "x", True)
    assert parse_settings(Demo, "", ["--config", config, "--lr", "1"]) == Demo(1.0, "x", True)
    assert parse_settings(Demo, "", ["hello there", "--lr", "1"], positional="name") == Demo(1.0, "hello there")
    with pytest.raises(SystemExit) as stop:
        parse_settings(Demo, "", ["--l", "1"])  # no abbreviations
    assert stop.value.code == 2


def test_yaml_name_without_a_value_keeps_the_default(tmp_path):
    config = write(tmp_path / "c.yaml", "lr:", "rows: 3", "mode:")
    assert parse_settings(Demo, "", ["--config", config]) == Demo(rows=3)


@pytest.mark.parametrize(
    ("cls", "flags", "message"),
    [
        (run_rl.Settings, ["--estimator", "ppo3"], "--estimator ppo3: must be one of grpo, ppo"),
        (Demo, ["--mode", "medium"], "--mode medium: must be one of fast, slow"),
        (run_rl.Settings, ["--lr", "high"], "--lr high: must be of type float"),
        (Demo, ["--rows", "2.5"], "--rows 2.5: must be of type int"),
        (run_rl.Settings, ["--rows", "0"], "--rows 0: must be at least 1"),
        (Demo, ["--rows", "-1"], "--rows -1: must be at least 1"),
        (Demo, ["--lr", "nan"], "--lr nan: must be a finite number"),
        (Demo, ["--lr", "inf"], "--lr inf: must be a finite number"),
        (Demo, ["--share", "0"], "--share 0.0: must be above 0"),
        (Demo, ["--share", "1.5"], "--share 1.5: must be at most 1"),
        (Demo, ["--decay", "-0.1"], "--decay -0.1: must be at least 0"),
        (Demo, ["--decay", "1"], "--decay 1.0: must be below 1"),
        (Demo, ["--decay", "nan"], "--decay nan: must be a finite number"),
        (run_infer.Settings, ["--timeout", "0"], "--timeout 0.0: must be above 0"),
        (run_infer.Settings, ["--timeout", "nan"], "--timeout nan: must be a finite number"),
    ],
)
def test_invalid_value_exits_with_one_line(capsys, cls, flags, message):
    with pytest.raises(SystemExit) as stop:
        parse_settings(cls, "", flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: {message}\n")


def test_bounds_are_valid_values_if_they_are_inclusive():
    flags = ["--rows", "1", "--share", "1", "--decay", "0"]
    assert parse_settings(Demo, "", flags) == Demo(rows=1, share=1.0, decay=0.0)
    assert parse_settings(Demo, "", []).share is None


INVALID = {  # values without a meaning, for each numeric setting that has such values
    "beta1 beta2": (-0.1, 1, 1.5),
    "warmup gamma gae_lambda clip_low min_substantial code_free_share keep_one_call keep_easy": (-0.1, 1.5),
    "top_p critic_top_p": (0, -0.1, 1.5),
    "timeout test_timeout rank_timeout clip is_cap": (0, -1),
    "dual_clip": (0, 1),
    "lr value_lr weight_decay step_coef nll_coef kl_coef value_coef value_clip clip_high patience": (-0.1,),
    "eval_temperature critic_temperature": (-0.1,),
    "critic_calls": (0, 3),
    "limit max_rounds suffix_tokens observation_limit self_correct eval_every min_tokens min_chars kv_tokens": (-3,),
    "top_k critic_top_k log_trajectories plain_tries alignment preview": (-1,),
    "samples group prompts max_draws max_tokens max_length max_steps step_tokens code_tokens tries code_tries": (0, -1),
    "epochs batch iterations updates rows memory_mb box_window max_chars save_every keep": (0, -1),
    "eval_limit eval_samples max_tokens_per_micro_batch": (0, -1),
}
UNLIMITED = {"seed", "entropy_coef"}  # their negative values have a meaning


@pytest.mark.parametrize("script", [run_tirgen, run_sft, run_rl, run_infer])
def test_numbers_without_a_meaning_are_refused(script, capsys):
    kinds = get_type_hints(script.Settings)
    invalid = {name: values for names, values in INVALID.items() for name in names.split()}
    invalid["temperature"] = (0, -0.1) if script is run_rl else (-0.1,)  # greedy samples carry no signal in RL
    for field in fields(script.Settings):
        if not {int, float} & {kinds[field.name], *get_args(kinds[field.name])} or field.name in UNLIMITED:
            continue
        is_float = float in (kinds[field.name], *get_args(kinds[field.name]))
        for value in (*invalid[field.name], *(("nan", "inf") if is_float else ())):
            with pytest.raises(SystemExit) as stop:
                parse_settings(script.Settings, "", [f"--{field.name}={value}"])
            assert stop.value.code == 2 and f"error: --{field.name} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: \xff", "codec can't decode"),
        (b"name: {a: 1}", "name: must be a value or a list of values, not {'a': 1}"),
        (b"compare: [a, ]\nname: [a, null]", "name: must be a value or a list of values, not ['a', None]"),
    ],
)
def test_bad_settings_file_is_one_clear_line(tmp_path, capsys, content, message):
    config = tmp_path / "c.yaml"
    config.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        parse_settings(run_infer.Settings if b"compare" in content else Demo, "", ["--config", str(config)])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"--config {config}: " in line and (message in line or b"compare" in content)


def test_yaml_values_are_checked_like_flags(tmp_path, capsys):
    config = write(tmp_path / "c.yaml", "rows: 0")
    with pytest.raises(SystemExit) as stop:
        parse_settings(Demo, "", ["--config", config])
    assert stop.value.code == 2 and f"--config {config}: --rows 0: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_settings(Demo, "", ["--config", config, "--rows", "-1"])
    assert "error: --rows -1: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_settings(Demo, "", ["--config", write(tmp_path / "type.yaml", "rows: many")])
    assert "type.yaml: --rows many: must be of type int" in capsys.readouterr().err


def test_a_yaml_list_is_for_settings_with_several_values(tmp_path, capsys):
    config = write(tmp_path / "c.yaml", "data: [aime24, math500]", "compare: [a, b]")
    settings = parse_settings(run_infer.Settings, "", ["--config", config], positional="question")
    assert (settings.data, settings.compare, settings.question) == ("aime24,math500", ["a", "b"], "")
    with pytest.raises(SystemExit):
        config = write(tmp_path / "c.yaml", "samples: [1, 2]")
        parse_settings(run_infer.Settings, "", ["--config", config], positional="question")
    assert "c.yaml: samples: must be one value, not [1, 2]" in capsys.readouterr().err


# ---- printed results ------------------------------------------------------------------------------------------------


def test_printer_colors_text_output_and_corrections():
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self): ...

    terminal = Terminal()
    printer = Printer(terminal)
    for kind, text in (("text", "Think.\n```python\n"), ("text", "print(1)\n```"), ("output", "\n```output\n1\n```\n")):
        printer(kind, text)
    printer("correction", "\n```output\nNameError: x\n```\n")
    assert "\033[36mprint(1)" in terminal.text and "\033[32m\n```output" in terminal.text
    assert "\033[33m\n[failed: NameError: x;" in terminal.text and terminal.text.startswith("Think.")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            run_rl.Settings,
            {"lr": 1e-6, "max_tokens": 3200, "max_rounds": 5, "limit": None, "iterations": 200, "kl_coef": 0.0},
        ),
        (
            run_sft.Settings,
            {"lr": 2e-6, "max_tokens": 4096, "max_rounds": 5, "max_length": 20_000, "batch": 128, "epochs": 3},
        ),
    ],
)
def test_lengths_rates_and_limits_of_the_demo_model_are_not_those_of_others(settings, expected, capsys):
    demo, other = (fill_defaults(parse_settings(settings, "", []), name, DEMO_MODEL) for name in (DEMO_MODEL, "x/7b"))
    assert demo == settings() and asdict(other) == asdict(demo) | expected | {"eval_temperature": 0.6}
    assert "x/7b is not the demo model, so the defaults are: " in (line := capsys.readouterr().out)
    assert "limit all" in line or "limit" not in expected
    flags = [word for name in expected for word in (f"--{name}", str(getattr(demo, name)))]
    given = fill_defaults(parse_settings(settings, "", flags), "x/7b", DEMO_MODEL)
    assert asdict(given) == asdict(demo) | {"eval_temperature": 0.6}  # what is given stays, also if it is the demo's


def test_control_characters_of_a_model_or_tool_are_printed_visibly():
    stream = io.StringIO()
    printer = Printer(stream)
    printer("text", "a\tb\n\x1b[31mred\r\x07 é")
    printer("output", "\n```output\n\x1b]0;title\x07\x9b2J\n```\n")
    assert stream.getvalue() == "a\tb\n\\x1b[31mred\\x0d\\x07 é\n```output\n\\x1b]0;title\\x07\\x9b2J\n```\n"
