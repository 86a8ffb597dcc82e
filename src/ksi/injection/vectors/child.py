"""The process that makes vectors: sentences on stdin, what they mean on stdout, message by message, until stdin ends.

It is started with `python -I -m ksi.injection.vectors.child`.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Any

import msgspec

from ksi.errors import ConfigError
from ksi.injection.meaning.model import learned
from ksi.injection.vectors.network import Network, model_file, signs
from ksi.injection.vectors.wire import LENGTH, Meant, frame

_POLITE = 10
"""By how much its priority is below the daemon's."""


def main() -> None:
    """Load the model, then answer until stdin ends."""
    os.nice(_POLITE)
    try:
        network = Network(model_file())
    except ConfigError as error:
        sys.exit(error.message)
    probe = learned().probe
    while (sentences := _next(sys.stdin.buffer)) is not None:
        vectors = network.vectors(sentences)
        found = [Meant(signs(vector), probe.hundredths(vector)) for vector in vectors]
        sys.stdout.buffer.write(frame(found))
        sys.stdout.buffer.flush()


def _next(said: IO[bytes]) -> Any:
    """The next list of sentences; None at the end."""
    head = said.read(LENGTH)
    if len(head) < LENGTH:
        return None
    return msgspec.msgpack.decode(said.read(int.from_bytes(head)), type=list[str])


if __name__ == "__main__":
    main()
