"""HFEngine: exactness against the plain model, caching, scheduling and sampling."""

import random
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from conftest import (
    FAMILIES,
    ScriptedExecutor,
    byte_tokenizer,
    complete,
    interrupt,
    tiny_llama,
    tiny_model,
    tiny_settings,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from thor.distributed import free_memory
from thor.engines import Completion, HFEngine, NoRoomError, Request
from thor.engines.base import PartialCompletion
from thor.engines.hf import sample, uniform
from thor.engines.kv_cache import _partial_softmax
from thor.rollout import Sampling, drive, parse_step, solve
from thor.settings import UserError
from thor.text import FenceParser
from thor.training.scoring import score_tokens
from thor.trajectory import ExecResult, Problem

# Each of these tokens holds a whole code block, so that a random model writes some.
WORDS = ("\n```python\nprint(1)\n```\n", "\n```python\nprint(x)\n```", "\\boxed{1}")


def talkative_model(tokenizer):
    """A random model that often writes code blocks, so that trajectories have several rounds."""
    model = tiny_llama(tokenizer, tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[[tokenizer.convert_tokens_to_ids(w) for w in WORDS]] *= 4
    return model


def random_prompts(count: int, vocabulary: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_greedy(completion: Completion, reference, prompt: list[int]) -> None:
    """Compare a greedy completion with one forward pass of the plain model: tokens, and log-probs to 1e-4.

    Tokens may differ where the gap between the two largest logits is below 1e-3.
    """
    with torch.inference_mode():
        ids = prompt + completion.token_ids
        logits = reference(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    top = logits.topk(2)
    logps = torch.log_softmax(logits, -1)
    for i, token in enumerate(completion.token_ids):
        if token != top.indices[i, 0]:
            gap = (top.values[i, 0] - top.values[i, 1]).item()
            assert gap < 1e-3, f"token {i} differs, with a gap of {gap} between the two largest logits"
        assert abs(completion.logps[i] - logps[i, token].item()) < 1e-4


def assert_generated(completion: Completion, model, prompt: list[int]) -> None:
    """Compare a greedy completion with unbatched `generate`, up to the first gap below 1e-3 between two logits."""
    ids, count = torch.tensor([prompt]), len(completion.token_ids)
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for token, theirs, logits in zip(completion.token_ids, out.sequences[0, len(prompt) :], out.logits, strict=True):
        if token != theirs:
            best, second = logits[0].topk(2).values.tolist()
            assert best - second < 1e-3
            return


def count_tokens(engine: HFEngine) -> list[int]:
    """A list that receives the number of tokens of each forward pass."""
    computed: list[int] = []
    engine.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return computed


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 25])
@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_matches_the_reference_over_rounds_and_backtracking(tokenizer, family, rows, shared):
    """64 prompts and 3 rounds: after each round texts get an observation, and some are truncated before."""
    rng = random.Random(family + str(rows))
    preamble = [random_prompts(1, 200, seed=g, longest=1)[0] * shared for g in range(4)]
    texts = [preamble[i % 4] + p for i, p in enumerate(random_prompts(64, 200))]
    reference, generator = tiny_model(family, tokenizer), tiny_model(family, tokenizer)
    engine = HFEngine(tiny_model(family, tokenizer), tokenizer, max_rows=rows, prefill_tokens=50)
    engine.eos = set()
    for _ in range(3):
        requests = [Request(str(i), text, 5, temperature=0, shared=shared) for i, text in enumerate(texts)]
        completions = complete(engine, requests)
        for i, text in enumerate(texts):
            assert completions[str(i)].finish == "length"
            assert_greedy(completions[str(i)], reference, text)
            if rows == 3 and shared:
                assert_generated(completions[str(i)], generator, text)
            text = text + completions[str(i)].token_ids
            if rng.random() < 0.3:  # like self-correction
                text = text[: len(text) - rng.randint(1, 7)]
            texts[i] = text + random_prompts(1, 200, seed=rng.randrange(10**6), longest=20)[0]


def test_log_probs_are_those_of_the_model(tokenizer):
    model, [ids] = tiny_llama(tokenizer), random_prompts(1, 200, longest=30)
    with torch.no_grad():  # before the engine replaces the model's attention
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert torch.allclose(torch.tensor(HFEngine(model, tokenizer).log_probs(ids)).double(), expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_match_the_trainer(executor, temperature):
    tokenizer = byte_tokenizer(WORDS)
    model = talkative_model(tokenizer)
    engine = HFEngine(model, tokenizer, max_rows=5)
    problems = [Problem(str(i), f"question {i % 3}") for i in range(12)]
    sampling = Sampling(max_tokens=120, temperature=temperature, max_rounds=4, seed=3)
    trajectories = solve(engine, executor, problems, sampling)
    assert sum(len(t.results) for t in trajectories) >= 5 and max(len(t.results) for t in trajectories) >= 2
    sequences = [t.prompt_ids + t.token_ids for t in trajectories]
    scored = [[len(t.prompt_ids) + i for i, m in enumerate(t.action_mask) if m] for t in trajectories]
    ours = [lp for t in trajectories for lp, m in zip(t.logp_sampler, t.action_mask, strict=True) if m]
    with torch.no_grad():
        scores = score_tokens(model, sequences, scored, temperature, chunk=37)
    assert torch.allclose(scores.logp, torch.tensor(ours), atol=1e-4)


def test_self_correction_is_exact_and_counts_every_token(executor):
    """The cache is cut back with the response, and the result equals the model's own forward pass."""
    tokenizer = byte_tokenizer(WORDS)
    model = talkative_model(tokenizer)
    problems = [Problem(str(i), f"question {i % 3}") for i in range(12)]
    sampling = Sampling(max_tokens=120, max_rounds=4, seed=3)

    def run(**options):
        engine = HFEngine(model, tokenizer, max_rows=5)
        completions, step_once, counts = [], engine.step, count_tokens(engine)

        def step():
            new = step_once()
            completions.extend(new)
            return new

        engine.step = step
        trajectories = solve(engine, executor, problems, sampling, deterministic=True, **options)
        return trajectories, sum(len(c.token_ids) for c in completions), sum(counts)

    plain, plain_sampled, _ = run()
    off, off_sampled, _ = run(self_correct=0, suffix_tokens=7)
    assert [(t.token_ids, t.logp_sampler) for t in off] == [(t.token_ids, t.logp_sampler) for t in plain]
    assert off_sampled == plain_sampled == sum(t.num_sampled for t in plain)
    trajectories, sampled, computed = run(self_correct=2, suffix_tokens=7)
    assert sum(t.corrections for t in trajectories) >= 10
    assert sampled == sum(t.num_sampled + t.discarded for t in trajectories)
    # Each retry computes the last kept token again, because sampling needs its logits.
    prompts = sum(map(len, {tuple(t.prompt_ids[:-1]) for t in trajectories}))
    assert computed <= prompts + sum(len(t) + t.discarded + t.corrections for t in trajectories)
    with torch.no_grad():
        scores = score_tokens(
            model, [t.all_token_ids for t in trajectories], [t.action_positions for t in trajectories], 1.0
        )
    assert torch.allclose(scores.logp, torch.tensor([lp for t in trajectories for lp in t.action_logps]), atol=1e-4)


def test_bfloat16_decoding_is_as_exact_as_fused_attention():
    """Compares the merged softmax parts and PyTorch's fused attention with float64."""
    torch.manual_seed(0)
    q, keys, values = (torch.randn(2, 3, n, 64).to(torch.bfloat16) * 2 for n in (4, 200, 200))
    hidden = torch.arange(200) >= 190
    split = 120
    parts = [
        _partial_softmax(q, keys[:, :, s], values[:, :, s], 0.125, hidden[s]) for s in (slice(split), slice(split, 200))
    ]
    top = torch.maximum(parts[0][0], parts[1][0])
    total = sum(t * (m - top).exp() for m, t, _ in parts)
    out = (sum(o * (m - top).exp() for m, _, o in parts) / total).to(torch.bfloat16)
    fused = torch.nn.functional.scaled_dot_product_attention(q, keys, values, ~hidden.expand(4, 200), scale=0.125)
    scores = (q.double() @ keys.double().transpose(-1, -2) * 0.125).masked_fill(hidden, float("-inf"))
    exact = scores.softmax(-1) @ values.double()
    assert (out - exact).norm() < 1.2 * (fused - exact).norm() < 0.01 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_matches_the_cpu(tokenizer):
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = random_prompts(16, 200)
    requests = [Request(str(i), [7] * 20 + p, 8, temperature=0, shared=20) for i, p in enumerate(prompts)]
    completions = complete(HFEngine(tiny_llama(tokenizer).cuda(), tokenizer), requests)
    for request in requests:
        assert_greedy(completions[request.id], tiny_llama(tokenizer), request.token_ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_samples_in_bfloat16(tokenizer):
    model = tiny_llama(tokenizer).cuda().to(torch.bfloat16)
    reference = tiny_llama(tokenizer).to(torch.bfloat16).float()
    prompts = random_prompts(16, 200)
    requests = [Request(str(i), [7] * 20 + p, 8, temperature=0, shared=20) for i, p in enumerate(prompts)]
    for name, completion in complete(HFEngine(model, tokenizer), requests).items():
        ids = [7] * 20 + prompts[int(name)] + completion.token_ids
        with torch.inference_mode():
            logps = reference(torch.tensor([ids])).logits[0, : len(ids) - 1].float().log_softmax(-1)
        exact = logps[-len(completion.token_ids) :].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (torch.tensor(completion.logps) - exact).abs().max() < 0.1


# ---- cache and scheduling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_tokens", [120, 500, 2000])
def test_cache_stays_within_kv_tokens(tokenizer, kv_tokens):
    prompts = [[7] * 15 + p for p in random_prompts(40, 200, longest=60)]
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, prefill_tokens=32, kv_tokens=kv_tokens)
    engine.eos = set()
    reference = tiny_llama(tokenizer)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, 9, temperature=0, shared=15))
    completions, most = {}, 0
    while engine.has_work():
        completions.update({c.id: c for c in engine.step()})
        most = max(most, sum(len(s.items) * s.capacity for s in (engine.rows, engine.prefixes)))
    assert 0 < most <= kv_tokens
    for i, prompt in enumerate(prompts):
        assert_greedy(completions[str(i)], reference, prompt)
    with pytest.raises(NoRoomError, match="kv_tokens"):
        engine.add(Request("long", [1] * kv_tokens, 1))


@pytest.mark.parametrize("copies", [0, 0.5, 1])
def test_too_little_memory_for_a_cache_is_an_error(tokenizer, monkeypatch, copies):
    """A CPU needs room for a second copy of the weights."""
    model = tiny_llama(tokenizer)
    free = int(copies * sum(p.nbytes for p in model.parameters()))
    monkeypatch.setattr("thor.engines.hf.free_memory", lambda device: free)
    with pytest.raises(NoRoomError, match="no memory is left for a KV cache"):
        HFEngine(model, tokenizer)
    assert HFEngine(model, tokenizer, kv_tokens=1).max_rows == 1


def test_evicted_prefixes_are_recomputed(tokenizer):
    """There are several times more shared prefixes than rows, and each one is used again after its eviction."""
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=2)
    engine.eos = set()
    prompts = random_prompts(9, 200, seed=2) * 2
    requests = [Request(str(i), [7, *p, 8], 4, temperature=0, shared=1 + len(p)) for i, p in enumerate(prompts)]
    completions = complete(engine, requests)
    assert len(engine.prefixes.items) <= 4
    for request in requests:
        assert_greedy(completions[request.id], tiny_llama(tokenizer), request.token_ids)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(tokenizer, value):
    model = tiny_llama(tokenizer)
    engine = HFEngine(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[5] = value
    engine.add(Request("r", [1, 2, 3], 4))
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        engine.step()


def test_finished_groups_free_their_prefix_slots(tokenizer):
    """Idle rows do not keep their prefixes in the cache when a new group needs the room."""
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=8, kv_tokens=1100)
    engine.eos, computed = set(), count_tokens(engine)
    for g in range(6):
        prompt = random_prompts(1, 200, seed=g, longest=1)[0] * 100
        before = sum(computed)
        complete(engine, [Request(f"{g}#{i}", prompt, 2, shared=99, seed=i) for i in range(4)])
        assert len(engine.prefixes.items) <= 2 and sum(computed) - before == 99 + 2 * 4


