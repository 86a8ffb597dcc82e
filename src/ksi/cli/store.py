"""`ksi store migrate`: from one kind of store to another, and back."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

from ksi.cli.settings import Settings, pass_settings

if TYPE_CHECKING:
    from ksi.config import Config
    from ksi.store.migrate import Here

CONFIGURED = "configured"
"""Stands for the address in `store.url`, so that its password need not be typed."""


@click.group(
    epilog="""\b
Examples:
  ksi store migrate sqlite:///var/db/ksi.db redis://valkey.example/0?namespace=team
  ksi store migrate redis://valkey.example/0?namespace=team sqlite:///var/db/ksi.db
  KSI_STORE__URL=redis://:secret@valkey.example ksi store migrate sqlite:///var/db/ksi.db configured
"""
)
def store() -> None:
    """Move what this home's store holds into a store of another kind."""


@store.command(
    epilog="""\b
Examples:
  ksi store migrate sqlite:///var/db/ksi.db redis://valkey.example/0?namespace=team
  ksi store migrate configured sqlite:///var/db/back.db
"""
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@pass_settings
def migrate(settings: Settings, source: str, target: str) -> None:
    """Bring all that the store FROM holds into the empty store TO; `configured` stands for the home's store.url.

    No daemon may run, at either. Requests keep their ids, their order and their answers, conversations and chains all
    that they have. FROM stays as it was; set store.url to TO, and start the daemon.
    """
    from importlib.metadata import version

    import msgspec

    from ksi.cli.migrate import quiet_parts, say
    from ksi.clock import Chance, SystemClock
    from ksi.daemon import build_store
    from ksi.errors import InvalidData
    from ksi.pid_file import PidFile
    from ksi.store.migrate import move

    config = settings.config
    urls = [config.store.url if url == CONFIGURED else url for url in (source, target)]
    if urls[0] == urls[1] or any(url.startswith("memory:") for url in urls):
        raise InvalidData("FROM and TO: two different stores that keep what they hold; see `ksi store migrate --help`")
    configs = [msgspec.structs.replace(config, store=msgspec.structs.replace(config.store, url=url)) for url in urls]
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    pid_file = PidFile(config.pid_path)
    pid_file.take()
    try:
        with quiet_parts():
            stores = [build_store(one, Chance()) for one in configs]
            here = None if configs[0].store.shared else _here(config)
            asyncio.run(move(stores[0], stores[1], config.run_dir, SystemClock(), version("ksi"), say, here))
    finally:
        pid_file.release()
    say(f'done. Set store.url to "{configs[1].store.shown_url}" and start the daemon')


def _here(config: Config) -> Here:
    """This machine, as the store of a team is to know it."""
    from ksi.clock import SystemClock
    from ksi.completion.provider_kinds import build_providers
    from ksi.store.migrate import Here

    providers = build_providers(config, os.environ, SystemClock())
    keepers = frozenset(name for name, provider in providers.items() if provider.capabilities.sessions_on_node)
    return Here(config.store.node, keepers)
