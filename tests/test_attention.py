"""The trainer's prefix tree: equal to computing each sequence alone, and every shared prefix only once."""

import random
import sys

import pytest
import torch
from conftest import tiny_llama

from thor.attention import Tree, micro_batches, use_layout_attention
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
