"""Copies of models, and free memory. Tensors only pretend to be on a GPU, because the tests run without one."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode

from thor.distributed import free_memory
from thor.run_folder import Run
from thor.training import model as model_module
from thor.training.model import reference_copy
from thor.training.trainer import Trainer, TrainSettings


@pytest.fixture
def on_gpu(tokenizer):
    """A model whose parameters pretend to be on a GPU."""
    model = tiny_llama(tokenizer)
    with FakeTensorMode():
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"))
    return model


def test_reference_is_equal_and_shares_no_memory(tokenizer):
    model = tiny_llama(tokenizer, tie_word_embeddings=True)
    copied = reference_copy(model)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    theirs = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]) and parameter.dtype == theirs[name].dtype
        assert parameter.data_ptr() != theirs[name].data_ptr()
    assert len(theirs) == len(list(model.parameters()))


def test_reference_of_a_model_on_a_gpu_is_in_bfloat16_on_the_cpu(on_gpu, monkeypatch):
    """Rotary frequencies stay in float32. No parameter is copied in float32, not even for a moment."""
    monkeypatch.delattr(torch.nn.Parameter, "__deepcopy__")
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda tensor, memo: tensor.clone())
    monkeypatch.setattr(torch.nn.Parameter, "clone", None)
    copied = reference_copy(on_gpu)
    assert {(p.device.type, p.dtype) for p in on_gpu.parameters()} == {("cuda", torch.float32)}
    assert {(p.device.type, p.dtype) for p in copied.parameters()} == {("cpu", torch.bfloat16)}
    assert {b.dtype for b in copied.buffers() if b.is_floating_point()} == {torch.float32}


def test_policy_and_reference_are_sharded_on_the_gpu_in_bfloat16(on_gpu, monkeypatch):
    reference, found = reference_copy(on_gpu), []
    group = SimpleNamespace(is_initialized=lambda: True, init_device_mesh=lambda kind, shape: (kind, shape))
    monkeypatch.setattr(model_module, "dist", group)
    monkeypatch.setattr(model_module, "fully_shard", lambda module, **options: found.append((module, options)))
    monkeypatch.setattr(model_module, "register_fsdp_forward_method", lambda *_: None)
    settings = TrainSettings(report_to="none")
    Trainer(on_gpu, Run("never written", settings, resume=True), settings, reference=reference)
    modules = [module for module, _ in found]
    assert modules == [*on_gpu.model.layers, on_gpu, *reference.model.layers, reference]
    assert {options["mesh"] for _, options in found} == {("cuda", (1,))}
    assert {options["mp_policy"].param_dtype for _, options in found} == {torch.bfloat16}


def test_free_memory_of_a_gpu_counts_what_torch_keeps_for_reuse(monkeypatch):
    free = [1000]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free[-1] + 500))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 4000))
    assert free_memory(torch.device("cuda", 0)) == 1500
