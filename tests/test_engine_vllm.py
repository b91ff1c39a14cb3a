"""VLLMEngine and a real vLLM server, compared with HFEngine and the trainer.

Needs vLLM. The last part also needs the demo model (93 MB, downloaded on first use).
"""

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, complete, interrupt, tiny_llama, tiny_model

import run_rl
from thor.data import load_problems
from thor.demo import ModelError, demo_model, few_shot_actor
from thor.engines import HFEngine, HTTPEngine, Request, ServerError, VLLMEngine, vllm
from thor.prompts import Prompt
from thor.rollout import Sampling, solve
from thor.text import FenceParser, TextStream, decode, encode
from thor.training.model import load_model
from thor.training.scoring import score_text, score_tokens
from thor.trajectory import Trajectory

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

ROOT = Path(__file__).parent.parent
# The third token closes a code block and contains more text.
WORDS = ("\n```python\n", "print(1)", "\n```\nand more", "\\boxed{1}")
SHAPE = dict(hidden_size=128, head_dim=32)  # the smallest heads that vLLM's CPU attention supports


def saved(folder: Path, family: str = "llama", **changes):
    """A tiny random model with a byte-level tokenizer, saved to a folder and loaded from it as in the scripts."""
    tokenizer = byte_tokenizer(WORDS)
    tiny_model(family, tokenizer, **SHAPE, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), "cpu")[0]


# Tied heads have packed copies, and experts have a layout of their own.
TRAINING = ["llama float32", "llama bfloat16 tied", "qwen3 float32 tied", "qwen3_moe bfloat16", "mixtral float32"]


@pytest.fixture(scope="module", params=TRAINING)
def training(request, tmp_path_factory):
    """An engine and the trainer's model in float32. Tests may update the weights."""
    family, dtype, *tied = request.param.split()
    folder = tmp_path_factory.mktemp(family)
    model = saved(folder, family, tie_word_embeddings=bool(tied), initializer_range=0.1)
    return VLLMEngine(str(folder), rows=8, score=partial(score_text, model), dtype=dtype), model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine whose weights no test changes, and its model, with the process state before and after loading."""
    folder = tmp_path_factory.mktemp("engine")
    model = saved(folder)
    model.process_states = [process_state()]
    engine = VLLMEngine(str(folder), rows=8)
    model.process_states.append(process_state())
    return engine, model


def process_state() -> dict:
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "variables": [os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE")],
    }


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(200) for _ in range(rng.randint(1, 70))] for _ in range(count)]


def logps_gap(model, prompt: list[int], completion, temperature: float) -> float:
    """Largest difference between the log-probs of a completion and the trainer's."""
    scored = list(range(len(prompt), len(prompt) + len(completion.token_ids)))
    with torch.no_grad():
        theirs = score_tokens(model, [prompt + completion.token_ids], [scored], temperature).logp
    return (theirs - torch.tensor(completion.logps)).abs().max().item()


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_loading_preserves_the_process_state(engine):
    before, after = engine[1].process_states
    assert before == after
    torch.set_num_threads(2)  # vLLM's CPU worker replaces this function by one that does nothing
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_logps_match_the_trainer_at_each_temperature(engine):
    engine, model = engine
    temperatures = [1.0, 0.7, 0.0] * 3  # greedy log-probs are at temperature 1, as in HFEngine
    requests = [
        Request(str(i), p, 24, temperature=t, seed=i)
        for i, (p, t) in enumerate(zip(prompts(9), temperatures, strict=True))
    ]
    done = complete(engine, requests)
    for request in requests:
        assert len(done[request.id].logps) == len(done[request.id].token_ids) > 0
        assert logps_gap(model, request.token_ids, done[request.id], request.temperature or 1.0) < 1e-4