def test_slots_shrink_after_a_long_request(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, kv_tokens=2700)
    engine.eos, computed = set(), count_tokens(engine)
    complete(engine, [Request("long", [5] * 1500, 2)])
    assert len(engine.rows.items) == 1
    del computed[:]
    complete(engine, [Request(str(i), [6, 7, i], 8, seed=i) for i in range(16)])
    assert len(computed) == 8 and len(engine.rows.items) >= 16


def test_long_request_does_not_shrink_the_batch_for_long(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, kv_tokens=8000)
    engine.eos = set()
    counts = count_tokens(engine)
    requests = [Request(str(i), [i, 1, 2, 3], 20, seed=i) for i in range(100)]
    complete(engine, requests)
    alone = len(counts)
    complete(engine, [Request("long", list(range(200)) * 7, 2), *requests])
    assert len(counts) - alone < 2 * alone


def test_long_prompt_is_prefilled_in_chunks(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, prefill_tokens=16)
    engine.eos, computed = set(), count_tokens(engine)
    long, short = random_prompts(1, 200, seed=5, longest=1)[0] * 100, [1, 2, 3]
    engine.add(Request("short", short, 12, temperature=0))
    engine.add(Request("long", long, 3, temperature=0))
    completions = {}
    while engine.has_work():
        completions.update({c.id: c for c in engine.step()})
    assert max(computed) == 16 + 1  # a chunk of the long prompt and one token of the short one
    for name, prompt in (("long", long), ("short", short)):
        assert_greedy(completions[name], tiny_llama(tokenizer), prompt)


