"""Weight updates of vLLM without vLLM: names, fingerprints, and the faults that they must find.

Here, vLLM is a dictionary of its parameters, stacked by hand. tests/test_engine_vllm.py uses vLLM itself.
"""

import hypothesis.strategies as st
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from safetensors.torch import load_file

from thor.engines.weight_push import WeightPush, fingerprints

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Query, key and value, and gate, up and down have equal shapes, so that only their values tell them apart.
SHAPE = {"num_key_value_heads": 4, "intermediate_size": 32}
CASES = ["llama", "llama tied", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
QKV, GATE_UP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
EXPERTS = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}  # gate, up, down


def checkpoint(model, folder) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def stacked(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters with which vLLM holds the tensors of a checkpoint. Its experts are padded with zeros."""
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    held = {}
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if ".experts." in name:
            prefix, _ = name.split(".experts.")
            if name == f"{prefix}.experts.0.{part}.weight" and part in EXPERTS:
                all_experts = [[weights[f"{prefix}.experts.{e}.{p}.weight"] for p in EXPERTS[part]] for e in range(4)]
                w13 = torch.stack([torch.cat((gate, up)) for gate, up, _ in all_experts])
                w2 = torch.stack([down for *_, down in all_experts])
                held[f"{prefix}.experts.routed_experts.w13_weight"] = torch.nn.functional.pad(w13, (0, 0, 0, 16))
                held[f"{prefix}.experts.routed_experts.w2_weight"] = torch.nn.functional.pad(w2, (0, 16))
        elif part in (*QKV, *GATE_UP):
            parts, whole = (QKV, "qkv_proj") if part in QKV else (GATE_UP, "gate_up_proj")
            held[name.replace(part, whole)] = torch.cat([weights[name.replace(part, p)] for p in parts])
        else:
            held[name] = weight
    return held


def vllm_like(held: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with parameters of these names and dtypes, and with what vLLM's models say about themselves."""
    root = torch.nn.Module()
    root.packed_modules_mapping = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
    for name, value in held.items():
        *path, attribute = name.split(".")
        module = root
        for child in path:
            if not hasattr(module, child):
                module.add_module(child, torch.nn.Module())
            module = getattr(module, child)
        module.register_parameter(attribute, torch.nn.Parameter(value, requires_grad=False))
    return root


def faults(model, held: dict[str, torch.Tensor], named_parameters=None, extra=()) -> str:
    """Push the parameters of `model`, and compare them with what vLLM holds. extra: further copies that it holds."""
    push = WeightPush(vllm_like(held), model)
    for _ in push.send(named_parameters or model.named_parameters()):
        pass
    return push.faults([*held.items(), *extra])


@pytest.fixture(params=CASES)
def case(request, tokenizer, tmp_path):
    """A model, and its tensors as `save_pretrained` writes them."""
    family, *tied = request.param.split()
    model = tiny_model(family, tokenizer, **SHAPE, tie_word_embeddings=bool(tied))
    return model, checkpoint(model, tmp_path)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_vllm_gets_the_tensors_of_the_checkpoint(case):
    model, weights = case
    sent = dict(WeightPush(vllm_like(stacked(weights, torch.float32)), model).send(model.named_parameters()))
    assert sent.keys() == weights.keys()
    assert all(torch.equal(sent[name], weights[name]) for name in weights)


def test_skeleton_needs_no_weights(case):
    model, weights = case
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    push = WeightPush(vllm_like(stacked(weights, torch.float32)), skeleton)
    assert dict(push.send(model.named_parameters())).keys() == weights.keys()
    assert not push.faults(stacked(weights, torch.float32).items())


def test_missing_and_unknown_names_are_listed(case):
    model, weights = case
    held = stacked(weights, torch.float32)
    named = dict(model.named_parameters())
    names = list(named)
    for missing in names:
        assert f"not sent: {missing}" in faults(model, held, [(n, named[n]) for n in names if n != missing])
    assert "not sent: " + ", ".join(sorted(names)[:3]) + f" and {len(names) - 3} more" in faults(model, held, iter(()))
    value_head = ("value_head.weight", torch.zeros(2, 32))
    found = faults(model, held, [*named.items(), value_head])
    assert "not a parameter of the model: value_head.weight" in found
    assert "no such parameter in vLLM: value_head.weight" in found
    held["model.extra.weight"] = torch.zeros(3)  # for example a head that vLLM does not tie
    assert faults(model, held) == "nothing arrived: model.extra.weight"


def test_names_are_mapped_as_vllm_maps_them(tokenizer, tmp_path):
    """A multimodal model of vLLM has other prefixes, and its mapper may also stack projections."""
    model = tiny_model("llama", tokenizer, **SHAPE)
    weights = checkpoint(model, tmp_path)
    held = {f"language_model.{name}": weight for name, weight in stacked(weights, torch.float32).items()}

    class Mapper:
        stacks = False

        def map_name(self, name: str) -> str | None:
            mapped = f"language_model.{name}"
            return mapped.replace(".q_proj.", ".qkv_proj.") if self.stacks else mapped

    engine = vllm_like(held)
    engine.hf_to_vllm_mapper = Mapper()
    for engine.hf_to_vllm_mapper.stacks in (False, True):
        push = WeightPush(engine, model)
        assert dict(push.send(model.named_parameters())).keys() == weights.keys()
        assert not push.faults(held.items())
    engine.hf_to_vllm_mapper.map_name = lambda name: None if name == "model.norm.weight" else f"language_model.{name}"
    push = WeightPush(engine, model)
    assert "model.norm.weight" not in dict(push.send(model.named_parameters()))
    assert "no such parameter in vLLM: model.norm.weight" in push.faults(held.items())


# ---- faults ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def optimizer_step(model, lr: float) -> None:
    """What a step of Adam does to the weights: each of them moves by the learning rate."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(lr * torch.randn(parameter.shape, generator=generator).sign())


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_with_a_small_learning_rate_that_does_not_arrive_is_found(case, dtype, tmp_path):
    """With lr 1e-6, also in bfloat16, in which most weights do not change at all."""
    model, weights = case
    before = stacked(weights, dtype)
    assert not faults(model, before)
    optimizer_step(model, 1e-6)
    after = stacked(checkpoint(model, tmp_path), dtype)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed and not faults(model, after)
    assert "not what was sent" in faults(model, before)
    for name in changed:  # all other parameters did arrive
        unit = name.partition(".experts.")[0] + ".experts" if ".experts." in name else name
        assert faults(model, after | {name: before[name]}) == f"not what was sent: {unit}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_update_is_found(case, dtype, tmp_path):
    """A single row, of a projection or of an expert, keeps its old values."""
    model, weights = case
    before = stacked(weights, dtype)
    optimizer_step(model, 1e-2)
    after = stacked(checkpoint(model, tmp_path), dtype)
    for name in after:
        partial = after[name].clone()
        partial.view(-1, partial.shape[-1])[-1] = before[name].view(-1, partial.shape[-1])[-1]
        if not torch.equal(partial, after[name]):  # the last row may be padding
            assert "not what was sent" in faults(model, after | {name: partial}), name
    assert faults(model, {name: weight[:-1] for name, weight in after.items()})


def swap(weight: torch.Tensor, a: slice | int, b: slice | int) -> torch.Tensor:
    swapped = weight.clone()
    swapped[a], swapped[b] = weight[b], weight[a]
    return swapped


def test_update_that_arrives_in_another_parameter_is_found(case):
    model, weights = case
    held = stacked(weights, torch.bfloat16)
    first, second = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"
    assert faults(model, held | {first: held[second], second: held[first]}) == f"not what was sent: {first}, {second}"
    query_and_key = swap(held[first], slice(0, 32), slice(32, 64))
    assert faults(model, held | {first: query_and_key}) == f"not what was sent: {first}"
    for name in [name for name in held if ".experts." in name]:
        unit = name.partition(".experts.")[0] + ".experts"
        assert faults(model, held | {name: swap(held[name], 0, 3)}) == f"not what was sent: {unit}"


def test_outdated_copy_is_found(tokenizer, tmp_path):
    """A tied head has no name of its own, but on the CPU a packed copy, which vLLM does not update."""
    model = tiny_model("llama", tokenizer, **SHAPE, tie_word_embeddings=True)
    before = checkpoint(model, tmp_path)["model.embed_tokens.weight"]
    optimizer_step(model, 1e-6)
    held = stacked(checkpoint(model, tmp_path), torch.float32)
    engine = vllm_like(held)
    engine.lm_head = torch.nn.Module()
    engine.lm_head.weight = engine.model.embed_tokens.weight
    for copy, expected in [
        (held["model.embed_tokens.weight"], ""),
        (before, "not what was sent: model.embed_tokens.weight"),
    ]:
        push = WeightPush(engine, model)
        list(push.send(model.named_parameters()))
        assert push.faults([*held.items(), ("lm_head.weight", copy)]) == expected


# ---- fingerprints ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=40), st.data(), st.sampled_from(DTYPES))
def test_change_of_the_last_bit_changes_the_fingerprint(values, data, dtype):
    weight = torch.tensor([values]).to(dtype)
    i = data.draw(st.integers(0, len(values) - 1))
    changed = weight.clone()
    bits = changed.view(torch.int32 if dtype is torch.float32 else torch.int16)
    bits[0, i] ^= 1
    if weight[0, i] != changed[0, i]:
        assert fingerprints(weight) != fingerprints(changed)


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=40), st.randoms(), st.sampled_from(DTYPES))
def test_order_and_zeros_do_not_change_the_fingerprint(values, rng, dtype):
    weight = torch.tensor([values]).to(dtype)
    other = [*values, 0.0, -0.0]
    rng.shuffle(other)
    assert fingerprints(weight) == fingerprints(torch.tensor([other]).to(dtype))


def test_opposite_changes_do_not_cancel():
    weight = torch.arange(1, 65, dtype=torch.float32).reshape(1, -1)
    bits = weight.view(torch.int32)
    seen = {fingerprints(weight).item()}
    for a in range(63):
        changed = bits.clone()
        changed[0, a] += 1
        changed[0, a + 1] -= 1
        seen.add(fingerprints(changed.view(torch.float32)).item())
    assert len(seen) == 64


def test_fingerprints_have_one_value_per_index_of_the_first_dimension(monkeypatch):
    weight = torch.randn(6, 4, 5)
    sums = fingerprints(weight)
    assert sums.shape == (6,) and sums.dtype == torch.int64 and len(set(sums.tolist())) == 6
    assert sums[2] == fingerprints(weight[2]).sum() == fingerprints(weight[2].T).sum()
    assert fingerprints(torch.tensor(1.5)).shape == (1,) and fingerprints(torch.zeros(3, 0)).tolist() == [0, 0, 0]
    monkeypatch.setattr("thor.engines.weight_push.MAX_ELEMENTS", 40)  # two rows at a time
    assert torch.equal(fingerprints(weight), sums)