def test_more_prompt_tokens_than_fit_one_step(engine):
    """Chunked prefill must stay off on the CPU, where it fails for requests with a seed."""
    engine, model = engine
    limit = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    rng = random.Random(3)
    length = min(1500, engine.context - 8)
    requests = [
        Request(f"long{i}", [rng.randrange(200) for _ in range(length)], 2, seed=i) for i in range(limit // length + 2)
    ]
    done = complete(engine, requests)
    assert len(done) == len(requests)
    assert logps_gap(model, requests[-1].token_ids, done[requests[-1].id], 1.0) < 1e-4


def test_logps_are_of_the_truncated_distribution(engine):
    """Log-probs are renormalized after top-p and top-k, as in HFEngine."""
    engine, _ = engine
    request = Request("a", prompts(1)[0], 16, temperature=0.8, top_p=0.9, top_k=20, seed=3)
    done = complete(engine, [request])["a"]
    ids = request.token_ids + done.token_ids
    with torch.inference_mode():
        logits = tiny_llama(engine.tokenizer, **SHAPE)(torch.tensor([ids])).logits[0]
    for i, (token, logp) in enumerate(zip(done.token_ids, done.logps, strict=True), len(request.token_ids) - 1):
        kept = logits[i].topk(20).indices  # first top-k, then top-p of the rest, as in transformers
        probs = torch.softmax(logits[i][kept] / 0.8, -1)
        kept, probs = kept[(probs.cumsum(0) - probs) < 0.9].tolist(), probs[(probs.cumsum(0) - probs) < 0.9]
        assert token in kept and len(kept) < 20
        assert abs(logp - (probs / probs.sum()).log()[kept.index(token)].item()) < 1e-4


def test_samples_follow_their_distribution(engine):
    """The first tokens of 512 seeds have the frequencies of their log-probs, within five standard deviations."""
    engine, _ = engine
    requests = [Request(str(i), [5, 6, 7], 1, top_k=16, seed=i) for i in range(512)]
    drawn = complete(engine, requests).values()
    frequency = {c.token_ids[0]: c.logps[0] for c in drawn}
    assert len(frequency) <= 16
    for token, logp in frequency.items():
        p = np.exp(logp)
        count = sum(c.token_ids[0] == token for c in drawn)
        assert abs(count - 512 * p) < 5 * np.sqrt(512 * p * (1 - p)) + 1


def test_seeded_samples_do_not_depend_on_the_batch(engine):
    engine, _ = engine
    requests = [Request(str(i), p, 12, seed=2**64 - 1 - i) for i, p in enumerate(prompts(6, seed=1))]
    together = complete(engine, requests)
    alone = complete(engine, [requests[4]])["4"]
    assert alone.token_ids == together["4"].token_ids
    other = complete(engine, [Request("4", requests[4].token_ids, 12, seed=1)])["4"]
    assert other.token_ids != alone.token_ids


class StopAfter:
    """Stops at the n-th piece of text, and records the text."""

    def __init__(self, n: int) -> None:
        self.n, self.text = n, ""

    def feed(self, piece: str) -> bool:
        self.n -= 1
        self.text += piece
        return self.n <= 0


def test_stop_rule_ends_the_completion_at_its_token(engine):
    engine, _ = engine
    free = complete(engine, [Request(str(i), p, 20, seed=i) for i, p in enumerate(prompts(6, seed=2))])
    assert all(c.finish == "length" or c.finish == "eos" for c in free.values())
    rules = [StopAfter(n) for n in (1, 2, 5, 9, 19, 99)]
    before = prompts(6, seed=2)
    cut = complete(engine, [Request(str(i), p, 20, seed=i, stop=rules[i]) for i, p in enumerate(before)])
    for i, rule in enumerate(rules):
        full, part = free[str(i)], cut[str(i)]
        assert part.token_ids == full.token_ids[: len(part.token_ids)]
        assert part.logps == pytest.approx(full.logps[: len(part.logps)], abs=1e-4)
        assert part.finish == ("stop" if rule.n <= 0 else full.finish)
        stream = TextStream(engine.tokenizer, before[i])  # a prompt may end within a character
        assert rule.text == "".join(stream.push(t) for t in part.token_ids if t not in engine.eos)
    assert not engine.llm.llm_engine.has_unfinished_requests()  # vLLM has aborted them too


def test_token_that_closes_a_block_is_kept(engine):
    engine, _ = engine
    ids = [engine.tokenizer.convert_tokens_to_ids(word) for word in WORDS]
    requests = [Request(str(i), ids[:2], 400, seed=i, stop=FenceParser()) for i in range(8)]
    for request in requests:
        request.stop.feed(decode(engine.tokenizer, ids[:2]))  # opens a block
    closed = [c for c in complete(engine, requests).values() if c.finish == "stop"]
    assert closed
    for completion in closed:
        text = decode(engine.tokenizer, completion.token_ids)
        assert completion.token_ids[-1] == ids[2] and text.endswith("\n```\nand more")
        assert ids[2] not in completion.token_ids[:-1] and len(completion.logps) == len(completion.token_ids)


def test_eos_is_kept_and_context_length_limits_completions(engine):
    engine, model = engine
    eos, engine.eos = engine.eos, {*engine.eos, *range(200)}
    done = complete(engine, [Request(str(i), p, 9, seed=i) for i, p in enumerate(prompts(4))])
    engine.eos = eos
    assert {c.finish for c in done.values()} <= {"eos", "stop", "length"} and done["0"].finish == "eos"
    for completion in done.values():
        if completion.finish == "eos":
            assert completion.token_ids[-1] < 200 and all(t >= 200 for t in completion.token_ids[:-1])
    assert engine.context == model.config.max_position_embeddings == 2048
    engine.eos = set()
    last = complete(engine, [Request("a", [7] * 2046, 9)])["a"]
    engine.eos = eos
    assert last.finish == "length" and len(last.token_ids) == 2
    for ids in ([], [1] * 2048):
        with pytest.raises(ValueError, match="request a has"):
            engine.add(Request("a", ids, 4))
    with pytest.raises(ValueError, match="request a: max_tokens must be at least 1"):
        engine.add(Request("a", [1], 0))
    assert not engine.has_work()


def test_drop_aborts_all_requests(engine):
    """Drops more requests than run at once. Afterwards their ids can be used again."""
    engine, _ = engine
    for i in range(12):
        engine.add(Request(str(i), [5, 6, 7], 200, seed=i))
    for _ in range(3):
        engine.step()
    engine.drop()
    assert not engine.has_work() and not engine.llm.llm_engine.has_unfinished_requests()
    requests = [Request(str(i), p, 8, temperature=0) for i, p in enumerate(prompts(12))]
    again = complete(engine, requests)
    assert len(again) == 12
    alone = complete(engine, [requests[3]])["3"]
    assert again["3"].token_ids == alone.token_ids


def test_interrupted_step_leaves_no_invalid_cache(engine):
    engine, model = engine
    requests = [Request(str(i), [*range(100), i], 6, seed=i) for i in range(3)]

    [hook] = engine.llm.apply_model(interrupt)
    with pytest.raises(KeyboardInterrupt):
        complete(engine, requests)
    hook.remove()
    engine.drop()
    done = complete(engine, requests)
    for request in requests:
        assert logps_gap(model, request.token_ids, done[request.id], 1.0) < 1e-4


def test_missing_logp_is_nan(engine):
    """The trainer counts these tokens and gives them importance weight 1."""
    engine, _ = engine
    step = engine.llm.llm_engine.step

    def without_logps():
        outputs = step()
        for output in outputs:
            output.outputs[0].logprobs = [{} for _ in output.outputs[0].token_ids]
        return outputs

    engine.llm.llm_engine.step = without_logps
    done = complete(engine, [Request("a", [1, 2, 3], 4)])["a"]
    del engine.llm.llm_engine.step
    assert len(done.token_ids) == 4 and all(np.isnan(done.logps))


# ---- weight updates -------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_noise(model, scale: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def test_logps_follow_weight_updates(training):
    engine, model = training
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5}[engine.llm.llm_engine.model_config.dtype]
    prompt = prompts(1, seed=3)[0] * 3  # longer than a cache block
    request = Request("a", prompt, 16, seed=5)
    for seed in (1, 2):
        complete(engine, [request])  # fills the prefix cache with the old weights
        add_noise(model, 0.05, seed)
        assert logps_gap(model, prompt, complete(engine, [request])["a"], 1.0) > tolerance
        engine.update_weights(model.named_parameters())
        assert logps_gap(model, prompt, complete(engine, [request])["a"], 1.0) < tolerance


