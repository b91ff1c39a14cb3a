"""Linear layers through oneDNN: the numbers and gradients of torch's own."""

import copy

import pytest
import torch
from torch import nn

from thor.cpu import AVAILABLE, OneDNNLinear, pack, unpack, use_onednn

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