def test_next_turn_computes_only_the_new_tokens(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set()
    prompt = list(range(50))
    first = complete(engine, [Request("a", prompt, 4, temperature=0)])["a"]
    computed = count_tokens(engine)
    complete(engine, [Request("a", prompt + first.token_ids + [1, 2, 3], 2, temperature=0)])
    assert computed[0] == 4  # the last sampled token and three new ones


def test_each_trajectory_is_computed_once_if_there_are_more_than_rows(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=4, kv_tokens=100_000)
    engine.eos = set()
    counts = count_tokens(engine)

    def trajectory(i: int):
        ids = [(i * 7 + j) % 200 for j in range(50)]
        for round_ in range(3):
            completion = yield Request(str(i), ids, 10, seed=round_)
            yield "code"
            ids = ids + completion.token_ids + [1, 2, 3, 4, 5]

    drive([trajectory(i) for i in range(12)], engine, ScriptedExecutor(lambda code: ExecResult("ok", "1")))
    assert sum(counts) == 12 * (50 + 3 * 9 + 2 * (1 + 5))  # prompt, decoded tokens; last token and output of each round


def test_free_memory_respects_the_container_limit(monkeypatch, tmp_path):
    files = {"memory.max": "3000", "memory.current": "2000", "memory.stat": "anon 900\ninactive_file 600\nslab 5"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("thor.distributed.CGROUP", tmp_path)
    assert free_memory(torch.device("cpu")) == 3000 - (2000 - 600)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2**20


# ---- shared prefixes ------------------------------------------------------------------------------------------------


def test_shared_prompt_is_computed_once(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set()
    computed = count_tokens(engine)
    complete(engine, [Request(str(i), list(range(80)), 1, shared=79, seed=i) for i in range(8)])
    assert sum(computed) == 79 + 8


def test_requests_of_a_group_share_even_one_after_another(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    for g in range(4):
        found = complete(engine, [Request(f"{g}", [8] * 50, 2, temperature=0, shared=49)])
        assert_greedy(found[str(g)], tiny_llama(tokenizer), [8] * 50)
    assert sum(computed) == 49 + 4 * 2


def test_reused_id_with_another_text_uses_its_shared_prefix(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    for text, known in (([5] * 9, 0), ([5] * 4 + [6] * 80, 4)):
        del computed[:]
        complete(engine, [Request(str(i), text, 1, shared=len(text) - 1) for i in range(4)])
        assert sum(computed) == len(text) - 1 - known + 4


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_regenerated_step_copies_its_context(tokenizer, family, group):
    """The prompt is in the slot of the trajectory (group 1) or in that of the group's prefix."""
    engine = HFEngine(tiny_model(family, tokenizer), tokenizer)
    engine.eos, prompt = set(), list(range(30))
    first = complete(engine, [Request(f"{g}", prompt, 12, shared=29, seed=g) for g in range(group)])["0"]
    context = prompt + first.token_ids[:7]
    computed = count_tokens(engine)
    again = complete(engine, [Request(f"step {g}", context, 6, temperature=0, shared=36) for g in range(4)])
    assert sum(computed) == 4 * 6
    for completion in again.values():
        assert_greedy(completion, tiny_model(family, tokenizer), context)


def test_common_start_of_two_groups_is_copied_not_recomputed(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    for end in (1, 2):
        del computed[:]
        text = [9] * 40 + [end] * 10
        found = complete(engine, [Request(f"{end}#{g}", text, 3, temperature=0, shared=49) for g in range(2)])
        assert sum(computed) == (49 if end == 1 else 9) + 2 * 3
        assert_greedy(found[f"{end}#1"], tiny_llama(tokenizer), text)


def test_common_preamble_of_different_prompts_is_computed_once(tokenizer):
    """Groups arrive together: the first computes the common preamble, and the others copy it."""
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    texts = [[9] * 100 + [end] * 10 for end in range(6)]
    found = complete(engine, [Request(f"{t}#{g}", x, 1, 0, shared=109) for t, x in enumerate(texts) for g in range(2)])
    assert sum(computed) == 109 + 5 * 9 + 12
    for name, completion in found.items():
        assert_greedy(completion, tiny_llama(tokenizer), texts[int(name[0])])


def test_partly_computed_prefix_is_copied_as_far_as_computed(tokenizer):
    """A second group arrives while the prompt of the first is being computed, 16 tokens per step."""
    for steps in range(9):
        engine = HFEngine(tiny_llama(tokenizer), tokenizer, prefill_tokens=16)
        engine.eos, found = set(), {}
        texts = {"a": [5] * 80 + [6] * 20, "b": [5] * 80 + [7] * 30}
        for name, text in texts.items():
            for g in range(3):
                engine.add(Request(f"{name}{g}", text, 3, temperature=0, shared=len(text) - 1))
            for _ in range(steps if name == "a" else 0):
                found |= {c.id: c for c in engine.step()}
        found |= complete(engine, [])
        for name, completion in found.items():
            assert_greedy(completion, tiny_llama(tokenizer), texts[name[0]])
        assert len(found) == 6


# ---- interface ------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_batch(tokenizer):
    prompts = random_prompts(9, 200)
    requests = [Request(str(i), p, 8, temperature=0.8, top_p=0.9, top_k=20, seed=i) for i, p in enumerate(prompts)]
    model = tiny_llama(tokenizer)
    together = complete(HFEngine(model, tokenizer, max_rows=4), requests)
    alone = {}
    for request in requests:
        alone.update(complete(HFEngine(model, tokenizer), [request]))
    assert {i: c.token_ids for i, c in together.items()} == {i: c.token_ids for i, c in alone.items()}


def test_reproducible_on_the_cpu(tokenizer):
    prompts = random_prompts(9, 200)
    requests = [Request(str(i), [7] * 20 + p, 8, shared=20, seed=i) for i, p in enumerate(prompts)]
    first, second = (HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=4) for _ in range(2))
    assert first.reproducible and complete(first, requests) == complete(second, requests)


def test_eos_ends_a_completion(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set(range(len(tokenizer)))
    [completion] = complete(engine, [Request("a", [1, 2], 9)]).values()
    assert completion.finish == "eos" and len(completion.token_ids) == len(completion.logps) == 1


class StrippingTokenizer:
    """Like the tokenizer of Llama 2, it strips the space before the first token of a text."""

    words = " so", " so ```python", " ```python", "\n", "```", "1"

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[i] for i in ids]

    def decode(self, ids: list[int], **_) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize(("ids", "closed"), [([1, 3, 5, 3, 4], False), ([2, 3, 5, 3, 4], True)])
def test_engine_and_parser_read_the_same_fence(ids, closed):
    """After other tokens the space before the first word stays, and indents the fence."""
    tokenizer = StrippingTokenizer()
    partial = PartialCompletion(Request("a", [0], 9, stop=FenceParser()), 9, set(), tokenizer)
    done = [partial.push(i, 0.0) for i in ids]
    assert not any(done[:-1]) and bool(done[-1]) == closed
    act, parser = parse_step(tokenizer, ids, [0])
    assert parser.closed == closed and parser.text == partial.request.stop.text == "".join(
        tokenizer.words[i] for i in ids
    )
    assert act == (0 if closed else len(ids)) and parser.open_at == (1 if closed else -1)
    assert parse_step(tokenizer, ids)[1].text == parser.text[1:]  # at the start of a text the space is stripped


def test_invalid_requests_are_rejected(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer, max_position_embeddings=16), tokenizer)
    for ids in ([], list(range(16))):
        with pytest.raises(ValueError, match="request a has"):
            engine.add(Request("a", ids, 4))
    with pytest.raises(ValueError, match="request a: max_tokens must be at least 1"):
        engine.add(Request("a", [1], 0))
    engine.add(Request("b", list(range(14)), 9))  # room for two tokens
    while engine.has_work():
        done = engine.step()
    assert done[0].finish == "length" and len(done[0].token_ids) == 2


def test_unsupported_models_are_rejected(tokenizer):
    settings = tiny_settings(tokenizer)
    models = [
        Gemma2ForCausalLM(Gemma2Config(**settings, attn_logit_softcapping=5.0)),
        CohereForCausalLM(CohereConfig(**settings, logit_scale=0.5)),
        MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=2)),
        BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=8, n_layer=1, n_head=2)),
    ]
    models.append(tiny_llama(tokenizer))
    models[-1].config.rope_parameters = {"rope_type": "longrope"}
    for model in models:
        for _ in range(2):  # a failed call must not leave the model switched
            with pytest.raises(ValueError, match=type(model).__name__.removesuffix("ForCausalLM")):
                HFEngine(model.eval(), tokenizer)