def reload_faults(model) -> dict:
    """What may go wrong in vLLM: each fault maps the tensors that it was sent to those that it loads."""
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    projection = "model.layers.1.self_attn.v_proj.weight"
    other = projection.replace("1", "0")
    swapped = {projection: other, other: projection}

    def outdated(sent: dict, name: str) -> dict:
        return sent | {name: old[name]} if name in sent else sent

    return {
        "nothing arrives": lambda sent: {},
        "one tensor does not arrive": lambda sent: {n: w for n, w in sent.items() if n != projection},
        "one tensor is outdated": lambda sent: outdated(sent, projection),
        "the embedding is outdated": lambda sent: outdated(sent, "model.embed_tokens.weight"),
        "half of a tensor is outdated": lambda sent: (
            sent | {projection: torch.cat((sent[projection][:32], old[projection][32:]))}
        ),
        "two tensors are exchanged": lambda sent: {swapped.get(n, n): w for n, w in sent.items()},
    }


@pytest.mark.parametrize("lr", [1e-6, 1e-2])
def test_update_that_does_not_arrive_is_refused(training, monkeypatch, lr):
    """A step of 1e-6 changes the log-probs less than rounding to bfloat16 does."""
    engine, model = training
    engine.update_weights(model.named_parameters())
    faults, reload = reload_faults(model), engine.llm.collective_rpc
    add_noise(model, lr)
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(
                engine.llm,
                "collective_rpc",
                lambda method, kwargs, fault=fault: reload(
                    method, kwargs={"weights_iterator": iter(fault(dict(kwargs["weights_iterator"])).items())}
                ),
            )
            with pytest.raises(RuntimeError, match=r"did not load the new weights in torch.*not what was sent: "):
                engine.update_weights(model.named_parameters())
                pytest.fail(name)
        engine.update_weights(model.named_parameters())  # a complete update succeeds


