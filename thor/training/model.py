"""Models: load, save and shard them, and add what training needs."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from thor.attention import use_layout_attention
from thor.demo import DEMO_MODEL, ModelError, demo_model
from thor.distributed import barrier, rank, world_size
from thor.prompts import Prompt
from thor.run_folder import writing

try:
    from thor.fast_cpu import optimize_for_cpu
except ModuleNotFoundError as error:  # the file is optional: without it everything works, but more slowly on a CPU
    if error.name != "thor.fast_cpu":
        raise
    optimize_for_cpu = None
from thor.training.scoring import recompute, score_pairs

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on rank 0, in CPU memory


# ---- load and save --------------------------------------------------------------------------------------------------


def model_source(name: str) -> str:
    """The folder or hub id of a model's name. Fetches the demo model on first use. Raises ModelError."""
    source = str(demo_model()) if name == DEMO_MODEL else name
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in this folder; it must be a Hugging Face model folder")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise ModelError(f"{name}: config.json but no weights (*.safetensors) in this model folder")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder; give '{DEMO_MODEL}', a local folder or a hub id")
    return source


def load_model(name: str, device: str = "auto", dtype: str = "float32") -> tuple[PreTrainedModel, object]:
    """Load a model, in eval mode and with layout attention, and its tokenizer.

    name: 'smollm2-135m' (fetched on first use), a local Hugging Face folder, or a hub id.
    device: 'auto' is a GPU if there is one. dtype: 'auto' is float32 on the CPU and bfloat16 on a GPU; use it only for
    sampling, because training in bfloat16 would round small updates away. Raises ModelError with one line.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
    source = model_source(name)
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: cannot be loaded as a local folder or a hub id: {first}") from error
    try:
        prepare(model, device)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
    return model.to(device).eval(), tokenizer


def prepare(model: PreTrainedModel, device: str = "cpu") -> None:
    """Switch `model` to layout attention, and optimise it for the CPU if that is its device. Raises ValueError."""
    use_layout_attention(model)
    if device == "cpu" and optimize_for_cpu:
        optimize_for_cpu(model)


def save_model(model: PreTrainedModel, tokenizer, folder: Path, prompt: Prompt | None = None) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load: full parameters, no value head.

    prompt: the one that the model was trained with, for prompt.yaml.
    """
    state = get_model_state_dict(model, options=FULL_STATE)  # a collective operation
    if rank() == 0:
        # named_parameters lists tied parameters once, under the name that transformers stores
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        policy = {name: state[name] for name in state if name in names and not name.startswith("value_head.")}
        with writing(folder):
            model.save_pretrained(folder, state_dict=policy)
            tokenizer.save_pretrained(folder)
            if prompt:
                prompt.save(folder)
    barrier()


# ---- what training adds ---------------------------------------------------------------------------------------------


def add_value_head(model: PreTrainedModel) -> None:
    """Add a critic on the policy's hidden states: one value per level, 0 at first.

    The two levels have different rewards at the same tokens (the answer is right; the block passes), so each level has
    an output of its own.
    """
    hidden = model.config.get_text_config().hidden_size
    model.value_head = torch.nn.Linear(hidden, 2, device=model.device, dtype=model.dtype)
    torch.nn.init.zeros_(model.value_head.weight)
    torch.nn.init.zeros_(model.value_head.bias)


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Keep only the inputs of each layer for the backward pass: less memory for a third more compute."""
    for layer in decoder_layers(model):  # transformers' own switch works only in training mode, which enables dropout
        layer.forward = partial(recompute, layer.forward)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The transformer layers of a model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def sampling_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model that HFEngine samples from: `model` itself, or a full copy on each rank if `model` will be sharded.

    The copy is in bfloat16 on a GPU. `HFEngine.update_weights(policy_parameters(model))` brings it up to date.
    """
    return _copy(model, model.device) if dist.is_initialized() else model


def reference_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` for the KL term, to be sharded like the policy.

    On a GPU it is in bfloat16, in which a sharded model computes anyway (see `shard`), and its parameters stay in CPU
    memory until `shard` moves them layer by layer: the GPU never holds all of them.
    """
    return _copy(model, torch.device("cpu"))


def _copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy with parameters on `device`, in bfloat16 if `model` is on a GPU. Buffers, as rotary frequencies, stay.

    Parameters are converted one by one, so that there is no second copy in float32.
    """
    copied = {}  # deepcopy takes from here what it finds by id
    for p in model.parameters():
        dtype = torch.bfloat16 if p.is_cuda else p.dtype
        copied[id(p)] = torch.nn.Parameter(p.detach().to(device, dtype, copy=True), p.requires_grad)
    return copy.deepcopy(model, copied)


def shard(model: PreTrainedModel, kind: str) -> None:
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2), if there is a process group.

    kind: type of the ranks' devices, 'cpu' or 'cuda'. Parameters that are elsewhere move there layer by layer.

    On GPUs a layer computes in bfloat16, while its parameters and the reduced gradients stay in float32. Layers are
    gathered one at a time; embeddings, head and value head stay gathered from the forward to the backward pass.
    This calls torch's fully_shard, because accelerate refuses to shard on CPUs, where the tests run.
    """
    if not dist.is_initialized():
        return
    mesh = dist.init_device_mesh(kind, (world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": bf16 if kind == "cuda" else MixedPrecisionPolicy()}
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.score_pairs = types.MethodType(score_pairs, model)
    register_fsdp_forward_method(model, "score_pairs")


def reshard(model: PreTrainedModel) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered, if `model` is sharded."""
    if isinstance(model, FSDPModule):
        model.reshard()


def policy_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full parameter) without the value head. With many ranks, all of them must iterate to the end."""
    for name, parameter in model.named_parameters():
        if not name.startswith("value_head."):
            yield name, parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter
