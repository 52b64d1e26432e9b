"""`multigraft ARGUMENTS` with FakeEngine in place of AsyncEngine; a model named "bad" fails to load."""

import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from fake_engine import FakeEngine

from multigraft.cli.main import app
from multigraft.core.errors import ModelNotSupported


class AsyncEngine(FakeEngine):
    @classmethod
    async def start(cls, config):
        if config.model.model == "bad":
            raise ModelNotSupported("The architecture BadForCausalLM is not supported.")
        print(config, file=sys.stderr)
        return cls()

    async def open_training(self):
        pass


sys.modules["multigraft.engine.async_engine"] = types.SimpleNamespace(AsyncEngine=AsyncEngine)
app()
