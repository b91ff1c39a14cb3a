"""Tests with the real demo model: greedy decoding and log-probabilities over long and multi-round contexts.

They need SmolLM2-135M-Instruct (93 MB, downloaded on first use) and are skipped if it is not available.
"""

import os

import pytest
import torch
from test_engine import assert_greedy, complete
from transformers import AutoModelForCausalLM

from thor.data import load_problems
from thor.demo import ModelError, demo_model, few_shot_actor
from thor.engines import HFEngine, Request
from thor.prompts import PROMPTS, Prompt
from thor.rollout import Sampling, solve
from thor.text import encode
from thor.training.model import load_model
from thor.training.scoring import score_tokens

COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    before = torch.get_num_threads()
    # beside another worker of pytest-xdist, two threads would wait for one another most of the time
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder():
    try:
        return demo_model()
    except ModelError as error:
        pytest.skip(f"the demo model is not available: {error}")


def test_batched_greedy_decoding_matches_generate(folder):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load_model(str(folder), "cpu")
    problems = load_problems("synthetic", limit=32)
    prompts = []
    for i, problem in enumerate(problems):  # short and long, some with a shared prefix
        shared = encode(tokenizer, few_shot_actor(problem.question)) if i % 4 == 0 else []
        prompts.append((shared + PROMPTS["tool"].render(tokenizer, problem.question)[i % 4 * 5 :], len(shared)))
    engine = HFEngine(model, tokenizer, max_rows=12)
    eos, engine.eos = engine.eos, set()  # as in the reference: no EOS before COUNT tokens
    done = complete(engine, [Request(str(i), p, COUNT, temperature=0, shared=s) for i, (p, s) in enumerate(prompts)])
    assert len({len(p) for p, _ in prompts}) > 16
    compared = 0
    for i, (prompt, _) in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT, min_new_tokens=COUNT
        )[0, len(prompt) :].tolist()
        ours = done[str(i)].token_ids
        differs = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), COUNT)
        end = next((k for k, token in enumerate(ours) if token in eos), COUNT)  # generate suppresses EOS
        assert_greedy(done[str(i)], reference, prompt)  # a difference is only allowed at a near tie
        compared += min(end, differs)
    assert compared > 32 * COUNT // 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_logps_agree_on_multi_round_trajectories(folder, executor, monkeypatch, temperature):
    model, tokenizer = load_model(str(folder), "cpu")

    def few_shot_prompt(prompt, tokenizer, question: str) -> list[int]:
        """Return a prompt with which even the untrained model writes several code blocks."""
        return encode(tokenizer, few_shot_actor(question) + f"Question: {question}\n")

    monkeypatch.setattr(Prompt, "render", few_shot_prompt)
    problems = load_problems("synthetic", limit=8)
    sampling = Sampling(max_tokens=240, temperature=temperature, max_rounds=3, seed=1)
    trajectories = solve(HFEngine(model, tokenizer), executor, problems, sampling)
    rounds = [len(t.results) for t in trajectories]
    assert sum(rounds) >= 3 and (temperature == 1.0 or max(rounds) >= 2)
    scored = [[len(t.prompt_ids) + i for i, m in enumerate(t.action_mask) if m] for t in trajectories]
    ours = [lp for t in trajectories for lp, m in zip(t.logp_sampler, t.action_mask, strict=True) if m]
    with torch.no_grad():
        scores = score_tokens(model, [t.prompt_ids + t.token_ids for t in trajectories], scored, temperature)
    assert (scores.logp - torch.tensor(ours)).abs().max() < 1e-4
