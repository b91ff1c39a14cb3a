"""Messages and exit statuses that the executor, its server process and the children share."""

from __future__ import annotations

import struct

# Control socket, both directions: kind, pid, wait status, CPU seconds, peak memory in KiB.
RECORD = struct.Struct("<ciidi")
CHILD, EXITED = b"C", b"X"  # from the server: a new child (with two descriptors), a child exited
KILL = b"K"  # to the server: kill a child
READY = b"R"  # from a child, on its channel: all layers are in force

# Exit statuses of a child. Only 0 means success, so a snippet gains nothing by forging one of the others.
EXIT_ERROR, EXIT_MEMORY, EXIT_BLOCKED, EXIT_SETUP = 1, 91, 92, 93
