"""`multigraft adapters`: work on adapter folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multigraft.core.region import Scope

from .serve import user_errors

app = typer.Typer(name="adapters", help="Work on adapter folders.", no_args_is_help=True)


@app.command("import-pyreft")
def import_pyreft(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder that pyreft saved; nothing of it is run.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder, for --lora-modules name=DST.")],
    positions: Annotated[
        str,
        typer.Option(help="Prompt tokens it was trained on, as f1+l1 (the first and the last), or all; not in SRC."),
    ] = "f1+l1",
    scope: Annotated[
        Scope | None, typer.Option(help="Whether it acts on generated tokens, with --positions all.")
    ] = None,
) -> None:
    """Convert a ReFT adapter of pyreft (LoReFT, DiReFT, NoReFT, NoDiReFT) into a folder that can be served."""
    with user_errors():
        from multigraft.adapters import pyreft  # torch, kept away from --help

        pyreft.import_pyreft(source, target, positions=positions, scope=scope)
    typer.echo(f"Wrote {target}")
