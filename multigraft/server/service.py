"""What the endpoints share: the engine's client, the configuration, the metrics, and how requests run."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from multigraft.core.config import ServerConfig
from multigraft.core.errors import ModelNotFound
from multigraft.core.region import Scope
from multigraft.core.request import FinishReason, Output, SamplingParams
from multigraft.engine.client import EngineClient
from multigraft.metrics import ServingMetrics

from .schemas import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request's work for the engine: one or more prompts with the same parameters."""

    id: str
    prompts: Sequence[str | list[int]]
    sampling: SamplingParams
    model: str
    scope: Scope | None = None
    priority: int = 0

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n

    def choice(self, prompt: int, output: Output) -> int:
        """Where an output belongs among the response's choices: prompt after prompt, n for each."""
        return prompt * self.sampling.n + output.index


class Service:
    def __init__(self, client: EngineClient, config: ServerConfig):
        self.client = client
        self.config = config
        training = client.training.stats if client.training else None
        self.metrics = ServingMetrics(client.model_name, client.stats, training)
        self.draining = False
        """Set once a termination signal has come: only probes and running requests are answered."""

    def check_model(self, name: str | None) -> None:
        """ModelNotFound unless the name (None: the base) is served."""
        if name is not None and all(card.name != name for card in self.client.models()):
            raise model_not_found(name)

    def job(
        self,
        prefix: str,
        prompts: Sequence[str | list[int]],
        sampling: SamplingParams,
        body: GenerationRequest,
    ) -> Job:
        return Job(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompts=prompts,
            sampling=sampling,
            model=body.model or self.client.model_name,
            scope=body.scope,
            priority=body.priority,
        )

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, Output], None]:
        """(choice, Output) as they come, the prompts' interleaved. Closing it aborts what still runs.

        The first error of any prompt ends all of them.
        """
        if len(job.prompts) == 1:
            async with aclosing(self._run_prompt(job, 0)) as outputs:
                async for item in outputs:
                    yield item
            return

        queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

        async def pump(prompt: int) -> None:
            try:
                async with aclosing(self._run_prompt(job, prompt)) as outputs:
                    async for item in outputs:
                        queue.put_nowait(item)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        pumps = [asyncio.create_task(pump(i)) for i in range(len(job.prompts))]
        running = len(pumps)
        try:
            while running:
                event = await queue.get()
                if event is None:
                    running -= 1
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _run_prompt(self, job: Job, prompt: int) -> AsyncGenerator[tuple[int, Output], None]:
        timer = self.metrics.timer()
        outcome = FinishReason.ABORT  # unless it fails or runs to its end, it was closed from outside
        generator = self.client.generate(
            job.prompts[prompt],
            job.sampling,
            model=job.model,
            scope=job.scope,
            request_id=f"{job.id}-{prompt}",
            priority=job.priority,
        )
        try:
            async with aclosing(generator) as outputs:
                async for output in outputs:
                    timer.observe(output)
                    if output.error is not None:
                        raise output.error
                    yield job.choice(prompt, output), output
        except ModelNotFound:
            outcome = FinishReason.ERROR
            raise model_not_found(job.model) from None
        except Exception:
            outcome = FinishReason.ERROR
            raise
        finally:
            timer.close(job.sampling.n, outcome)


def model_not_found(name: str) -> ModelNotFound:
    """In the words that clients look for."""
    return ModelNotFound(f"The model `{name}` does not exist.", param="model")
