"""The `multigraft` command. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import typer

from multigraft import __version__

from . import adapters, plan, serve, train, twin

app = typer.Typer(
    name="multigraft",
    help="Hundreds of LoRA and ReFT adapters on one base model, served together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
serve.register(app)
train.register(app)
twin.register(app)
plan.register(app)
app.add_typer(adapters.app)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


if __name__ == "__main__":
    app()
