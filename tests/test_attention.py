"""The trainer's prefix tree: equal to computing each sequence alone, and every shared prefix only once."""

import random
import sys
from functools import partial

import pytest
import torch
from conftest import tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from thor.attention import Tree, causal_sdpa, micro_batches, use_layout_attention
from thor.training.scoring import score_tokens


def branching_sequences() -> list[list[int]]:
    root = list(range(20, 40))
    return [
        root + [1, 2, 3],
        root + [1, 2, 4, 5, 6],
        root[:10] + [7, 8],
        root + [1, 2, 3],  # a duplicate
        root + [1, 2],  # a prefix of another sequence
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


def test_tree_may_be_deeper_than_the_recursion_limit():
    depth = sys.getrecursionlimit() + 500
    sequences = [[7] * (i + 1) for i in range(depth)]  # each is a prefix of the next
    tree = Tree(sequences)
    assert tree.token_ids == [7] * depth and tree.positions == list(range(depth)) and tree.sizes == [1] * depth
    assert all(index == list(range(i + 1)) for i, index in enumerate(tree.index))
    assert tree.lineages[-1] == list(range(depth))


def test_tree_matches_sequences_one_by_one(tokenizer):
    sequences = branching_sequences()
    scored = [list(range(1, len(s), 1 + b % 2)) for b, s in enumerate(sequences)]
    weights = torch.randn(sum(map(len, scored)), generator=torch.Generator().manual_seed(0))
    reference, model = tiny_llama(tokenizer), tiny_llama(tokenizer)
    use_layout_attention(model)
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


def test_entropy_matches_its_definition(tokenizer):
    model = tiny_llama(tokenizer)
    use_layout_attention(model)
    scores = score_tokens(model, [[1, 2, 3]], [[2]], 0.5)
    logits = tiny_llama(tokenizer)(torch.tensor([[1, 2]])).logits[0, -1] / 0.5
    p = logits.softmax(-1)
    assert scores.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
    assert scores.logp.item() == pytest.approx(p[3].log().item(), abs=1e-4)


def test_micro_batches_keep_the_budget_and_cover_all_sequences():
    rng = random.Random(5)
    sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 40))] for _ in range(40)]
    batches = list(micro_batches(sequences, 60))
    assert sorted(b for batch in batches for b in batch) == list(range(40))
    for batch in batches:
        assert len(Tree([sequences[b] for b in batch]).token_ids) <= 60


@pytest.mark.parametrize("window", [None, 3, 20])
def test_causal_attention_equals_a_loop(window):
    """The last 5 of 9 positions, 4 query heads and 2 key heads, and values of another size than keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(*shape, generator=generator) for shape in ((4, 5, 8), (2, 9, 8), (2, 9, 6)))
    out = causal_sdpa(query, key, value, 0.3, window)
    for head in range(4):
        for i in range(5):
            first = max(0, 4 + i + 1 - (window or 9))
            weights = (query[head, i] @ key[head // 2, first : 4 + i + 1].T * 0.3).softmax(-1)
            expected = weights @ value[head // 2, first : 4 + i + 1]
            assert torch.allclose(out[head, i], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "t", "window", "mask_type", "key_heads"),
    [
        (torch.bfloat16, 5, None, CausalBias, 2),  # behind a shared prefix: a flash kernel, without any mask
        (torch.bfloat16, 9, None, type(None), 2),
        (torch.bfloat16, 5, 3, torch.Tensor, 8),  # the memory-efficient kernel, which does not group heads
        (torch.float32, 5, None, CausalBias, 8),
        (torch.float32, 9, None, type(None), 8),
    ],
)
def test_attention_on_a_gpu_can_use_fused_kernels(monkeypatch, dtype, t, window, mask_type, key_heads):
    """The last t of 9 positions, 8 query heads and 2 key heads, with tensors that only pretend to be on a GPU."""
    calls = []

    def record(query, key, value, mask, is_causal, **kwargs):
        calls.append((type(mask), key.shape[1], value.shape[1]))
        assert is_causal == (mask is None)
        if isinstance(mask, CausalBias):
            assert (mask.variant.name, mask.seq_len_q, mask.seq_len_kv) == ("LOWER_RIGHT", t, 9)
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with FakeTensorMode():
        query, key = (torch.empty(heads, size, 64, dtype=dtype, device="cuda") for heads, size in ((8, t), (2, 9)))
    causal_sdpa(query, key, key, 0.1, window)
    [(mask, *heads)] = calls
    assert issubclass(mask, mask_type) and heads == [key_heads, key_heads]


def test_flash_kernels_align_the_mask_as_causal_attention_does():
    """Attention with the mask that a GPU gets, which PyTorch creates on the CPU, is that with the CPU's mask."""
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 9, 8)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, query, key, key, enable_gqa=True, scale=0.3)
    assert torch.equal(attend(causal_lower_right(5, 9))[0], causal_sdpa(query[0], key[0], key[0], 0.3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("t", [5, 64])
def test_gpu_runs_a_flash_kernel_behind_a_prefix(t):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, n, 64, generator=generator) for heads, n in ((8, t), (2, 99), (2, 99)))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = causal_sdpa(*(x.cuda().bfloat16() for x in (query, key, value)), 0.1)
    assert (out.cpu().float() - causal_sdpa(query, key, value, 0.1)).abs().max() < 0.05
