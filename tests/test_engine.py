"""HFEngine against transformers' own generate, and its log-probs against the trainer's."""

import random
import sys
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

from thor.attention import Tree
from thor.distributed import free_memory
from thor.engines import Completion, HFEngine, Request
from thor.engines.base import OpenTurn
from thor.engines.hf import sample, uniform
from thor.engines.kv_cache import _softmax_part
from thor.rollout import Sampling, drive, parse_step, solve
from thor.text import FenceParser
from thor.training.scoring import score_tokens
from thor.training.trainer import micro_batches
from thor.trajectory import ExecResult, Problem

# one token holds a whole block, so that a random model writes some: a fence token that carries more text
WORDS = ("\n```python\nprint(1)\n```\n", "\n```python\nprint(x)\n```", "\\boxed{1}")


def talkative_model(tokenizer):
    """A random model that likes to write the words of a block, so that there are several rounds."""
    model = tiny_llama(tokenizer, tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[[tokenizer.convert_tokens_to_ids(w) for w in WORDS]] *= 4
    return model


def random_prompts(count: int, vocabulary: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_same_greedy(completion: Completion, reference, prompt: list[int]) -> None:
    """The completion against the plain model on the whole text: ids, and log-probs to 1e-4, as far as they agree.

    They may part where the top-two logit gap is below 1e-3.
    """
    with torch.inference_mode():
        ids = prompt + completion.token_ids
        logits = reference(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    top = logits.topk(2)
    logps = torch.log_softmax(logits, -1)
    for i, token in enumerate(completion.token_ids):
        if token != top.indices[i, 0]:
            gap = (top.values[i, 0] - top.values[i, 1]).item()
            assert gap < 1e-3, f"parted at token {i} with a top-two gap of {gap}"
        assert abs(completion.logps[i] - logps[i, token].item()) < 1e-4


def assert_generated(completion: Completion, model, prompt: list[int]) -> None:
    """The completion is what unbatched `generate` gives, up to a token whose top-two logit gap is below 1e-3."""
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


@pytest.mark.parametrize("shared", [0, 25])
@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_and_backtracking_stay_exact(tokenizer, family, rows, shared):
    """64 prompts through 3 rounds: observations are appended, some are cut back first, others come in between."""
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
            assert_same_greedy(completions[str(i)], reference, text)
            if rows == 3 and shared:  # and by transformers' own loop
                assert_generated(completions[str(i)], generator, text)
            text = text + completions[str(i)].token_ids
            if rng.random() < 0.3:  # as self-correction does
                text = text[: len(text) - rng.randint(1, 7)]
            texts[i] = text + random_prompts(1, 200, seed=rng.randrange(10**6), longest=20)[0]


@pytest.mark.parametrize("kv_tokens", [120, 500, 2000])
def test_the_cache_stays_within_its_budget(tokenizer, kv_tokens):
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
        assert_same_greedy(completions[str(i)], reference, prompt)
    with pytest.raises(ValueError, match="kv_tokens"):
        engine.add(Request("long", [1] * kv_tokens, 1))


def test_one_group_after_another_shares_its_prompt_in_few_slots(tokenizer):
    """Idle rows of finished groups do not keep the prefixes that new groups need room for."""
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=8, kv_tokens=1100)
    engine.eos, computed = set(), count_tokens(engine)
    for g in range(6):
        prompt = random_prompts(1, 200, seed=g, longest=1)[0] * 100
        before = sum(computed)
        complete(engine, [Request(f"{g}#{i}", prompt, 2, shared=99, seed=i) for i in range(4)])
        assert len(engine.prefixes.items) <= 2 and sum(computed) - before == 99 + 2 * 4


def test_slots_are_many_again_after_a_long_request(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, kv_tokens=2700)
    engine.eos, computed = set(), count_tokens(engine)
    complete(engine, [Request("long", [5] * 1500, 2)])
    assert len(engine.rows.items) == 1
    del computed[:]
    complete(engine, [Request(str(i), [6, 7, i], 8, seed=i) for i in range(16)])
    assert len(computed) == 8 and len(engine.rows.items) >= 16


def test_a_long_prompt_is_computed_in_chunks_beside_the_others(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, prefill_tokens=16)
    engine.eos, computed = set(), count_tokens(engine)
    long, short = random_prompts(1, 200, seed=5, longest=1)[0] * 100, [1, 2, 3]
    engine.add(Request("short", short, 12, temperature=0))
    engine.add(Request("long", long, 3, temperature=0))
    completions = {}
    while engine.has_work():
        completions.update({c.id: c for c in engine.step()})
    assert max(computed) == 16 + 1  # a part of the long prompt, and a token of the short one
    for name, prompt in (("long", long), ("short", short)):
        assert_same_greedy(completions[name], tiny_llama(tokenizer), prompt)


def count_tokens(engine: HFEngine) -> list[int]:
    """Filled with the number of tokens of each forward pass."""
    computed: list[int] = []
    engine.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return computed


def test_a_waiting_trajectory_keeps_its_cache(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set()
    prompt = list(range(50))
    first = complete(engine, [Request("a", prompt, 4, temperature=0)])["a"]
    computed = count_tokens(engine)
    complete(engine, [Request("a", prompt + first.token_ids + [1, 2, 3], 2, temperature=0)])
    assert computed[0] == 4  # the last sampled token and the three new ones


def test_shared_prompt_is_computed_once(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set()
    computed = count_tokens(engine)
    complete(engine, [Request(str(i), list(range(80)), 1, shared=79, seed=i) for i in range(8)])
    assert sum(computed) == 79 + 8


def test_an_id_that_comes_again_with_another_text_shares_as_a_new_one(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    for text, known in (([5] * 9, 0), ([5] * 4 + [6] * 80, 4)):
        del computed[:]
        complete(engine, [Request(str(i), text, 1, shared=len(text) - 1) for i in range(4)])
        assert sum(computed) == len(text) - 1 - known + 4


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_sampled_anew_computes_nothing_of_its_trajectory_again(tokenizer, family, group):
    """The trajectory's prompt stands in a slot of its own (group 1), or in that of its group's prefix."""
    engine = HFEngine(tiny_model(family, tokenizer), tokenizer)
    engine.eos, prompt = set(), list(range(30))
    first = complete(engine, [Request(f"{g}", prompt, 12, shared=29, seed=g) for g in range(group)])["0"]
    context = prompt + first.token_ids[:7]
    computed = count_tokens(engine)
    again = complete(engine, [Request(f"step {g}", context, 6, temperature=0, shared=36) for g in range(4)])
    assert sum(computed) == 4 * 6
    for completion in again.values():
        assert_same_greedy(completion, tiny_model(family, tokenizer), context)


def test_a_prompt_that_begins_like_another_group_s_is_computed_from_where_they_part(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    for end in (1, 2):
        del computed[:]
        text = [9] * 40 + [end] * 10
        found = complete(engine, [Request(f"{end}#{g}", text, 3, temperature=0, shared=49) for g in range(2)])
        assert sum(computed) == (49 if end == 1 else 9) + 2 * 3
        assert_same_greedy(found[f"{end}#1"], tiny_llama(tokenizer), text)


def test_samples_do_not_depend_on_batch_mates(tokenizer):
    prompts = random_prompts(9, 200)
    requests = [Request(str(i), p, 8, temperature=0.8, top_p=0.9, top_k=20, seed=i) for i, p in enumerate(prompts)]
    model = tiny_llama(tokenizer)
    together = complete(HFEngine(model, tokenizer, max_rows=4), requests)
    alone = {}
    for request in requests:
        alone.update(complete(HFEngine(model, tokenizer), [request]))
    assert {i: c.token_ids for i, c in together.items()} == {i: c.token_ids for i, c in alone.items()}


def test_stops_at_eos_and_reports_it(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set(range(len(tokenizer)))
    [completion] = complete(engine, [Request("a", [1, 2], 9)]).values()
    assert completion.finish == "eos" and len(completion.token_ids) == len(completion.logps) == 1


def test_bad_requests_are_refused(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer, max_position_embeddings=16), tokenizer)
    for ids in ([], list(range(16))):
        with pytest.raises(ValueError, match="request a has"):
            engine.add(Request("a", ids, 4))
    with pytest.raises(ValueError, match="request a wants max_tokens >= 1"):
        engine.add(Request("a", [1], 0))
    engine.add(Request("b", list(range(14)), 9))  # room for two tokens
    while engine.has_work():
        done = engine.step()
    assert done[0].finish == "length" and len(done[0].token_ids) == 2


def test_prefixes_are_evicted_and_come_back_right(tokenizer):
    """More shared prefixes than rows, several times over: each answer is as if it were alone."""
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=2)
    engine.eos = set()
    prompts = random_prompts(9, 200, seed=2) * 2
    requests = [Request(str(i), [7, *p, 8], 4, temperature=0, shared=1 + len(p)) for i, p in enumerate(prompts)]
    completions = complete(engine, requests)
    assert len(engine.prefixes.items) <= 4
    for request in requests:
        assert_same_greedy(completions[request.id], tiny_llama(tokenizer), request.token_ids)


def test_a_model_that_would_be_computed_wrongly_is_refused(tokenizer):
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
        for _ in range(2):  # not even when asked again
            with pytest.raises(ValueError, match=type(model).__name__.removesuffix("ForCausalLM")):
                HFEngine(model.eval(), tokenizer)


def test_with_more_trajectories_than_rows_each_is_computed_once(tokenizer):
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
    assert sum(counts) == 12 * (50 + 3 * 9 + 2 * (1 + 5))  # prompt, decoded, last token and output of a round


def test_a_long_request_does_not_thin_the_rows_of_a_full_queue(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, kv_tokens=8000)
    engine.eos = set()
    counts = count_tokens(engine)
    requests = [Request(str(i), [i, 1, 2, 3], 20, seed=i) for i in range(100)]
    complete(engine, requests)
    alone = len(counts)
    complete(engine, [Request("long", list(range(200)) * 7, 2), *requests])
    assert len(counts) - alone < 2 * alone


def test_a_hanging_tool_delays_its_own_trajectory_only(executor):
    """The first snippet answers when all other trajectories are done; a loop that waited for it would hang."""
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
    assert sum(len(t.results) for t in finished[:11]) >= 5  # the others had their tools meanwhile


def test_new_weights_forget_the_cache(tokenizer):
    model, other = tiny_llama(tokenizer), tiny_llama(tokenizer, seed=1)
    engine = HFEngine(model, tokenizer)
    engine.eos = set()
    request = Request("a", list(range(30)), 5, temperature=0, shared=20)
    complete(engine, [request])
    engine.update_weights(other.named_parameters())
    fresh = complete(engine, [request])["a"]
    assert_same_greedy(fresh, tiny_llama(tokenizer, seed=1), list(range(30)))


def test_dropped_requests_are_forgotten(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer, max_rows=2)
    engine.eos = set()
    for i in range(4):  # two run, two wait
        engine.add(Request(str(i), [i] * 20, 9, temperature=0, shared=10))
    engine.step()
    engine.step()
    engine.drop()
    assert not engine.has_work() and engine.step() == []
    prompt = random_prompts(1, 200, seed=1)[0]
    done = complete(engine, [Request(str(i), prompt, 5, temperature=0) for i in range(4)])
    assert len(done) == 4
    for completion in done.values():
        assert_same_greedy(completion, tiny_llama(tokenizer), prompt)


def test_what_a_broken_step_did_not_compute_is_not_taken_for_cached(tokenizer):
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
        assert_same_greedy(done[request.id], tiny_llama(tokenizer), request.token_ids)


def test_an_engine_that_slept_samples_as_before(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos = set()
    requests = [Request(str(i), list(range(i, 30)), 5, seed=i, shared=20) for i in range(3)]
    before = complete(engine, requests)
    engine.sleep()
    assert not engine.rows.items and not any(getattr(m, "packed", None) is not None for m in engine.model.modules())
    after = complete(engine, requests)
    assert {name: c.token_ids for name, c in before.items()} == {name: c.token_ids for name, c in after.items()}
    engine.add(requests[0])
    with pytest.raises(RuntimeError, match="sampled"):
        engine.sleep()


def test_decoding_in_bfloat16_rounds_no_more_than_fused_attention_does():
    """Both parts of the softmax, and SDPA, against float64."""
    torch.manual_seed(0)
    q, keys, values = (torch.randn(2, 3, n, 64).to(torch.bfloat16) * 2 for n in (4, 200, 200))
    hidden = torch.arange(200) >= 190
    split = 120
    parts = [
        _softmax_part(q, keys[:, :, s], values[:, :, s], 0.125, hidden[s]) for s in (slice(split), slice(split, 200))
    ]
    top = torch.maximum(parts[0][0], parts[1][0])
    total = sum(t * (m - top).exp() for m, t, _ in parts)
    out = (sum(o * (m - top).exp() for m, _, o in parts) / total).to(torch.bfloat16)
    fused = torch.nn.functional.scaled_dot_product_attention(q, keys, values, ~hidden.expand(4, 200), scale=0.125)
    scores = (q.double() @ keys.double().transpose(-1, -2) * 0.125).masked_fill(hidden, float("-inf"))
    exact = scores.softmax(-1) @ values.double()
    assert (out - exact).norm() < 1.2 * (fused - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_the_trainers_over_whole_trajectories(executor, temperature):
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


# ---- the trainer's tree ---------------------------------------------------------------------------------------------


def branching_sequences() -> list[list[int]]:
    root = list(range(20, 40))
    return [
        root + [1, 2, 3],
        root + [1, 2, 4, 5, 6],
        root[:10] + [7, 8],
        root + [1, 2, 3],  # twice the same
        root + [1, 2],  # a prefix of another
        [50, 51],
        root[:10] + [7, 9, 9, 9],
    ]


def test_tree_computes_each_distinct_prefix_once():
    sequences = branching_sequences()
    tree = Tree(sequences)
    assert len(tree.token_ids) == len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})
    for sequence, index in zip(sequences, tree.index, strict=True):
        assert [tree.token_ids[i] for i in index] == sequence
        assert [tree.positions[i] for i in index] == list(range(len(sequence)))


def test_a_tree_may_branch_deeper_than_python_recurses():
    depth = sys.getrecursionlimit() + 500
    sequences = [[7] * (i + 1) for i in range(depth)]  # each is a prefix of the next
    tree = Tree(sequences)
    assert tree.token_ids == [7] * depth and tree.positions == list(range(depth)) and tree.sizes == [1] * depth
    assert all(index == list(range(i + 1)) for i, index in enumerate(tree.index))
    assert tree.lineages[-1] == list(range(depth))


def test_tree_logps_and_gradients_equal_row_by_row(tokenizer):
    sequences = branching_sequences()
    scored = [list(range(1, len(s), 1 + b % 2)) for b, s in enumerate(sequences)]
    weights = torch.randn(sum(map(len, scored)), generator=torch.Generator().manual_seed(0))
    reference, model = tiny_llama(tokenizer), tiny_llama(tokenizer)
    HFEngine(model, tokenizer)  # switches the attention
    logps = []
    for sequence, positions in zip(sequences, scored, strict=True):
        all_logps = torch.log_softmax(reference(torch.tensor([sequence])).logits[0].float(), -1)
        logps += [all_logps[p - 1, sequence[p]] for p in positions]
    plain = torch.stack(logps)
    scores = score_tokens(model, sequences, scored, 1.0, chunk=5)
    assert torch.allclose(scores.logp, plain, atol=1e-5)
    (plain * weights).sum().backward()
    (scores.logp * weights).sum().backward()
    for a, b in zip(reference.parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * (1 + a.grad.norm())


def test_entropy_by_hand(tokenizer):
    model = tiny_llama(tokenizer)
    HFEngine(model, tokenizer)
    scores = score_tokens(model, [[1, 2, 3]], [[2]], 0.5)
    logits = tiny_llama(tokenizer)(torch.tensor([[1, 2]])).logits[0, -1] / 0.5
    p = logits.softmax(-1)
    assert scores.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
    assert scores.logp.item() == pytest.approx(p[3].log().item(), abs=1e-4)


def test_micro_batches_hold_the_budget_and_all_sequences():
    sequences = random_prompts(40, 3, seed=5)
    batches = list(micro_batches(sequences, 60))
    assert sorted(b for batch in batches for b in batch) == list(range(40))
    for batch in batches:
        assert len(Tree([sequences[b] for b in batch]).token_ids) <= 60


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_uniform_is_uniform_and_a_function_of_seed_and_count():
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
        (0.999, 2, 1.0, 3, 4 / 7),  # of {0.3, 0.4}
        (0.001, 2, 1.0, 2, 3 / 7),
        (0.001, 0, 0.65, 2, 3 / 7),  # 0.4 alone has less than 0.65
        (0.001, 0, 0.39, 3, 1.0),  # 0.4 alone has it
        (0.001, 0, 0.0, 3, 1.0),  # never nothing
        (0.3, 1, 1.0, 3, 1.0),
        (0.001, 2, 0.5, 3, 1.0),  # of the two that top-k leaves, 0.4 alone has 4/7
    ):
        ids, logps = sample(logits, [1.0], [p], [k], torch.tensor([u]))
        assert ids.item() == token and logps.exp().item() == pytest.approx(probability, abs=1e-5)


def test_greedy_rows_beside_sampled_ones():
    logits = torch.tensor([[0.0, 1.0, 3.0], [9.0, 0.0, 0.0]])
    ids, logps = sample(logits, [0.0, 1.0], [1.0, 0.5], [0, 0], torch.tensor([0.001, 0.5]))
    assert ids.tolist() == [2, 0]
    assert logps[0].item() == pytest.approx(torch.log_softmax(logits[0], -1)[2].item())


def test_what_is_half_computed_is_copied_only_as_far_as_it_is(tokenizer):
    """A second group comes while the first one's prompt is being computed, 16 tokens a step."""
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
            assert_same_greedy(completion, tiny_llama(tokenizer), texts[name[0]])
        assert len(found) == 6


def test_a_preamble_of_different_prompts_is_computed_once(tokenizer):
    """Groups that come together: the first computes what all begin with, the others copy it."""
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    texts = [[9] * 100 + [end] * 10 for end in range(6)]
    found = complete(engine, [Request(f"{t}#{g}", x, 1, 0, shared=109) for t, x in enumerate(texts) for g in range(2)])
    assert sum(computed) == 109 + 5 * 9 + 12
    for name, completion in found.items():
        assert_same_greedy(completion, tiny_llama(tokenizer), texts[int(name[0])])


def test_members_of_a_group_may_come_one_by_one(tokenizer):
    engine = HFEngine(tiny_llama(tokenizer), tokenizer)
    engine.eos, computed = set(), count_tokens(engine)
    for g in range(4):
        found = complete(engine, [Request(f"{g}", [8] * 50, 2, temperature=0, shared=49)])
        assert_same_greedy(found[str(g)], tiny_llama(tokenizer), [8] * 50)
    assert sum(computed) == 49 + 4 * 2


class StrippingTokenizer:
    """As Llama 2's: the space before the first token of a text goes."""

    words = " so", " ```python", "\n", "```", "1"

    def decode(self, ids: list[int], **_) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_engine_and_parser_read_the_same_fence():
    """Behind other tokens the space stays, so that " ```python" opens no block, for the one as for the other."""
    tokenizer, ids = StrippingTokenizer(), [1, 2, 4, 2, 3]
    turn = OpenTurn(Request("a", [0], 9, stop=FenceParser()), 9, set(), tokenizer)
    assert not any(turn.push(i, 0.0) for i in ids)
    assert not parse_step(tokenizer, ids, [0])[1].closed
    assert parse_step(tokenizer, ids)[1].closed  # a text of its own: here the space goes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_samples_what_the_cpu_samples(tokenizer):
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = random_prompts(16, 200)
    requests = [Request(str(i), [7] * 20 + p, 8, temperature=0, shared=20) for i, p in enumerate(prompts)]
    completions = complete(HFEngine(tiny_llama(tokenizer).cuda(), tokenizer), requests)
    for request in requests:
        assert_same_greedy(completions[request.id], tiny_llama(tokenizer), request.token_ids)


def test_free_memory_is_what_a_container_has_left(monkeypatch, tmp_path):
    files = {"memory.max": "3000", "memory.current": "2000", "memory.stat": "anon 900\ninactive_file 600\nslab 5"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("thor.distributed.CONTAINER", tmp_path)
    assert free_memory(torch.device("cpu")) == 3000 - (2000 - 600)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_samples_in_bfloat16(tokenizer):
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
