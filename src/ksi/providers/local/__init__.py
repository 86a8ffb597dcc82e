"""Kind `local`: a model on this machine, served by a process of its own."""

from ksi.providers.local.provider import LocalProvider, Options, build

__all__ = ["LocalProvider", "Options", "build"]
