"""Keeps the daemon's files in place for clients: its folder, its pid file and its socket."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from ksi.clock import Clock
from ksi.host.pid_file import PidFile
from ksi.host.supervise import Periodic
from ksi.transports.unix_socket import UnixSocket

LOOK_EVERY = 1.0
"""Seconds between looks; after a fault too it is not much longer."""

LONGEST_PAUSE = 5.0


class Presence:
    """Restores files that were removed or replaced. If another daemon has this place now, this one has to stop."""

    def __init__(
        self,
        socket: UnixSocket,
        pid_file: PidFile | None,
        clock: Clock,
        on_replaced: Callable[[], None],
        look: Callable[[], object] | None = None,
    ) -> None:
        """`pid_file` is None for a daemon inside another program. `on_replaced` is called if it has to stop, `look` at
        each check, for other removed files."""
        self._look_on = look
        self._socket = socket
        self._pid_file = pid_file
        self._on_replaced = on_replaced
        self.task = Periodic("ksi-presence", self._look, LOOK_EVERY, clock, longest_pause=LONGEST_PAUSE)
        self._log = structlog.get_logger("ksi.daemon.presence")

    async def _look(self) -> None:
        if self._look_on is not None:
            self._look_on()
        if self._pid_file is not None and not self._pid_file.keep():
            # It may also be one that only tries to start, and that our database will send away.
            if self._socket.is_served_by_another():
                self._log.error("another daemon serves this home now, so this one stops")
                self._on_replaced()
            return
        if await self._socket.restore():
            self._log.warning("the socket had been removed and was restored", socket=str(self._socket.path))
