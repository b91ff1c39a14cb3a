"""Names of the protection layers, and the check that the layers a caller requires are in force."""

from __future__ import annotations

import warnings

GUARANTEES = {  # what users rely on, and the consequence if it is not available
    "network": "snippets can use the network",
    "filesystem": "snippets can read and modify files",
    "processes": "snippets can signal other processes and leave processes behind",
    "memory": "snippets can use all memory",
}
LAYERS = {  # mechanisms that provide the guarantees, and the consequence if one is not available
    "net_namespace": "only seccomp, if in force, blocks the network",
    "pid_namespace": "only seccomp, if in force, blocks access to other processes",
    "ipc_namespace": "only seccomp, if in force, blocks shared memory",
    "mount_namespace": "only landlock, if in force, blocks file access; file names are visible; temporary files can "
    "fill a disk",
    "landlock": "only the private root, if in force, blocks file access",
    "seccomp": "all system calls are allowed; only namespaces restrict processes, sockets and kernel interfaces",
    "rlimits": "not all of memory, CPU time, file sizes and threads are limited",
    "unprivileged": "snippets run as root, although possibly without capabilities",
    "no_capabilities": "snippets keep the capabilities of this process",
    "no_new_privs": "set-uid programs can raise the privileges of a snippet",
}
_warned: set[str] = set()


def protection_status(active: list[str]) -> dict[str, bool]:
    """Map every guarantee and layer to whether it holds, given the layers that are in force."""
    layers = {name: name in active for name in LAYERS}
    seccomp, root = layers["seccomp"], layers["mount_namespace"]
    return {
        "network": seccomp or (layers["net_namespace"] and root),  # Unix sockets are files
        "filesystem": root or (layers["landlock"] and seccomp),  # landlock does not restrict chmod
        "processes": seccomp or layers["pid_namespace"],
        "memory": layers["rlimits"],
    } | layers


def check_protection(available: dict[str, bool], require: tuple[str, ...]) -> None:
    """Raise unless the required names are available, and warn once per process about every other missing one.

    Raises ValueError for an unknown name, RuntimeError for one that is not available.
    """
    unknown = [name for name in require if name not in available]
    if unknown:
        raise ValueError(f"require: unknown names {unknown}; choose from {', '.join(available)}")
    missing = [name for name in require if not available[name]]
    if missing:
        raise RuntimeError(f"require: {missing} not available on this system")
    for name, meaning in (GUARANTEES | LAYERS).items():
        if not available[name] and name not in _warned:
            _warned.add(name)
            # The caller of Executor(): check_protection < _start_server < __init__ < caller.
            warnings.warn(f"Executor: '{name}' is not available on this system: {meaning}", stacklevel=4)
