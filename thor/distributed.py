"""Data-parallel training: many processes (ranks) that run the same script, started by torchrun or accelerate launch.

Every rank holds the whole list of samples and makes the same decisions. Only the work is divided: which prompts
a rank samples (`gather` then gives the results to all ranks) and which micro-batches it computes. The number of ranks
therefore changes only the run time. Parameters, gradients and optimizer state are sharded (thor/training/model.py).
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
from accelerate import PartialState
from accelerate.utils import gather_object

CGROUP = Path("/sys/fs/cgroup")  # memory limits of a Linux container
_store: dist.Store | None = None  # key-value store that all ranks share


def rank() -> int:
    """Index of this process. Rank 0 prints, logs and saves."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks that joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(device: str, timeout: float) -> str:
    """Join the process group, if a launcher started several ranks, and return this rank's device.

    device: 'cpu', 'cuda', or 'auto' (a GPU if there is one). timeout: seconds that a rank waits for the others.
    A single CPU process has no group. A single GPU gets a group of one, so that sharding and rounding match many GPUs.
    Raises ValueError for 'cuda' without a GPU.
    """
    global _store
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is available to torch")
    cpu, ranks = device == "cpu" or not torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    if cpu and ranks == 1:
        if "LOCAL_RANK" not in os.environ:  # else a launcher started it, and PartialState would make a group
            PartialState(cpu=True)  # trackers need it
        return "cpu"
    if not cpu:
        torch.cuda.set_device(int(os.environ.setdefault("LOCAL_RANK", "0")))  # PartialState needs the variable
    group = {}
    if not dist.is_initialized():
        _store, number, size = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
        # with GPUs gloo too, which exchanges objects between CPUs
        group = {"backend": "gloo" if cpu else "cpu:gloo,cuda:nccl", "timeout": timedelta(seconds=timeout)}
        group |= {"store": _store, "rank": number, "world_size": size}
    state = PartialState(cpu=cpu, **group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    return "cpu" if cpu else str(state.device)


def first_to_fail() -> bool:
    """True for the first rank that calls this. Later failures are only a consequence of the first rank's exit."""
    if _store is None:
        return True
    return _store.compare_set("failed", "", str(rank())) == str(rank()).encode()


def end_ranks(code: int = 0) -> None:
    """End this process if it is one of many ranks; a single process only leaves its group.

    os._exit and not sys.exit: threads of torch's process group may still run, which aborts a normal exit now and then,
    and a rank that failed would wait for ranks that wait for it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank."""
    values = [value] if world_size() == 1 else gather_object([value])
    assert len(values) == world_size(), "the process group was not started by start_ranks"
    return values


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """Sum of each entry over all ranks, which must have the same keys."""
    parts = gather(values)
    return {key: sum(part[key] for part in parts) for key in values}


def barrier() -> None:
    """Wait for all ranks and their GPUs. Without it, a rank that ends early would leave the others hanging."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    gather(None)


def cpu_workers() -> int:
    """This rank's share of the CPUs of its node."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_memory(device: torch.device) -> int:
    """Free bytes: of the GPU, or this rank's share of what the machine or its container has left.

    The limit of a container is read from cgroup v2 at its usual mount point, as Docker and Kubernetes provide it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else memory that torch keeps for later tensors counts as used
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max", which means no limit
        limit = int((CGROUP / "memory.max").read_text())
        reclaimable = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        used = int((CGROUP / "memory.current").read_text()) - (int(reclaimable[1]) if reclaimable else 0)
        free = min(free, limit - used)
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