def test_missing_parameter_is_refused_by_its_name(training):
    engine, model = training
    for missing in ("model.norm.weight", "model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"):
        with pytest.raises(RuntimeError, match=f"not sent: {missing}"):
            engine.update_weights((n, p) for n, p in model.named_parameters() if n != missing)
    with pytest.raises(RuntimeError, match="no such parameter in vLLM: value_head.weight"):
        engine.update_weights([*model.named_parameters(), ("value_head.weight", torch.zeros(2, 128))])
    engine.update_weights(model.named_parameters())


def test_packed_copies_that_stay_outdated_are_refused(training, monkeypatch):
    engine, model = training
    add_noise(model, 1e-6)
    if model.config.tie_word_embeddings:
        monkeypatch.setattr(vllm, "_repack_heads", lambda _: None)
        expected = "not what was sent: model.embed_tokens.weight"
    elif model.config.model_type == "mixtral":
        monkeypatch.setattr(vllm, "_repack_experts_on_loading", lambda _: None)
        expected = "does not compute what the trainer does"
    else:
        pytest.skip("vLLM updates all packed copies of this model")
    with pytest.raises(RuntimeError, match=expected):
        engine.update_weights(model.named_parameters())
    monkeypatch.undo()
    engine.update_weights(model.named_parameters())


def test_engine_that_computes_something_else_is_refused(training, monkeypatch):
    engine, model = training
    expected = r"the log-probs of a fixed text differ by \S+ per token"
    for scores in (lambda ids: [-6.0] * (len(ids) - 1), lambda ids: [float("nan")] * (len(ids) - 1)):
        monkeypatch.setattr(engine, "score", scores)
        with pytest.raises(RuntimeError, match=expected):
            engine.update_weights(model.named_parameters())
    score = partial(score_text, model)
    # right for the prompt, wrong for the tokens that are decoded after it
    monkeypatch.setattr(engine, "score", lambda ids: score(ids)[:-8] + [-1e3] * 8)
    with pytest.raises(RuntimeError, match=expected):
        engine.update_weights(model.named_parameters())


def test_log_probs_match_the_trainer(engine):
    ids = list(range(5, 25))
    assert engine[0].log_probs(ids) == pytest.approx(score_text(engine[1], ids), abs=1e-3)


def test_update_without_score_is_rejected(engine):
    engine, model = engine
    with pytest.raises(RuntimeError, match="has no `score`"):
        engine.update_weights(model.named_parameters())