def test_hanging_tool_delays_only_its_own_trajectory(executor):
    """The first snippet returns only when all other trajectories are finished. A loop that waits for it would hang."""
    tokenizer = byte_tokenizer(WORDS)
    engine = HFEngine(talkative_model(tokenizer), tokenizer, max_rows=4)
    hanging, finished = [], []

    class HangsFirst(ScriptedExecutor):
        def submit(self, code):
            if hanging:
                return executor.submit(code)
            hanging.append(Future())
            give_up.start()
            return hanging[0]

    give_up = threading.Timer(60, lambda: hanging[0].set_result(ExecResult("ok", "waited for")))

    def done(i, trajectory):
        finished.append(trajectory)
        if len(finished) == 11:
            give_up.cancel()
            hanging[0].set_result(ExecResult("ok", "answered last"))

    problems = [Problem(str(i), f"question {i % 3}") for i in range(12)]
    solve(engine, HangsFirst(None), problems, Sampling(max_tokens=120, max_rounds=4, seed=3), done=done)
    assert [t.results[0].stdout for t in finished[11:]] == ["answered last"]
    assert sum(len(t.results) for t in finished[:11]) >= 5  # the other tools ran meanwhile


def test_update_weights_clears_the_cache(tokenizer):
    model, other = tiny_llama(tokenizer), tiny_llama(tokenizer, seed=1)
    engine = HFEngine(model, tokenizer)
    engine.eos = set()
    request = Request("a", list(range(30)), 5, temperature=0, shared=20)
    complete(engine, [request])
    engine.update_weights(other.named_parameters())
    fresh = complete(engine, [request])["a"]
    assert_greedy(fresh, tiny_llama(tokenizer, seed=1), list(range(30)))


