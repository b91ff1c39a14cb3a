"""Optional: faster float32 models on the CPU.

`optimize_for_cpu(model)` is the only entry point that the library uses, and the library also works without this file.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 only on Intel processors. oneDNN, which PyTorch ships
for other dtypes, uses AVX-512 wherever the processor has it. On an AMD Zen 5, oneDNN is 2 to 3 times as fast in the
forward and backward pass, and faster again for small batches if the weights are packed (reordered) in advance. Results
differ from MKL in rounding only. Other processors, devices and dtypes keep PyTorch's own kernels.

Shapes: T rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import platform
import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Private operators of PyTorch's compiler, present since 2.0. Without them, layers keep PyTorch's own matmul.
AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
)
GRADIENT_BLOCK = 8192  # outputs; the weight gradient of a wider layer (the vocabulary projection) is computed in blocks
PACKED_ROWS = 64  # batch size the packed layout is tuned for; it accepts any batch size


def optimize_for_cpu(model: PreTrainedModel) -> None:
    """Make a float32 model faster and smaller on the CPU, in place. Idempotent.

    Parameters and their names stay the same. The packed weights are a second copy, which exists only while models run
    in inference mode: any other forward pass, of this or another optimised model, frees the packed weights of all.
    """
    if free_packed_weights not in model.base_model._forward_pre_hooks.values():
        use_onednn(model)
        save_fewer_activations(model)
        keep_freed_memory()
        model.base_model.register_forward_pre_hook(free_packed_weights)


def free_packed_weights(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook: the first pass outside inference mode frees the memory that sampling left allocated."""
    if _packed_layers and not torch.is_inference_mode_enabled():
        for layer in list(_packed_layers):
            layer.packed = None
        _packed_layers.clear()
        release_freed_memory()


# ---- linear layers --------------------------------------------------------------------------------------------------


def use_onednn(model: nn.Module) -> None:
    """Make every nn.Linear in `model` multiply with oneDNN, if it is available."""
    for module in model.modules() if AVAILABLE else ():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


_packed_layers: weakref.WeakSet[OneDNNLinear] = weakref.WeakSet()
_optimizer_steps = 0  # taken by any optimizer in this process


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change a parameter without incrementing its `_version`.
register_optimizer_step_post_hook(_count_optimizer_step)


@dataclass(slots=True)
class PackedWeight:
    """A packed copy of a weight, and what identifies the values that it was made from.

    A write through `weight.data` changes neither, so it goes unnoticed, as it does in autograd.
    """

    tensor: torch.Tensor
    source: torch.Tensor  # shares the weight's memory, so that no later weight can have the same address
    version: tuple[int, int]


class OneDNNLinear(nn.Linear):
    """nn.Linear with oneDNN kernels. In inference mode it packs its weight, again whenever the weight has changed."""

    packed: PackedWeight | None = None

    @staticmethod
    def supports(tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., T, K] -> [..., T, N]"""
        if not self.supports(input):
            return super().forward(input)
        weight, bias = self._parameters["weight"], self._parameters["bias"]  # faster than nn.Module's __getattr__
        if torch.is_inference_mode_enabled() and not weight.is_inference():  # inference tensors have no version
            return multiply(input, self._packed(weight), bias)
        return _Linear.apply(input, weight, bias)

    def _packed(self, weight: torch.Tensor) -> torch.Tensor:
        packed, version = self.packed, (weight._version, _optimizer_steps)
        if packed is None or packed.version != version or packed.source.data_ptr() != weight.data_ptr():
            self.packed = packed = None  # free the old copy first
            tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
            self.packed = packed = PackedWeight(tensor, weight.detach(), version)
            _packed_layers.add(self)
        return packed.tensor

    def __getstate__(self) -> dict:
        """Copies of the layer are made without the packed weight: PyTorch cannot copy a packed tensor."""
        return self.__dict__ | {"packed": None}


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
    if dy.shape[1] <= GRADIENT_BLOCK:
        return multiply(dy.t(), x.t())
    dw = torch.empty(dy.shape[1], x.shape[1])
    # oneDNN copies its transposed input, so blocks bound the size of that copy
    for dw_block, dy_block in zip(dw.split(GRADIENT_BLOCK), dy.split(GRADIENT_BLOCK, 1), strict=True):
        dw_block.copy_(multiply(dy_block.t(), x.t()))
    return dw


# ---- activations ----------------------------------------------------------------------------------------------------


def save_fewer_activations(model: nn.Module) -> None:
    """Make norms and gated MLPs save only their inputs for the backward pass and recompute elementwise results there.

    Saves a third of the activation memory at no cost in time. Passes without gradients are not affected. Idempotent.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module).__name__.endswith("RMSNorm"):
            # a partial and not a closure: a deep copy of the model then calls its own module
            module.forward = partial(_recomputed, module.forward)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            lean, down = partial(_gated_mlp, module, module.forward), module.down_proj
            x = torch.linspace(-1.0, 1.0, module.gate_proj.in_features)
            x = torch.stack([x, 1e4 * x])  # large values too, because some MLPs clamp them
            supported = AVAILABLE and OneDNNLinear.supports(down.weight) and down.bias is None
            if supported and torch.equal(lean(x), module(x)):
                module.forward = lean


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _gated_mlp(mlp: nn.Module, forward, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or not OneDNNLinear.supports(x):
        return forward(x)
    return _GatedLinear.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj.weight, mlp.act_fn)


class _GatedLinear(torch.autograd.Function):
    """(act(gate) * up) weight^T, which saves only gate and up."""

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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
MMAP_THRESHOLD = 1 << 25  # bytes, the maximum that glibc allows; larger blocks would fragment the heap too much


def keep_freed_memory() -> None:
    """Make malloc reuse the memory of freed tensors up to MMAP_THRESHOLD (Linux with glibc; no effect elsewhere).

    By default such tensors often get new pages, which the kernel has to clear first: sampling a token for 64 rows then
    takes 10 to 40 ms instead of 4.
    """
    if hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim"):
        _libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Return freed memory to the operating system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


_libc = ctypes.CDLL(None)
