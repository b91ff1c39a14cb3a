"""Many processes, one run: torchrun starts one rank for each GPU, on one node or several, and all run the same script.

What keeps this small: every rank holds the whole list of samples and comes to the same decisions from it. Only work is
divided - whose prompts a rank samples (`gather` then gives the results to all), and which micro-batches it computes -
so the number of ranks changes nothing but the time. Parameters, gradients and optimizer state are sharded (policy.py).
Prompts are dealt out by their number, since how long the responses get is known afterwards only; micro-batches by size.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

CONTAINER = Path("/sys/fs/cgroup")  # memory limits of a Linux container, if this is one
_store: dist.Store | None = None  # a few keys that all ranks see


def rank() -> int:
    """Number of this process; 0 is the one that prints, logs and saves."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(device: str, timeout: float) -> str:
    """Join the ranks that torchrun started, if it did; returns this rank's device.

    device: 'cpu', 'cuda', or 'auto' (a GPU where there is one). timeout: seconds after which a rank that waits for the
    others gives up. A single CPU process stays plain; a single GPU is a group of one, so that it computes as many do.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    elif ranks == 1:
        return device
    if not dist.is_initialized():
        global _store
        _store = next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, timeout=limit, store=_store, rank=rank(), world_size=ranks)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    return device


def first_to_fail() -> bool:
    """Whether no other rank has asked this: those that fail later do so because they wait for one that is gone."""
    if _store is None:
        return True
    return _store.compare_set("failed", "", str(rank())) == str(rank()).encode()


def end_ranks(code: int = 0) -> None:
    """The end of one of many ranks, which ends the process; a single one only lets go of its group.

    At once and not by the ordinary way out: there threads of torch's process group may still run, which aborts the
    process now and then, and a rank that failed would wait for those that wait for it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def workers() -> int:
    """Interpreters for each rank's executor: the CPUs of this node, divided among its ranks."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_memory(device: torch.device) -> int:
    """Bytes that are free: of the GPU, or this rank's part of what the machine, or the container, still has.

    A container's limit is seen where its cgroup (v2) is mounted as usual, as Docker and Kubernetes do.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max", which is no limit
        limit = int((CONTAINER / "memory.max").read_text())
        files = re.search(r"^inactive_file (\d+)", (CONTAINER / "memory.stat").read_text(), re.MULTILINE)
        used = int((CONTAINER / "memory.current").read_text()) - (int(files[1]) if files else 0)
        free = min(free, limit - used)
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gather(value: Any) -> list[Any]:
    """The `value` of every rank, on every rank, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks, and for what their GPUs still do: one that ended earlier would leave the others hanging."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    gather(None)


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks, which all have the same keys."""
    parts = gather(values)
    return {key: sum(part[key] for part in parts) for key in values}
