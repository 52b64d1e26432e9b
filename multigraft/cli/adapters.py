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


@app.command("to-dense")
def to_dense(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a block-diagonal LoRA (use_bdlora).")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
) -> None:
    """Convert a block-diagonal LoRA into an ordinary one, the same function."""
    with user_errors():
        from multigraft.adapters import convert

        convert.make_dense(source, target)
    typer.echo(f"Wrote {target}")


@app.command("to-block-diagonal")
def to_block_diagonal(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a LoRA.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    nblocks: Annotated[int, typer.Option(help="Blocks: the tensor-parallel size it is to be served at.")],
) -> None:
    """Convert a LoRA into the nearest block-diagonal one of its ranks, and print how far off each module is."""
    from rich.console import Console
    from rich.table import Table

    with user_errors():
        from multigraft.adapters import convert

        report = convert.make_block_diagonal(source, target, nblocks)
    table = Table("module", "rank", "relative error")
    for module in report:
        table.add_row(module.path, str(module.rank), f"{module.error:.4f}")
    Console().print(table)
    typer.echo(f"Wrote {target}")
