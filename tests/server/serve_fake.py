"""A process that serves a FakeEngine on a free port, prints its URL, and reports the engine's end on exit.

Arguments: delay between tokens and shutdown grace, both in seconds.
"""

import asyncio
import sys

from fake_engine import FakeEngine

from multigraft.core.config import ServerConfig
from multigraft.server import serve


async def main() -> None:
    delay, grace = map(float, sys.argv[1:])
    engine = FakeEngine("x" * 20, delay=delay)
    config = ServerConfig(port=0, shutdown_grace_s=grace)
    await serve(engine, config, on_ready=lambda url: print(url, flush=True))
    print(f"shutdowns={engine.shutdowns} running={engine.running} aborted={len(engine.aborted)}", flush=True)


asyncio.run(main())