def test_rl_samples_from_the_weights_it_trains(tmp_path):
    """Runs the whole script: log-probs of sampler and trainer agree after each update and after resuming."""
    tokenizer = byte_tokenizer(("\\boxed{4}", "\\boxed{5}"))
    model = tiny_llama(tokenizer, tie_word_embeddings=True, **SHAPE)
    four, five, end = tokenizer.convert_tokens_to_ids(["\\boxed{4}", "\\boxed{5}", tokenizer.eos_token])
    with torch.no_grad():  # answers and ends are likely, and both answers equally so: groups have different rewards
        weight = model.get_input_embeddings().weight
        weight[[four, end]] *= 4
        weight[five] = weight[four]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # each question has another answer: what the first one teaches is wrong for the second, so neither is solved soon
    rows = '{"question": "2 + 2 = ?", "answer": "4"}\n{"question": "2 + 3 = ?", "answer": "5"}\n'
    (tmp_path / "data.jsonl").write_text(rows)
    settings = {"data": tmp_path / "data.jsonl", "model": tmp_path / "model", "out": tmp_path / "rl", "sampler": "vllm"}
    settings |= {"prompts": 2, "group": 16, "max_tokens": 60, "min_tokens": 1, "lr": 1e-3, "evaluate": False}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    run_rl.main([*flags, "--iterations", "2"])
    config = (tmp_path / "rl/config.json").read_text()
    (tmp_path / "rl/config.json").write_text(config.replace('"iterations": 2', '"iterations": 3'))
    run_rl.main([*flags, "--iterations", "3", "--resume"])
    metrics = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3
    for m in metrics:
        assert m["tokens_trajectory"] > 0 and m["logp_unknown"] == 0 and m["mismatch_kl"] < 1e-7, m


def test_failed_prefix_cache_reset_is_an_error(training, monkeypatch):
    engine, model = training
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        engine.update_weights(model.named_parameters())
    engine.add(Request("a", [1, 2, 3], 4))
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        engine.drop()
    assert not engine.has_work()


# ---- import, versions and ranks -------------------------------------------------------------------------------------


def test_importing_the_engines_does_not_import_vllm():
    check = "import sys, thor.engines; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_untested_version_warns(monkeypatch):
    monkeypatch.setattr(vllm, "TESTED_VERSIONS", ("0.0",))
    with pytest.warns(UserWarning, match=r"is not tested with this library \(tested: 0.0\)"):
        vllm._import_vllm()


def test_process_group_must_be_initialized_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="initialize torch.distributed before"):
        VLLMEngine("unused")


