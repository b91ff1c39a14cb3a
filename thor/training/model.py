"""Models: loading, saving, sharding, and what training adds to a model."""

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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from thor.attention import use_layout_attention
from thor.demo.model import DEMO_MODEL, ModelError, demo_model
from thor.distributed import barrier, rank, world_size
from thor.fast_cpu import keep_freed_memory, keep_less, use_onednn
from thor.training.scoring import _score_pairs, recompute

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on rank 0, in the CPU's memory


def model_source(name: str) -> str:
    """The folder or hub id behind a model's name, the demo model fetched on first use; ModelError for a bad folder."""
    source = str(demo_model()) if name == DEMO_MODEL else name
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json there; a Hugging Face model folder is wanted")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise ModelError(f"{name}: config.json but no weights (*.safetensors) in this model folder")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder; give '{DEMO_MODEL}', a local folder or a hub id")
    return source


def load_model(name: str, device: str = "auto", dtype: str = "float32") -> tuple[PreTrainedModel, object]:
    """Model (in eval mode, with layout attention) and tokenizer.

    name: 'smollm2-135m' (fetched on first use), a local Hugging Face folder, or a hub id.
    device: 'auto' is a GPU where there is one. dtype: 'auto' is float32 on the CPU and bfloat16 on a GPU, for sampling
    alone; what is trained stays in float32, since small updates would be rounded away in bfloat16.
    Raises ModelError with one line that says what to do.
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
    """Give `model` layout attention, and what there is to make it fast and small on the device it will be on."""
    use_layout_attention(model)
    if device == "cpu":
        use_onednn(model)
        keep_less(model)
        keep_freed_memory()


def save_model(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load: whole parameters, no value head."""
    state = get_model_state_dict(model, options=WHOLE)  # all ranks help to gather it
    if rank() == 0:
        # named_parameters has tied parameters once, under the name that transformers stores them by
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        policy = {name: state[name] for name in state if name in names and not name.startswith("value_head.")}
        model.save_pretrained(folder, state_dict=policy)
        tokenizer.save_pretrained(folder)
    barrier()


# ---- what training adds to a model ----------------------------------------------------------------------------------


def add_value_head(model: PreTrainedModel) -> None:
    """A critic that shares the policy's body: values = value_head(hidden state), one for each level, 0 at first.

    Trajectory and step level have rewards of different meaning (the answer is right, the block runs) at the same
    tokens, so each has its own output.
    """
    hidden = model.config.get_text_config().hidden_size
    model.value_head = torch.nn.Linear(hidden, 2, device=model.device, dtype=model.dtype)
    torch.nn.init.zeros_(model.value_head.weight)
    torch.nn.init.zeros_(model.value_head.bias)


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, a third more time."""
    for layer in decoder_layers(model):  # transformers' own switch works only in training mode, which has dropout
        layer.forward = partial(recompute, layer.forward)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def sampling_copy(model: PreTrainedModel) -> PreTrainedModel:
    """What HFEngine samples from: `model` itself, or, where that is going to be sharded, a whole copy on each rank.

    The copy is in bfloat16 on a GPU. `HFEngine.update_weights(policy_parameters(model))` brings it up to date.
    """
    if not dist.is_initialized():
        return model
    clone = copy.deepcopy(model)
    if model.device.type == "cuda":
        for parameter in clone.parameters():  # not clone.to(), which would round the rotary frequencies too
            parameter.data = parameter.data.to(torch.bfloat16)
    return clone


def shard(model: PreTrainedModel) -> None:
    """Divide parameters, gradients and optimizer state among the ranks (FSDP2), if there is a process group.

    On GPUs a layer computes in bfloat16; its parameters, and the sum of gradients over ranks, stay in float32. Each
    layer is gathered when it is its turn; embeddings, head and value head stay gathered from forward to backward.
    torch's own fully_shard and not accelerate, which refuses to shard on CPUs, where this is tested.
    """
    if not dist.is_initialized():
        return
    kind = model.device.type
    mesh = dist.init_device_mesh(kind, (world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    how = {"mesh": mesh, "mp_policy": bf16 if kind == "cuda" else MixedPrecisionPolicy()}
    for layer in decoder_layers(model):
        fully_shard(layer, **how)
    fully_shard(model, **how)
    model.score_pairs = types.MethodType(_score_pairs, model)
    register_fsdp_forward_method(model, "score_pairs")


def policy_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole parameter) without the value head, one after the other; all ranks must go through all of them."""
    for name, parameter in model.named_parameters():
        if not name.startswith("value_head."):
            yield name, parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter
