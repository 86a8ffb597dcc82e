"""The local model's process: loads one GGUF file with xllamacpp and serves it on loopback until its stdin closes.

`ksi.providers.local` runs this file as a script, by the launcher of `ksi.providers.process`. The daemon never imports
it, and it needs nothing of KSI, so that it starts fast. The first line of stdin is the settings (see `main`). One JSON
line on stdout is the answer: `{"address": ...}` or `{"error": ...}`. The key comes by stdin because others can read
arguments and environments.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def claim_stdout() -> int:
    """Return a private handle on stdout; from here on the library's output goes to stderr."""
    private = os.dup(1)
    os.dup2(2, 1)
    return private


def serve(settings: dict[str, Any]) -> Any:
    """Load the model and listen on a free port of loopback; returns the server, alive while it is referenced."""
    import xllamacpp  # here, so that a fault of its import is an answer and not a crash

    params = xllamacpp.CommonParams()
    params.model.path = settings["model_path"]
    params.model_alias = {settings["alias"]}
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context_tokens"] * settings["parallel"]
    if settings["threads"] is not None:
        params.cpuparams.n_threads = settings["threads"]
        params.cpuparams_batch.n_threads = settings["threads"]
    params.fit_params = settings["fit"]
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings["api_key"]]
    params.n_threads_http = settings["parallel"] + 4
    params.ui = False
    params.endpoint_slots = False
    params.offline = True
    params.sleep_idle_seconds = settings["unload_after"]
    params.verbosity = settings["verbosity"]
    return xllamacpp.Server(params)


def main() -> None:
    """Read settings, load, report, wait for the end of stdin.

    Settings: model_path, alias, context_tokens (of one slot), parallel (slots), threads (null: the library's choice),
    fit (shrink to the device's free memory; costs a second at load), unload_after (seconds without a call until the
    model's memory is given back; -1: never), api_key, verbosity (1: errors, 3: every request).
    """
    report = claim_stdout()
    line = sys.stdin.readline()
    if not line:
        return
    answer: dict[str, str]
    server = None
    try:
        server = serve(json.loads(line))
        answer = {"address": server.listening_address}
    except Exception as error:  # noqa: BLE001 - the top of this process: any error is reported to the daemon
        answer = {"error": f"{type(error).__name__}: {error}"}
    os.write(report, json.dumps(answer).encode() + b"\n")
    if server is not None:
        sys.stdin.read()
    # The server's threads have no orderly end that is worth waiting for.
    os._exit(0 if server is not None else 1)


if __name__ == "__main__":
    main()