def test_drop_aborts_all_requests(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=2)
    engine.eos = set()
    for i in range(4):  # two are running, two are queued
        engine.add(Request(str(i), [i] * 20, 9, temperature=0, shared=10))
    engine.step()
    engine.step()
    engine.drop()
    assert not engine.has_work() and engine.step() == []
    prompt = random_prompts(1, 200, seed=1)[0]
    done = complete(engine, [Request(str(i), prompt, 5, temperature=0) for i in range(4)])
    assert len(done) == 4
    for completion in done.values():
        assert_greedy(completion, tiny_llama(tokenizer), prompt)


def test_interrupted_step_leaves_no_invalid_cache(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, prefill_tokens=64)
    engine.eos, prompt = set(), list(range(100))
    requests = [Request(str(i), [*prompt, i], 5, temperature=0, shared=100) for i in range(2)]

    hook = interrupt(engine.model.base_model)
    with pytest.raises(KeyboardInterrupt):
        complete(engine, requests)
    hook.remove()
    engine.drop()
    done = complete(engine, requests)
    for request in requests:
        assert_greedy(done[request.id], tiny_llama(tokenizer), request.token_ids)


def test_sleep_frees_the_cache_and_does_not_change_samples(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set()
    requests = [Request(str(i), list(range(i, 30)), 5, seed=i, shared=20) for i in range(3)]
    before = complete(engine, requests)
    engine.sleep()
    assert not engine.rows.items and not engine.prefixes.items
    after = complete(engine, requests)
    assert {name: c.token_ids for name, c in before.items()} == {name: c.token_ids for name, c in after.items()}
    engine.add(requests[0])
    with pytest.raises(RuntimeError, match="sampled"):
        engine.sleep()


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_uniform_is_uniform_and_depends_on_seed_and_count():
    values = uniform([3] * 4000, list(range(4000)))
    assert values.min() > 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert uniform([3, 9], [5, 5])[0] == values[5] != uniform([4], [5])[0]


def test_sample_follows_the_distribution():
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])).repeat(20000, 1)
    u = torch.from_numpy(uniform([1] * 20000, list(range(20000))))
    ids, logps = sample(logits, [1.0] * 20000, None, None, u)
    assert torch.allclose(ids.bincount() / 20000, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015)
    assert torch.allclose(logps.exp(), torch.tensor([0.1, 0.2, 0.3, 0.4])[ids], atol=1e-5)


