"""`multigraft serve`: from flags to a running server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import shlex
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    ServerConfig,
    TrainingConfig,
)
from multigraft.core.errors import MultigraftError

from . import config_file
from .flags import PANELS, Flag, all_flags, build

if TYPE_CHECKING:
    from multigraft.engine.client import EngineClient

EPILOG = """[bold]Examples[/bold]

multigraft serve Qwen/Qwen3-0.6B --lora-modules french=./french latin=./latin

multigraft serve ./model --lora-dir ./adapters --max-loras 32 --api-key $KEY --host 0.0.0.0

multigraft serve ./model --lora-dir ./adapters --auto-plan plan.json

multigraft serve --config server.yaml --port 9000   [dim]# flags go before the file's values[/dim]"""


class _ServeCommand(TyperCommand):
    """Lets --lora-modules take several values at once, as vLLM's does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_lora_modules(args))


def spread_lora_modules(args: list[str]) -> list[str]:
    """`--lora-modules a=x b=y` becomes `--lora-modules a=x --lora-modules b=y`.

    Only name=path and JSON objects are taken, so that a MODEL after them stays one.
    """
    spread: list[str] = []
    taking = False
    for i, arg in enumerate(args):
        looks_like_one = not arg.startswith("-") and ("=" in arg or arg.startswith("{"))
        if taking and looks_like_one and args[i - 1] != "--lora-modules":
            spread.append("--lora-modules")
        taking = arg == "--lora-modules" or (taking and looks_like_one)
        spread.append(arg)
    return spread


def register(app: typer.Typer) -> None:
    app.command("serve", cls=_ServeCommand, epilog=EPILOG)(_command())


def _command() -> Any:
    """The command's function, with one parameter for each configuration field."""

    def serve(**values: Any) -> None:
        """Serve a base model and its adapters over HTTP, with OpenAI's interface."""
        for name in ("config", "auto_plan"):
            values.pop(name)  # their values have become defaults
        run(values)

    flags = all_flags()
    config = Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file with flag names as keys; flags on the command line go before it.",
            is_eager=True,
            callback=_load_config_file,
            rich_help_panel=PANELS[EngineConfig],
        ),
    ]
    auto_plan = Annotated[
        Path | None,
        typer.Option(
            "--auto-plan",
            help="File of `multigraft plan`, or a workload to plan for with the profile.json beside it: sets slots, "
            "KV cache and batch limits; flags on the command line and in --config go before it.",
            is_eager=True,
            callback=_load_plan,
            rich_help_panel=PANELS[EngineConfig],
        ),
    ]
    parameters = [flag_parameter(flag) for flag in flags]
    for name, annotation in (("config", config), ("auto_plan", auto_plan)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    return serve


def flag_parameter(flag: Flag) -> inspect.Parameter:
    """Of a command's function. MODEL and DATA are told by their place, all else by name."""
    kind = list[flag.kind] if flag.multiple else flag.kind  # type: ignore[name-defined]
    info: Any
    default = flag.default
    if default is None:
        kind = kind | None
    if flag.name in ("model", "data"):
        info = typer.Argument(help=flag.help, metavar=flag.name.upper(), show_default=False)
    else:
        names = f"{flag.option}/--no-{flag.option[2:]}" if kind is bool else flag.option
        info = typer.Option(names, help=flag.help, rich_help_panel=flag.panel)
    if default is MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        flag.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _load_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        with user_errors():
            values = config_file.read(path, (flag.name for flag in all_flags()))
        multiple = {flag.name for flag in all_flags() if flag.multiple}
        given = {name: _listed(value) if name in multiple else value for name, value in values.items()}
        ctx.default_map = {**(ctx.default_map or {}), **given}
    return path


def _load_plan(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        from .plan import planned_flags

        with user_errors():
            ctx.default_map = {**planned_flags(path), **(ctx.default_map or {})}
    return path


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]


@contextlib.contextmanager
def user_errors() -> Any:
    """A user's mistake is one line on stderr and exit status 2; our bugs keep their traceback."""
    try:
        yield
    except MultigraftError as error:
        typer.secho(f"Error: {error.message}", err=True, fg="red")
        raise typer.Exit(2) from None


def run(values: dict[str, Any]) -> None:
    """Start the engine and serve until a signal. values: by field name."""
    engine_config = build_engine_config(values)
    server_config = build(ServerConfig, values)
    _set_up_logging(server_config)
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
        from multigraft.engine.worker import run_under_torchrun

        run_under_torchrun(engine_config)
        return
    with user_errors(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(engine_config, server_config))


def build_engine_config(values: dict[str, Any]) -> EngineConfig:
    return build(
        EngineConfig,
        values,
        model=build(ModelConfig, values),
        cache=build(CacheConfig, values),
        scheduler=build(SchedulerConfig, values),
        adapters=build(AdapterConfig, values),
        parallel=build(ParallelConfig, values),
        training=build(TrainingConfig, values),
    )


async def _serve(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    from multigraft.server import bind, serve  # seconds of imports, kept away from --help

    with bind(server_config) as sock:
        from multigraft.engine.async_engine import AsyncEngine

        engine = await AsyncEngine.start(engine_config)
        await engine.open_training()
        await serve(engine, server_config, sock=sock, on_ready=lambda url: print_banner(engine, server_config, url))


def print_banner(client: EngineClient, config: ServerConfig, url: str) -> None:
    from rich.console import Console

    info = client.info
    names = [card.name for card in client.models()]
    adapters = ", ".join(names[1:6]) + (", ..." if len(names) > 6 else "")
    rows = [
        ("model", f"{names[0]}  ({info.dtype} on {info.device}, up to {client.max_model_len} tokens)"),
        ("KV cache", f"{info.kv_tokens} tokens"),
        ("adapters", f"{len(names) - 1} registered" + (f": {adapters}" if adapters else "")),
        ("address", url),
    ]
    body = json.dumps({"model": names[-1], "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "Authorization: Bearer $KEY"' if config.api_key else ""
    curl = f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("\n[bold]Multigraft is ready[/bold]")
    for label, text in rows:
        console.print(f"  [dim]{label:<9}[/dim] ", end="")
        console.print(text, markup=False)
    console.print(f"\n  {curl}\n", markup=False)


def _set_up_logging(config: ServerConfig) -> None:
    level = config.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if level != "DEBUG":
        logging.getLogger("uvicorn.error").setLevel("WARNING")  # its start and stop say nothing that ours do not
    if config.access_log:
        logging.getLogger("uvicorn.access").setLevel("INFO")


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop does as well
        return None
    return uvloop.new_event_loop
