"""Knowing a netcat that has nothing more to send, and would wait for ever.

`echo LINE | nc -U SOCKET` ends at once with a netcat that closes its sending side at the end of its input. Debian's
(netcat-openbsd) does so only with -N: without it both sides would wait for each other. Nothing on the connection tells
this client from one that only thinks, so the kernel is asked which program it is.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

NAMES = frozenset({"nc", "nc.openbsd", "netcat"})


def is_piped_netcat(peer: socket.socket) -> bool:
    """True if the other end is a netcat whose input is no terminal. False if the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return False
    pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    process = Path(f"/proc/{pid}")
    try:
        if (process / "comm").read_text().strip() not in NAMES:
            return False
        return not str((process / "fd" / "0").readlink()).startswith(("/dev/tty", "/dev/pts/"))
    except OSError:
        return False  # it has exited, or is in a place that cannot be seen
