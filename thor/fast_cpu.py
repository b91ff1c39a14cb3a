"""What makes float32 fast and small on a CPU: linear layers multiplied by oneDNN, and less kept for their gradients.

torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone; oneDNN, which torch carries
for other types, uses it wherever it is there. On an AMD Zen 5 that is 2 to 3 times as fast, forward and backward, and
where a few rows meet the weights once more than that, if these are laid out beforehand (`pack`). Sums are rounded in
another order, nothing else changes. On other machines, devices and types the layers stay torch's own.

Shapes: T rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import platform
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# private names of torch's own compiler, there since 2.0; without them torch's matmul serves
AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
)
MANY = 8192  # outputs above which the gradient of a weight (the vocabulary projection's) is computed in parts
PACK_ROWS = 64  # rows that the packed layout is chosen for; any number may be multiplied with it


def use_onednn(model: nn.Module) -> None:
    """Have every nn.Linear of `model` multiply by oneDNN wherever it can; parameters and their names stay."""
    for module in model.modules() if AVAILABLE else ():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


def pack(model: nn.Module) -> None:
    """Lay the weights out for fast use without gradients, as a second copy; after a change of weights, do so anew."""
    for module in model.modules():
        if isinstance(module, OneDNNLinear) and module.suits(module.weight):
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), PACK_ROWS)


def unpack(model: nn.Module) -> None:
    """Drop the copy."""
    for module in model.modules():
        if isinstance(module, OneDNNLinear):
            module.packed = None


class OneDNNLinear(nn.Linear):
    packed: torch.Tensor | None = None

    @staticmethod
    def suits(tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., T, K] -> [..., T, N]"""
        if not self.suits(input):
            return super().forward(input)
        if self.packed is not None and not torch.is_grad_enabled():
            return multiply(input, self.packed, self.bias)
        return _Linear.apply(input, self.weight, self.bias)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., T, K] weight [N, K]^T + bias [N]"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dx = dy W,  dW = dy^T x,  db = column sums of dy"""
        x, weight = ctx.saved_tensors
        dx = multiply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dW = dy^T x, [N, K]"""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    if dy.shape[1] <= MANY:
        return multiply(dy.t(), x.t())
    dw = torch.empty(dy.shape[1], x.shape[1])
    for rows, few in zip(dw.split(MANY), dy.split(MANY, 1), strict=True):  # oneDNN makes a copy of dy^T
        rows.copy_(multiply(few.t(), x.t()))
    return dw


# ---- less to keep for the backward pass -----------------------------------------------------------------------------


def keep_less(model: nn.Module) -> None:
    """Have norms and gated MLPs keep what they are given, and compute again what they made of it element by element.

    A third less is kept, for no more time. Without gradients nothing changes. Twice on one model is as once.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_recomputed, module.forward)  # not a closure: copies of the model have their own
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            lean, down = partial(_gated_mlp, module, module.forward), module.down_proj
            x = torch.linspace(-1.0, 1.0, module.gate_proj.in_features)
            x = torch.stack([x, 1e4 * x])  # large values too, which some clamp
            if AVAILABLE and OneDNNLinear.suits(down.weight) and down.bias is None and torch.equal(lean(x), module(x)):
                module.forward = lean


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _gated_mlp(mlp: nn.Module, forward, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or not OneDNNLinear.suits(x):
        return forward(x)
    return _GatedLinear.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj.weight, mlp.act_fn)


class _GatedLinear(torch.autograd.Function):
    """(act(gate) * up) weight^T, of which only gate and up are kept."""

    @staticmethod
    def forward(ctx, gate, up, weight, act):
        ctx.save_for_backward(gate, up, weight)
        ctx.act = act
        return multiply(act(gate) * up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            product = ctx.act(gate) * up
        d_gate, d_up = torch.autograd.grad(product, (gate, up), multiply(dy, weight.t()))
        return d_gate, d_up, _weight_gradient(dy, product.detach()) if ctx.needs_input_grad[2] else None, None


# ---- memory ---------------------------------------------------------------------------------------------------------


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 1 << 25  # bytes, the most that glibc takes for the second; above, its holes would cost more than new pages


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors up to LARGE for the next ones (Linux with glibc).

    By default they often get new pages, which the kernel clears first: sampling a token of 64 rows takes 10 to 40 ms
    instead of 4.
    """
    if hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim"):
        _libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Give what is kept back to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


_libc = ctypes.CDLL(None)
