"""Engines sample completions for requests. See `Engine` for the interface."""

from thor.engines.base import Completion, Engine, Request, StopRule, is_reproducible
from thor.engines.hf import HFEngine, NoRoomError
from thor.engines.http import HTTPEngine, RequestRejected, ServerError
from thor.engines.vllm import VLLMEngine
from thor.training import load_model, model_source

__all__ = [
    "Completion",
    "Engine",
    "HFEngine",
    "HTTPEngine",
    "NoRoomError",
    "Request",
    "RequestRejected",
    "ServerError",
    "StopRule",
    "VLLMEngine",
    "is_reproducible",
    "load_engine",
]


def load_engine(name: str, device: str, rows: int, share: float = 0.5) -> Engine:
    """Load the engine for a model.

    name: 'http://host:port' for a running `vllm serve` ('http://host:port#model' requires that it serves `model`),
        'vllm:<model>' for vLLM in this process, or any other model name for HFEngine.
    rows: maximum number of requests to sample at once.
    share: fraction of the free memory that HFEngine uses for its KV cache.

    Raises ModelError, ValueError, RuntimeError or ConnectionError, each with a message of one line.
    """
    if name.startswith(("http://", "https://", "vllm:")):
        if device != "auto":
            raise ValueError(f"--device {device}: vLLM chooses the device, do not set it for {name}")
        if name.startswith("vllm:"):
            return VLLMEngine(model_source(name.removeprefix("vllm:")), rows)
        return HTTPEngine(name, rows)
    return HFEngine(*load_model(name, device, "auto"), max_rows=rows, share=share)