def test_top_p_and_top_k_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    for u, k, p, token, probability in (
        (0.999, 2, 1.0, 3, 4 / 7),  # from {0.3, 0.4}
        (0.001, 2, 1.0, 2, 3 / 7),
        (0.001, 0, 0.65, 2, 3 / 7),  # 0.4 is less than 0.65
        (0.001, 0, 0.39, 3, 1.0),  # 0.4 is enough
        (0.001, 0, 0.0, 3, 1.0),  # at least one token is kept
        (0.3, 1, 1.0, 3, 1.0),
        (0.001, 2, 0.5, 3, 1.0),  # of the two tokens that top-k leaves, 4/7 is enough
    ):
        ids, logps = sample(logits, [1.0], [p], [k], torch.tensor([u]))
        assert ids.item() == token and logps.exp().item() == pytest.approx(probability, abs=1e-5)


def test_greedy_and_sampled_rows_mix():
    logits = torch.tensor([[0.0, 1.0, 3.0], [9.0, 0.0, 0.0]])
    ids, logps = sample(logits, [0.0, 1.0], [1.0, 0.5], [0, 0], torch.tensor([0.001, 0.5]))
    assert ids.tolist() == [2, 0]
    assert logps[0].item() == pytest.approx(torch.log_softmax(logits[0], -1)[2].item())
