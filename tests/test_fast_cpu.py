"""Linear layers through oneDNN: the numbers and gradients of torch's own."""

import copy

import pytest
import torch
from conftest import FAMILIES, byte_tokenizer, tiny_model
from torch import nn

from thor.fast_cpu import AVAILABLE, OneDNNLinear, keep_less, pack, unpack, use_onednn

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="oneDNN serves linear layers on x86 CPUs alone")


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(inputs)
    plain = nn.Linear(inputs, outputs, bias=bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    assert type(ours) is OneDNNLinear
    return plain, ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 16), (1, 7), (5, 32), (1, 3, 64), (2, 65, 576)])
def test_values_and_gradients_are_those_of_torch(shape, bias):
    plain, ours = pair(shape[-1], 48, bias)
    x = torch.randn(*shape)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(*shape[:-1], 48)
    (plain(a) * weights).sum().backward()
    (ours(b) * weights).sum().backward()
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one():
    _, ours = pair(16, 8, True)
    ours.weight.requires_grad_(False)
    ours(torch.randn(4, 16)).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is not None


def test_a_packed_layer_serves_any_number_of_rows_and_is_not_used_with_gradients():
    plain, ours = pair(96, 40, True)
    pack(ours)
    old = copy.deepcopy(plain)
    with torch.no_grad():
        for rows in (0, 1, 13, 64, 300):
            x = torch.randn(rows, 96)
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        for layer in (plain, ours):
            layer.weight.add_(1.0)
        x = torch.randn(3, 96)
        torch.testing.assert_close(ours(x), old(x), rtol=1e-5, atol=1e-5)  # packed before, so still the old weights
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    unpack(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


def test_parameters_keep_their_names_and_other_types_their_own_matmul():
    plain, ours = pair(32, 16, True)
    pack(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    half = copy.deepcopy(plain).to(torch.bfloat16)
    use_onednn(half)
    pack(half)
    assert half.packed is None
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(half(x), nn.functional.linear(x, half.weight, half.bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_mlps_that_keep_less_have_the_same_gradients(family):
    """Copies, too, which must compute with their own weights and not with those of the model they were made of."""
    plain = tiny_model(family, byte_tokenizer())
    lean = copy.deepcopy(plain)
    for model in (plain, lean):
        use_onednn(model)
    keep_less(lean)
    ours = copy.deepcopy(lean)
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter.zero_()
    ids = torch.arange(40).reshape(2, 20) % plain.config.vocab_size
    kept, gradients = [], []
    for model in (plain, ours):
        storages = {}

        def note(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logits = model(ids, use_cache=False).logits
        kept.append(sum(storages.values()))
        (logits.float() ** 2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert kept[1] < kept[0]
    assert all("forward" in vars(layer.mlp) for layer in ours.model.layers)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits)


class GatedMLP(nn.Module):
    """One that transformers might have: keep_less knows nothing of its `scale` and `limit`."""

    def __init__(self, scale: float, limit: float, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 16, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(16, 8, bias=bias)
        self.act_fn, self.scale, self.limit = nn.SiLU(), scale, limit

    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=self.limit)
        return self.down_proj(self.scale * self.act_fn(gate) * self.up_proj(x))


@pytest.mark.parametrize(
    ("scale", "limit", "bias", "lean"),
    [(1.0, 1e9, False, True), (2.0, 1e9, False, False), (1.0, 10.0, False, False), (1.0, 1e9, True, False)],
)
def test_only_an_mlp_that_computes_the_same_keeps_less(scale, limit, bias, lean):
    mlp = GatedMLP(scale, limit, bias)
    if bias:
        nn.init.zeros_(mlp.down_proj.bias)  # equal in value, yet its gradient would be lost
    use_onednn(mlp)
    keep_less(mlp)
    assert ("forward" in vars(mlp)) is lean


def test_a_wide_layer_has_its_gradient_computed_in_parts(monkeypatch):
    monkeypatch.setattr("thor.fast_cpu.MANY", 20)
    plain, ours = pair(12, 70, False)
    x = torch.randn(2, 9, 12)
    for layer in (plain, ours):
        (layer(x) ** 2).sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-4)
