"""The optional CPU optimizations compute what PyTorch's own layers compute, and never use outdated packed weights."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, byte_tokenizer, complete, tiny_llama, tiny_model
from torch import nn

from thor import fast_cpu
from thor.engines import HFEngine, Request
from thor.fast_cpu import AVAILABLE, OneDNNLinear, optimize_for_cpu, save_fewer_activations, use_onednn
from thor.training.model import prepare
from thor.training.scoring import score_tokens

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="oneDNN linear layers need an x86 CPU")
ROOT = Path(__file__).parent.parent


def plain_and_onednn(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, OneDNNLinear]:
    """Two layers with equal parameters."""
    torch.manual_seed(inputs)
    plain = nn.Linear(inputs, outputs, bias=bias)
    layer = copy.deepcopy(plain)
    use_onednn(layer)
    assert type(layer) is OneDNNLinear
    return plain, layer


def optimized_model() -> nn.Module:
    model = tiny_llama(byte_tokenizer())
    optimize_for_cpu(model)
    return model


def packed_layers(model: nn.Module) -> list[bool]:
    """For each oneDNN layer: whether it holds a packed weight."""
    return [module.packed is not None for module in model.modules() if isinstance(module, OneDNNLinear)]


# ---- linear layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 16), (1, 7), (5, 32), (1, 3, 64), (2, 65, 576)])
def test_outputs_and_gradients_match_torch(shape, bias):
    plain, layer = plain_and_onednn(shape[-1], 48, bias)
    x = torch.randn(*shape)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(*shape[:-1], 48)
    (plain(a) * weights).sum().backward()
    (layer(b) * weights).sum().backward()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-4)


def test_frozen_weight_gets_no_gradient():
    _, layer = plain_and_onednn(16, 8, True)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 16)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_wide_layer_computes_its_weight_gradient_in_blocks(monkeypatch):
    monkeypatch.setattr(fast_cpu, "GRADIENT_BLOCK", 20)
    plain, layer = plain_and_onednn(12, 70, False)
    x = torch.randn(2, 9, 12)
    for module in (plain, layer):
        (module(x) ** 2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-4)


def test_parameter_names_stay_and_other_dtypes_use_torch():
    plain, layer = plain_and_onednn(32, 16, True)
    with torch.inference_mode():
        layer(torch.randn(3, 32))
    assert layer.packed and list(layer.state_dict()) == list(plain.state_dict())
    half = copy.deepcopy(plain).to(torch.bfloat16)
    use_onednn(half)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(half(x), nn.functional.linear(x, half.weight, half.bias))
    assert half.packed is None


# ---- packed weights -------------------------------------------------------------------------------------------------


def test_training_one_model_frees_the_packed_weights_of_its_sampling_copy(tokenizer):
    """With several ranks, an engine samples from a copy of the model that is trained."""
    model = tiny_llama(tokenizer)
    prepare(model)
    clone = copy.deepcopy(model)
    engine = HFEngine(clone, tokenizer)
    complete(engine, [Request("a", [1, 2, 3], 4)])
    packed = [module for module in clone.modules() if isinstance(module, OneDNNLinear) and module.packed]
    assert len(packed) == 15
    score_tokens(model, [[1, 2, 3]], [[1, 2]], 1.0)
    assert not any(layer.packed for layer in packed)


@torch.inference_mode()
def test_packed_layer_accepts_any_number_of_rows():
    with torch.inference_mode(False):
        plain, layer = plain_and_onednn(96, 40, True)
    for rows in (0, 1, 13, 64, 300):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    assert layer.packed


def test_parameters_created_in_inference_mode_are_not_packed():
    """They have no version that would show a change."""
    with torch.inference_mode():
        plain, layer = plain_and_onednn(24, 8, True)
        for _ in range(2):
            x = torch.randn(5, 24)
            torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
            for module in (plain, layer):
                module.weight.add_(1.0)
    assert layer.packed is None


def optimizer_step(layer: nn.Linear, **options) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@torch.no_grad()
def copy_in_place(layer: nn.Linear) -> None:
    layer.weight.copy_(layer.weight + 1.0)


@torch.inference_mode()
def add_in_inference_mode(layer: nn.Linear) -> None:
    layer.weight.add_(1.0)


def load_state(layer: nn.Linear, assign: bool = False) -> None:
    layer.load_state_dict({name: p + 1.0 for name, p in layer.state_dict().items()}, assign=assign)


def replace_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data + 1.0


def replace_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 1.0)


CHANGES = {
    "fused AdamW": lambda layer: optimizer_step(layer, fused=True),
    "foreach AdamW": lambda layer: optimizer_step(layer, foreach=True),
    "AdamW": lambda layer: optimizer_step(layer, foreach=False),
    "copy_": copy_in_place,
    "inference mode": add_in_inference_mode,
    "load_state_dict": load_state,
    "load_state_dict assign": lambda layer: load_state(layer, assign=True),
    "data": replace_data,
    "parameter": replace_parameter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weight_is_packed_again(change):
    """Repeats each change, so that memory freed by one can be reused by the next."""
    plain, layer = plain_and_onednn(32, 16, True)
    x = torch.randn(7, 32)
    for _ in range(3):
        with torch.inference_mode():
            before = layer(x)
            torch.testing.assert_close(before, plain(x), rtol=1e-5, atol=1e-5)
        for module in (plain, layer):
            CHANGES[change](module)
        with torch.inference_mode():
            assert (layer(x) - before).abs().max() > 0.01
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def test_unchanged_weight_is_packed_once():
    _, layer = plain_and_onednn(32, 16, False)
    with torch.inference_mode():
        layer(torch.randn(2, 32))
        packed = layer.packed
        layer(torch.randn(5, 32))
    assert layer.packed is packed


def test_only_inference_mode_uses_packed_weights():
    """Training and scoring must round the same way, and packed weights round differently."""
    model, ids = optimized_model(), torch.arange(30)[None]
    gradients_on = model(ids, use_cache=False).logits
    with torch.no_grad():
        gradients_off = model(ids, use_cache=False).logits
    assert torch.equal(gradients_on, gradients_off) and not any(packed_layers(model))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, use_cache=False).logits, gradients_off, rtol=1e-4, atol=1e-4)
    assert all(packed_layers(model))
    _, layer = plain_and_onednn(32, 16, False)
    x = torch.randn(7, 32)
    with torch.inference_mode():
        layer(x)
        layer.packed.tensor = torch.zeros_like(layer.weight)
        assert layer(x).abs().max() == 0
    with torch.no_grad():
        assert layer(x).abs().min() > 0


@pytest.mark.parametrize("gradients", [False, True])
def test_first_pass_outside_inference_mode_frees_memory_once(monkeypatch, gradients):
    trims = []
    monkeypatch.setattr(fast_cpu, "release_freed_memory", lambda: trims.append(1))
    model, ids = optimized_model(), torch.arange(30)[None]
    for expected in (1, 2):
        with torch.inference_mode():
            for _ in range(2):
                model(ids, use_cache=False)
        assert all(packed_layers(model)) and len(trims) == expected - 1
        with torch.set_grad_enabled(gradients):
            for _ in range(2):
                model(ids, use_cache=False)
        assert not any(packed_layers(model)) and len(trims) == expected


def test_deep_copy_packs_its_own_weights():
    model, ids = optimized_model(), torch.arange(30)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    clone = copy.deepcopy(model)
    assert all(packed_layers(model)) and not any(packed_layers(clone))
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(1.5)
    with torch.inference_mode():
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert (clone(ids, use_cache=False).logits - expected).abs().max() > 0.01
    assert all(packed_layers(model)) and all(packed_layers(clone))
    clone(ids, use_cache=False)
    assert not any(packed_layers(model)) and not any(packed_layers(clone))


def test_engine_samples_with_packed_weights_and_follows_updates():
    tokenizer, model, other = byte_tokenizer(), optimized_model(), optimized_model()
    request = Request("a", list(range(40)), 8, temperature=0)
    engine, reference = HFEngine(model, tokenizer), HFEngine(other, tokenizer)
    first = complete(engine, [request])["a"]
    assert all(packed_layers(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    engine.update_weights(other.named_parameters())
    second = complete(engine, [request])["a"]
    assert second.logps != first.logps and second == complete(reference, [request])["a"]


def test_optimize_for_cpu_is_idempotent():
    model = optimized_model()
    forwards = [module.forward for module in model.modules() if "forward" in vars(module)]
    optimize_for_cpu(model)
    assert len(model.base_model._forward_pre_hooks) == 1
    assert [module.forward for module in model.modules() if "forward" in vars(module)] == forwards


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_fewer_activations_keeps_gradients(family):
    """Uses a deep copy, which must compute with its own weights and not with those of the original."""
    plain = tiny_model(family, byte_tokenizer())
    original = copy.deepcopy(plain)
    for model in (plain, original):
        use_onednn(model)
    save_fewer_activations(original)
    lean = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    ids = torch.arange(40).reshape(2, 20) % plain.config.vocab_size
    saved_bytes, gradients = [], []
    for model in (plain, lean):
        storages = {}

        def record(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            logits = model(ids, use_cache=False).logits
        saved_bytes.append(sum(storages.values()))
        (logits.float() ** 2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert saved_bytes[1] < saved_bytes[0]
    assert all("forward" in vars(layer.mlp) for layer in lean.model.layers)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(lean(ids).logits, plain(ids).logits)


class GatedMLP(nn.Module):
    """An MLP with a `scale` and a `limit`, which save_fewer_activations does not support."""

    def __init__(self, scale: float, limit: float, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 16, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(16, 8, bias=bias)
        self.act_fn, self.scale, self.limit = nn.SiLU(), scale, limit

    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=self.limit)
        return self.down_proj(self.scale * self.act_fn(gate) * self.up_proj(x))


@pytest.mark.parametrize(
    ("scale", "limit", "bias", "replaced"),
    [(1.0, 1e9, False, True), (2.0, 1e9, False, False), (1.0, 10.0, False, False), (1.0, 1e9, True, False)],
)
def test_mlp_is_replaced_only_if_it_computes_the_same(scale, limit, bias, replaced):
    mlp = GatedMLP(scale, limit, bias)
    if bias:
        nn.init.zeros_(mlp.down_proj.bias)  # the same output, but the gradient of the bias would be lost
    use_onednn(mlp)
    save_fewer_activations(mlp)
    assert ("forward" in vars(mlp)) is replaced


# ---- the module is optional -----------------------------------------------------------------------------------------

WITHOUT_FAST_CPU = """
import sys
sys.modules["thor.fast_cpu"] = None  # importing it raises ModuleNotFoundError
import torch
from thor.engines import HFEngine, Request
from thor.training import load_model
from thor.training.scoring import score_tokens

model, tokenizer = load_model(sys.argv[1], "cpu")
assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
engine = HFEngine(model, tokenizer)
prompt = list(range(40))
engine.add(Request("a", prompt, 8))
while engine.has_work():
    finished = engine.step()
engine.sleep()
[completion] = finished
scored = list(range(len(prompt), len(prompt) + len(completion.token_ids)))
scores = score_tokens(model, [prompt + completion.token_ids], [scored], 1.0)
scores.logp.sum().backward()
assert torch.allclose(scores.logp, torch.tensor(completion.logps), atol=1e-4)
print("sampled", len(completion.token_ids))
"""


def test_library_works_without_the_module(tmp_path):
    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_FAST_CPU, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("sampled"), done.stderr
