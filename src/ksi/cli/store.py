"""`ksi store migrate`: from one kind of store to another, and back."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

from ksi.cli.render import say
from ksi.cli.settings import Settings, pass_settings

if TYPE_CHECKING:
    from ksi.config.schema import Config
    from ksi.store.snapshot.move import Here

CONFIGURED = "configured"
"""Stands for the address in `store.url`, so that the password need not be typed."""


@click.group(
    epilog="""\b
Examples:
  ksi store migrate sqlite:///var/db/ksi.db redis://valkey.example/0?namespace=team
  ksi store migrate redis://valkey.example/0?namespace=team sqlite:///var/db/ksi.db
  KSI_STORE__URL=redis://:secret@valkey.example ksi store migrate sqlite:///var/db/ksi.db configured
"""
)
def store() -> None:
    """Move the contents of this home's store into a store of another kind."""


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
    """Copy the contents of the store FROM into the empty store TO; `configured` stands for the home's store.url.

    No daemon of either may run. Requests keep their ids, order and answers, and conversations and chains keep
    everything. FROM is not changed; set store.url to TO, and start the daemon.
    """
    from importlib.metadata import version

    import msgspec

    from ksi.cli.migrate import quiet_parts
    from ksi.clock import Chance, SystemClock
    from ksi.daemon.parts import build_store
    from ksi.errors import InvalidData
    from ksi.host.pid_file import PidFile
    from ksi.host.private_files import make_folder
    from ksi.store.snapshot.move import move

    config = settings.config
    urls = [config.store.url if url == CONFIGURED else url for url in (source, target)]
    if urls[0] == urls[1]:
        raise InvalidData("FROM and TO are the same store. Name two different ones; see `ksi store migrate --help`")
    configs = [msgspec.structs.replace(config, store=msgspec.structs.replace(config.store, url=url)) for url in urls]
    make_folder(config.run_dir)
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
    """This machine, under its name in a shared store."""
    from ksi.clock import SystemClock
    from ksi.completion.pool.kinds import build_providers
    from ksi.store.snapshot.move import Here

    providers = build_providers(config, os.environ, SystemClock())
    keepers = frozenset(name for name, provider in providers.items() if provider.capabilities.sessions_on_node)
    return Here(config.store.node, keepers)
