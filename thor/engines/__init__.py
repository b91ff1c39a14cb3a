"""Engines sample token ids from token ids; see `base.Engine` for the contract."""

from thor.engines.base import Completion, Engine, Request
from thor.engines.hf import HFEngine
from thor.engines.http import HTTPEngine, ServerError
from thor.engines.vllm import VLLMEngine
from thor.training import load_model, model_source

__all__ = ["Completion", "Engine", "HFEngine", "HTTPEngine", "Request", "ServerError", "VLLMEngine", "load_engine"]


def load_engine(name: str, device: str, rows: int, share: float = 0.5) -> Engine:
    """An engine to sample from the model `name`: 'http://host:port' is a running `vllm serve` (with '#model' behind it,
    one that serves that model), 'vllm:' before any other name is vLLM in this process, else HFEngine.

    rows: requests that sample at once. share: of the free memory, what an HFEngine may fill with keys and values.
    Raises ModelError, ValueError, RuntimeError or ConnectionError, each one line.
    """
    if name.startswith(("http://", "https://", "vllm:")):
        if device != "auto":
            raise ValueError(f"--device {device}: vLLM chooses its own, leave it out with {name}")
        if name.startswith("vllm:"):
            return VLLMEngine(model_source(name.removeprefix("vllm:")), rows)
        return HTTPEngine(name, rows)
    return HFEngine(*load_model(name, device, "auto"), max_rows=rows, share=share)
