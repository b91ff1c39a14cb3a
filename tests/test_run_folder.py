"""The run folder: settings of a resumed run, logs and their sizes at a checkpoint, atomic writes, and trackers."""

import json
import os
import time
from dataclasses import dataclass

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from thor.run_folder import LOGS, Run, base_model, check_trackers, lineage, spread, write_atomic, writing
from thor.settings import UserError
from thor.trajectory import Problem, Trajectory


@dataclass(frozen=True)
class Settings:
    lr: float = 0.5
    rows: int = 8
    report_to: str = "none"
    resume: bool = False


@dataclass(frozen=True)
class WithModel(Settings):
    model: str = ""


def finish(folder: str, model: str) -> None:
    """A run of this name in the working directory that has trained `model`."""
    Run(folder, WithModel(model=model), resume=False).start()
    os.mkdir(f"{folder}/final")


def test_lineage_of_a_model_is_the_same_from_any_working_directory(tmp_path, monkeypatch):
    """Two projects have runs of equal names, which started from different models."""
    for project, base in (("a", "Qwen/7B"), ("b", "vllm:smollm2-135m")):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        finish("runs/sft", base)
        finish("runs/rl", "runs/sft/final")
    runs = tmp_path.resolve() / "a/runs"
    assert lineage("../a/runs/rl/final") == [f"{runs}/rl/final", f"{runs}/sft/final", "Qwen/7B"]
    assert base_model("../a/runs/rl/final/") == "Qwen/7B"
    assert base_model("runs/rl/final") == base_model("vllm:runs/rl/final") == "smollm2-135m"
    finish("runs/rl2", "../a/runs/rl/final")
    monkeypatch.chdir(tmp_path / "b/runs/rl2")
    assert base_model("final") == "Qwen/7B" and base_model("smollm2-135m") == "smollm2-135m"
    resumed = Run(".", WithModel(model="../a/runs/rl/final"), resume=True)  # the lineage is not a setting
    with pytest.raises(UserError, match="model was"):
        Run(".", WithModel(model="other"), resume=True)
    assert resumed.folder.is_dir() and lineage("final")[1:] == lineage("../../../a/runs/rl/final")