RANK = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from test_engine_vllm import *
dist.init_process_group("gloo")
folder, rank = sys.argv[1], dist.get_rank()
model = load_model(folder, "cpu")[0]
engine = VLLMEngine(folder, rows=4, score=partial(score_text, model))
assert dist.get_world_size() == 2
done = complete(engine, [Request("a", [1, 2, 3], 8 + 8 * rank, seed=rank)])["a"]  # unequal work per rank
engine.update_weights(model.named_parameters())
total = torch.tensor([len(done.token_ids)])
dist.all_reduce(total)
print("total", total.item(), "own", len(done.token_ids))
dist.destroy_process_group()
"""


def test_each_of_two_ranks_has_an_engine(tmp_path):
    """As under torchrun: the trainer's process group keeps working, and each rank samples its own requests."""
    saved(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", RANK, str(tmp_path)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate(timeout=240) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][1][-3000:].decode()
    totals = [line.split()[1::2] for out, _ in outputs for line in out.decode().splitlines() if line[:5] == "total"]
    assert len(totals) == 2 and totals[0][0] == totals[1][0] == str(sum(int(own) for _, own in totals))


# ---- demo model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder():
    try:
        folder = str(demo_model())
    except ModelError as error:
        pytest.skip(f"the demo model is not available: {error}")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield folder
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(folder):
    """The trainer's model, and an HFEngine that samples from it."""
    model, tokenizer = load_model(folder, "cpu")
    return model, HFEngine(model, tokenizer)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A real server on loopback. It runs the module behind the command `vllm serve`, which vllm-cpu 0.32 lacks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    command += ["--max-model-len", "2048", "--logprobs-mode", "processed_logprobs"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            for _ in range(300):
                try:
                    HTTPEngine(f"http://127.0.0.1:{port}")
                    break
                except ServerError:
                    assert server.poll() is None, log.read_text()[-3000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module", params=["vllm", "http"])
def other(request, folder):
    """The demo model in VLLMEngine, then in HTTPEngine."""
    if request.param == "vllm":
        return VLLMEngine(folder, rows=16)
    return HTTPEngine(request.getfixturevalue("url"), rows=16)


def few_shot_prompt(prompt, tokenizer, question: str) -> list[int]:
    """A prompt for which the untrained model writes code blocks too."""
    return encode(tokenizer, few_shot_actor(question) + f"Question: {question}\n")


@pytest.fixture(scope="module", autouse=True)
def writes_code():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prompt, "render", few_shot_prompt)
        yield


GREEDY = Sampling(max_tokens=100, temperature=0, max_rounds=3)


@pytest.fixture(scope="module")
def reference(demo, executor) -> list[Trajectory]:
    """HFEngine's greedy trajectories."""
    return solve(demo[1], executor, load_problems("synthetic", limit=32), GREEDY)


def first_difference(a: Trajectory, b: Trajectory) -> int | None:
    """Index of the first token at which two responses differ."""
    if a.token_ids == b.token_ids:
        return None
    pairs = zip(a.token_ids, b.token_ids, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def test_greedy_trajectories_match_hfengine(demo, other, executor, reference):
    model, _ = demo
    assert sum(len(t.results) for t in reference) >= 16
    theirs = solve(other, executor, [t.problem for t in reference], GREEDY)
    for a, b in zip(reference, theirs, strict=True):
        at = first_difference(a, b)
        if at is None:
            assert (a.finish, a.action_mask, len(a.steps)) == (b.finish, b.action_mask, len(b.steps))
            assert np.allclose(a.logp_sampler, b.logp_sampler, atol=1e-3)
            continue
        candidates = [a.token_ids[at], b.token_ids[at]]
        sequences = [a.prompt_ids + a.token_ids[:at] + [token] for token in candidates]
        with torch.no_grad():
            logps = score_tokens(model, sequences, [[len(ids) - 1] for ids in sequences], 1.0).logp
        gap = abs(logps[0] - logps[1]).item()
        print(f"{a.problem.id}: token {at} differs, with a gap of {gap:.1e} between the logits of the two tokens")
        assert gap < 1e-3


def test_sampled_trajectories_match_the_trainers_logps(demo, other, executor):
    model, _ = demo
    sampling = Sampling(max_tokens=100, temperature=0.7, max_rounds=3, seed=2)
    options = {"self_correct": 2, "suffix_tokens": 10}
    trajectories = solve(other, executor, load_problems("synthetic", limit=5), sampling, **options)
    assert sum(len(t.results) for t in trajectories) >= 3 and sum(t.corrections for t in trajectories) >= 1
    scored = [[len(t.prompt_ids) + i for i, m in enumerate(t.action_mask) if m] for t in trajectories]
    sampled = [lp for t in trajectories for lp, m in zip(t.logp_sampler, t.action_mask, strict=True) if m]
    with torch.no_grad():
        scores = score_tokens(model, [t.prompt_ids + t.token_ids for t in trajectories], scored, 0.7)
    assert (scores.logp - torch.tensor(sampled)).abs().max() < 1e-3


def test_seeded_completion_repeats_and_stops_at_its_stop_rule(other):
    request = Request("a", encode(other.tokenizer, "Once upon a time"), 24, seed=11)
    first, second = complete(other, [request])["a"], complete(other, [request])["a"]
    assert first.token_ids == second.token_ids and len(first.token_ids) == 24
    rule = StopAfter(7)
    request = Request("a", request.token_ids, 24, seed=11, stop=rule)
    cut = complete(other, [request])["a"]
    assert cut.token_ids == first.token_ids[:7] and cut.finish == "stop"


def test_model_that_the_server_does_not_serve(url):
    with pytest.raises(ServerError, match="not another-model"):
        HTTPEngine(f"{url}#another-model")
    engine = HTTPEngine(url)
    engine.model = "another-model"  # as if the server had been restarted with another model
    with pytest.raises(ServerError, match=r"rejected the request with 404: .*another-model"):
        complete(engine, [Request("a", [1, 2, 3], 4)])