def test_model_that_is_not_from_a_run_is_its_own_base_model(tmp_path, monkeypatch):
    """A folder of checkpoints of another trainer has a config.json too."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "model": "smollm2-135m"}))
    monkeypatch.chdir(tmp_path)
    for model in ("checkpoint-500", str(tmp_path / "checkpoint-500"), "smollm2-135m", "a/b", "http://host:8000"):
        assert lineage(model) == [model] and base_model(model) == model
    assert base_model("vllm:smollm2-135m") == "smollm2-135m"
    monkeypatch.setattr("thor.run_folder.gather", lambda value: ["seen by rank 0", value])
    assert base_model("a/b") == "seen by rank 0"


def test_run_folder_logs_and_refuses_other_settings(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    assert not (tmp_path / "r").exists()
    run.start()
    run.log(0, {"a": 1.0, "b": float("nan")})
    assert run.read("metrics.jsonl") == [{"step": 0, "a": 1.0, "b": None}]
    with pytest.raises(UserError, match="not empty"):
        Run(str(tmp_path / "r"), Settings(), resume=False)
    with pytest.raises(UserError, match="lr was 0.5"):
        Run(str(tmp_path / "r"), Settings(lr=1.0), resume=True)


@pytest.mark.parametrize(("saved", "now"), [({"lr": 0.5, "old": 1}, {"lr": 0.5}), ({}, {"lr": 0.5})])
def test_resume_refuses_a_setting_that_only_one_of_both_runs_has(tmp_path, saved, now):
    (tmp_path / "config.json").write_text(json.dumps({"rows": 8, "report_to": "none", **saved}))
    name = next(iter(saved.keys() ^ now.keys()))
    with pytest.raises(UserError, match=f"--resume: {name} was {saved.get(name)!r} in .*config.json, but now is"):
        Run(str(tmp_path), Settings(), resume=True)


def test_resume_may_change_rows_and_the_flag_itself(tmp_path):
    folder = tmp_path / "runs/r"
    Run(str(folder), Settings(), resume=False).start()
    Run(str(folder), Settings(rows=1, resume=True), resume=True).start()
    assert json.loads((folder / "config.json").read_text()) == {"lr": 0.5, "rows": 1, "report_to": "none"}


def test_out_that_is_a_file_is_refused_even_with_resume(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        Run(str(tmp_path / "file"), Settings(), resume=True)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    run = Run(str(tmp_path / "r"), Settings(report_to="tensorboard"), resume=False)
    run.start()
    run.log(0, {})
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    monkeypatch.setattr("thor.run_folder.rank", lambda: 1)
    Run(str(tmp_path / "other"), Settings(), resume=False).start()
    run.write_json("config.json", {})
    run.append("metrics.jsonl", {})
    run.log(1, {})
    run.write_trajectories("trajectories.jsonl", [Trajectory(Problem("p", "q"), [1])], tokenizer=None)
    run.rewind("metrics.jsonl", 0)
    run.start_trackers(0)
    with run.whole_folder("final") as folder:
        assert folder == run / "final"
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
    assert not (tmp_path / "other").exists()


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x.json", "old")

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "old"


def test_incomplete_last_line_is_cut_off(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    assert run.read("x.jsonl") == []
    run.append("x.jsonl", {"a": 1})
    with (run / "x.jsonl").open("a") as file:
        file.write('{"a":')
    assert run.read("x.jsonl") == [{"a": 1}] and (run / "x.jsonl").read_text() == '{"a":1}\n'
    run.append("x.jsonl", {"a": 2})
    assert run.read("x.jsonl") == [{"a": 1}, {"a": 2}]


def test_logs_are_cut_to_the_sizes_that_a_checkpoint_holds(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    empty = run.log_sizes()
    assert empty == dict.fromkeys(LOGS, 0) and "metrics.jsonl" in LOGS
    run.append("trajectories.jsonl", {"text": "é"})
    run.log(0, {})
    sizes = run.log_sizes()
    assert sizes == empty | {"metrics.jsonl": len('{"step":0}\n'), "trajectories.jsonl": len('{"text":"é"}\n') + 1}
    run.log(1, {})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"incomplete')
    for name in LOGS:
        run.rewind(name, sizes[name])
    assert run.read("metrics.jsonl") == [{"step": 0}] and run.read("trajectories.jsonl") == [{"text": "é"}]
    run.rewind("metrics.jsonl", 0)
    assert run.read("metrics.jsonl") == []


def test_rewind_accepts_a_deleted_log_and_refuses_a_shorter_one(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    run.rewind("metrics.jsonl", 100)
    assert not (run / "metrics.jsonl").exists()
    run.log(0, {})
    with pytest.raises(UserError, match=r"metrics.jsonl: has 11 bytes, but had 12 at the checkpoint"):
        run.rewind("metrics.jsonl", 12)
    assert run.read("metrics.jsonl") == [{"step": 0}]


def test_spread_chooses_items_at_equal_distances():
    groups = [f"{group}{sample}" for group in "abc" for sample in range(4)]
    assert spread(groups, 3) == ["a0", "b0", "c0"]
    assert spread(groups, 6) == ["a0", "a2", "b0", "b2", "c0", "c2"]
    assert spread(groups, 2) == ["a0", "b2"]
    assert spread(groups, 12) == spread(groups, 99) == groups
    assert spread(groups, 0) == spread([], 3) == []
    assert [item[0] for item in spread(groups, 7)] == list("aaabbcc")


def test_unicode_line_breaks_do_not_split_records(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    run.append("x.jsonl", {"text": "a\u2028b\u0085c"})
    assert run.read("x.jsonl") == [{"text": "a\u2028b\u0085c"}]


def test_whole_folder_appears_only_when_complete(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    with pytest.raises(KeyboardInterrupt), run.whole_folder("final") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not (run / "final").exists()
    with run.whole_folder("final") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (run / "final").iterdir()] == ["whole"]


def test_error_inside_a_whole_folder_is_not_called_a_failed_write(tmp_path):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    with pytest.raises(RuntimeError, match="^Connection closed by peer$"), run.whole_folder("final"):
        raise RuntimeError("Connection closed by peer")
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("a\nb"), Exception("os error 28")])
def test_failed_write_is_one_line_and_leaves_no_partial_file(tmp_path, error):
    (tmp_path / "x.tmp").touch()
    with pytest.raises(UserError, match=r"x: cannot be written \([^\n]+\); is the disk full"):  # noqa: SIM117
        with writing(tmp_path / "x", tmp_path / "x.tmp"):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_whole_folder_replaces_one_whose_predecessor_was_not_removed(tmp_path):
    """A run that is killed after both renames leaves the predecessor."""
    run = Run(str(tmp_path), Settings(), resume=False)
    for name in ("final", "final.old"):
        (run / name).mkdir()
        (run / name / "file").touch()
    with run.whole_folder("final") as folder:
        (folder / "new").touch()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["final", "final/new"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_next_write_removes_what_a_killed_replacement_left(tmp_path, monkeypatch, killed_at):
    run = Run(str(tmp_path / "r"), Settings(), resume=False)
    run.start()
    (run / "final").mkdir()
    rename, calls = os.replace, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        rename(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), run.whole_folder("final") as folder:
        patch.setattr(os, "replace", killed)
        (folder / "first").touch()
    assert (run / "final.old").exists() == (killed_at == 2)
    with run.whole_folder("final") as folder:
        (folder / "second").touch()
    assert [p.name for p in (run / "final").iterdir()] == ["second"]
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.json", "final"]


# ---- trackers -------------------------------------------------------------------------------------------------------


def test_check_trackers_accepts_none_and_known_trackers():
    assert check_trackers("none") == []
    assert check_trackers("tensorboard") == ["tensorboard"]


def test_check_trackers_rejects_unknown_names():
    with pytest.raises(UserError, match="--report_to magic: must be 'none' or some of .*tensorboard"):
        check_trackers("tensorboard, magic")


def test_check_trackers_rejects_trackers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("thor.run_folder.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="--report_to wandb: its package is not installed; pip install wandb"):
        check_trackers("tensorboard,wandb")


@pytest.mark.parametrize(("report_to", "written"), [("tensorboard", True), ("none", False)])
def test_tensorboard_files_are_written_only_if_requested(tmp_path, report_to, written):
    run = Run(str(tmp_path / "r"), Settings(report_to=report_to), resume=False)
    run.start()
    with run:
        run.start_trackers(0)
        run.log(0, {"a": 1.0, "b": float("nan")})
    assert any("tfevents" in path.name for path in run.folder.rglob("*")) == written
    assert len(run.read("metrics.jsonl")) == 1


def test_resumed_run_hides_the_tensorboard_points_that_it_rewrites(tmp_path):
    settings = Settings(report_to="tensorboard")
    first = Run(str(tmp_path / "r"), settings, resume=False)
    first.start()
    with first:
        first.start_trackers(0)
        for step in range(3):
            first.log(step, {"a": 10.0 + step})
    time.sleep(1)  # TensorBoard orders event files by name, which contains the time in seconds
    resumed = Run(str(tmp_path / "r"), settings, resume=True)
    with resumed:
        resumed.start_trackers(1)
        resumed.log(1, {"a": 21.0})
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("a")] == [(0, 10.0), (1, 21.0)]


class Tracker:
    """Stands in for a tracker of accelerate."""

    requires_logging_directory, calls = False, []

    def __init__(self, project, name):
        self.calls.append(("init", project, name))

    def start(self):
        if self.fails:
            raise RuntimeError("not\nlogged in")

    def store_init_configuration(self, config):
        self.calls.append(("config", config["lr"]))

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.mark.parametrize("fails", [False, True])
def test_trackers_are_started_and_finished_even_after_an_error(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("thor.run_folder.get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(Tracker, "calls", [])
    monkeypatch.setattr(Tracker, "fails", fails, raising=False)
    run = Run(str(tmp_path / "r"), Settings(report_to="wandb"), resume=False)
    run.start()
    error = pytest.raises(UserError, match="--report_to wandb: not logged in") if fails else pytest.raises(ValueError)
    with error, run:
        run.start_trackers(0)
        run.log(0, {"a": 1.0, "b": float("nan")})
        raise ValueError
    rest = [] if fails else [("config", 0.5), (0, {"a": 1.0}), "finish"]
    assert Tracker.calls == [("init", "thor", "r"), *rest]
