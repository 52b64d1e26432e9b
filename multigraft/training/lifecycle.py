"""One job from its data to its served adapter, as a coroutine: its own state machine, whatever the others do.

validating_files -> queued -> running -> succeeded; from each of the first three to failed, cancelled or paused, and
from paused to queued. Every change is stored before the next begins: a killed process goes on from the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multigraft.core.errors import InvalidRequest, MultigraftError, StorageFull
from multigraft.core.training import ORGANIZATION, RESULTS, FineTuneJob, JobError, JobStatus

from . import records
from .engine import Snapshot, TrainingEngine, off_loop, restore
from .inputs import Inputs, read_inputs, settled
from .job import Event, EventKind, Stage, TrainingJob
from .pace import Pace
from .store import CheckpointRow, EventRow, FileRow, JobRow, TrainingStore, new_id
from .trackers import Trackers

log = logging.getLogger(__name__)

RETRY_SECONDS = 10.0


@dataclass(slots=True)
class Shared:
    """What the jobs of one manager have in common."""

    store: TrainingStore
    engine: TrainingEngine
    turns: asyncio.Semaphore
    """As many as jobs may run at once; first come, first served."""
    keep_checkpoints: int
    """Of a job, the newest; 0: all."""
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Tokenising competes with the engine for the interpreter: one file at a time."""
    room: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Notified when a job has given its memory back."""
    trained_tokens: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class _Halt:
    """To be stopped: to this status, or with the process (None), to go on when it starts again."""

    status: JobStatus | None


@dataclass(frozen=True, slots=True)
class _Told:
    """An event, and with a checkpoint what it is made of."""

    event: Event
    snapshot: Snapshot | None


@dataclass(frozen=True, slots=True)
class _Out:
    """The engine has let go of the job."""

    error: BaseException | None


class _EngineGone(Exception):
    """The engine has ended by itself. The next process goes on from the last checkpoint."""


class JobRun:
    """A job that has not ended. `row` is what is stored of it."""

    def __init__(self, row: JobRow, shared: Shared, on_end: Callable[[JobRun], None]):
        """on_end: called once it has succeeded, failed or been cancelled, and that is stored."""
        self.row = row
        self.request = records.load_request(row.request)
        self.metrics: dict[str, float] = {}
        self._shared = shared
        self._store = shared.store
        self._on_end = on_end
        self._inbox: asyncio.Queue[_Told | _Halt | _Out] | None = None
        """While it has a turn."""
        self._task: asyncio.Task[None] | None = None
        self._commands = asyncio.Lock()
        self._pace = Pace(shared.engine.granted_seconds)

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def status(self) -> JobStatus:
        return JobStatus(self.row.status)

    @property
    def view(self) -> FineTuneJob:
        seconds = None
        if self.status is JobStatus.RUNNING and self.row.total_steps is not None:
            seconds = self._pace.seconds_for(self.row.total_steps - self.row.step)
        return records.as_job(self.row, None if seconds is None else int(time.time() + seconds))

    # Commands --------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        self._task = asyncio.create_task(self._live(), name=self.id)

    async def halt(self, status: JobStatus | None) -> None:
        """Cancel, pause, or (None) leave for the next process. InvalidRequest when it has ended before that."""
        async with self._commands:
            if status is self.status or self.status.final:
                raise InvalidRequest(f"Job {self.id!r} is already {self.status.value}.")
            if self._inbox is not None:
                self._inbox.put_nowait(_Halt(status))
            elif self._task is not None:
                self._task.cancel()
            if self._task is not None:
                await asyncio.wait([self._task])
                self._task = None
            if self.status is not status and self.status.final:
                raise InvalidRequest(f"Job {self.id!r} is already {self.status.value}.")
            if status is not None and self.status is not status:
                await self._settle(status)

    async def leave(self) -> None:
        """The process ends."""
        with contextlib.suppress(InvalidRequest):
            await self.halt(None)

    async def resume(self) -> None:
        async with self._commands:
            if self.status is not JobStatus.PAUSED:
                raise InvalidRequest(f"Job {self.id!r} is {self.status.value}; only a paused one can be resumed.")
            await self.requeue("The job is resumed.")

    async def requeue(self, message: str) -> None:
        """Let it go on from what is stored."""
        validated = self.row.total_steps is not None
        status = JobStatus.QUEUED if validated else JobStatus.VALIDATING
        await self._update(self.event(message), status=status.value)
        self.launch()

    # Life ------------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            inputs = await self._validate() if self.status is JobStatus.VALIDATING else None
            if self._shared.turns.locked():
                inputs = None  # read again at its turn, rather than kept for as long as the queue is
            async with self._shared.turns:
                await self._train(inputs or await self._read())
        except _EngineGone:
            log.error("job %s waits for the next start, the engine has stopped", self.id)
        except Exception as error:
            await self._fail(error)

    async def _read(self) -> Inputs:
        async with self._shared.reading:
            return await read_inputs(self.request, self._store, self._shared.engine)

    async def _validate(self) -> Inputs:
        inputs = await self._read()
        self.request = settled(self.request, inputs.spec)
        await self._update(
            *(self.event(note, "warn") for note in inputs.notes),
            self.event("Files validated, moving job to queued state"),
            status=JobStatus.QUEUED.value,
            request=records.dump(self.request),
            total_steps=inputs.num_steps,
        )
        return inputs

    async def _train(self, inputs: Inputs) -> None:
        room = self._shared.room
        try:
            async with room:
                await room.wait_for(lambda: self._shared.engine.fits(inputs.spec))
                self._inbox = asyncio.Queue()  # from here on it stops between two passes, not where it is
                job = await off_loop(self._build, inputs)
                # Killed between its last checkpoint and its end, it has nothing left to run.
                left = None if job.stage is Stage.DONE else await self._start(job)
            await self._finish(job, None if left is None else await self._follow(job, left))
        finally:
            self._inbox = None
            async with room:
                room.notify_all()

    def _build(self, inputs: Inputs) -> TrainingJob:
        """At its start or, when there is one, at its last checkpoint."""
        start = None if inputs.spec.start is None else self._store.start_folder(self.id)
        job = self._shared.engine.build(self.id, inputs.spec, inputs.train, inputs.valid, start)
        last = self._store.last_checkpoint(self.id)
        if last is not None:
            restore(job, self._store.checkpoint_folder(last))
        return job

    async def _start(self, job: TrainingJob) -> Future[None]:
        assert self._inbox is not None
        await self._update(
            self.event("Fine-tuning job started"),
            status=JobStatus.RUNNING.value,
            step=job.step,
            trained_tokens=job.trained_tokens,
        )
        self._pace = Pace(self._shared.engine.granted_seconds)
        deliver = _deliverer(self._inbox)

        def tell(event: Event) -> None:
            deliver(_Told(event, Snapshot(job) if event.kind is EventKind.CHECKPOINT else None))

        left = self._shared.engine.start(job, self.request.weight, tell)
        left.add_done_callback(lambda future: deliver(_Out(future.exception())))
        return left

    async def _follow(self, job: TrainingJob, left: Future[None]) -> _Halt | None:
        """Until the engine has let go of it; None if it has ended by itself. Raises what made it fail."""
        trackers = await asyncio.to_thread(Trackers, self.id, self.request, self._folder / "tensorboard")
        try:
            return await self._listen(job, trackers)
        finally:
            self._shared.engine.stop(self.id)
            await asyncio.gather(asyncio.wrap_future(left), return_exceptions=True)
            await asyncio.to_thread(trackers.close)

    async def _listen(self, job: TrainingJob, trackers: Trackers) -> _Halt | None:
        """Store what the running job tells."""
        assert self._inbox is not None
        halt: _Halt | None = None
        while True:
            batch = [await self._inbox.get()]
            batch += [self._inbox.get_nowait() for _ in range(self._inbox.qsize())]
            for metrics, messages in itertools.groupby(batch, _is_metrics):
                if metrics:
                    await self._record([told.event for told in messages], trackers)  # in one transaction
                    continue
                for message in messages:
                    match message:
                        case _Halt():
                            halt = message
                            self._shared.engine.stop(self.id)
                        case _Told(event, snapshot) if snapshot is not None:
                            await self._checkpoint(event.step, event.data, snapshot)
                        case _Out(None) if job.stage is Stage.DONE:
                            return None
                        case _Out(None) if halt is None:
                            raise _EngineGone
                        case _Out(None):
                            return halt
                        case _Out(error):
                            raise error

    async def _record(self, events: list[Event], trackers: Trackers) -> None:
        """Metrics of steps and validations."""
        shared = self._shared
        num_steps = sum("train_loss" in event.data for event in events)
        tokens = sum(int(event.data.get("tokens", 0)) for event in events)
        shared.trained_tokens += tokens
        shared.steps += num_steps
        if num_steps:
            pace = self._pace.observe(num_steps, tokens, shared.engine.granted_seconds)
            events = [replace(e, data=e.data | pace) if "train_loss" in e.data else e for e in events]
        rows = []
        for event in events:
            self.metrics |= event.data
            data = {"step": event.step, "total_steps": self.row.total_steps, **event.data}
            rows.append(self.event(_describe(data), data=data))
        await self._update(*rows, step=events[-1].step, trained_tokens=self.row.trained_tokens + tokens)
        await asyncio.to_thread(trackers.log, events)
        if trackers.failure is not None:
            message, trackers.failure = trackers.failure, None
            await self._update(self.event(message, "warn"))

    async def _checkpoint(self, step: int, metrics: Mapping[str, float], snapshot: Snapshot) -> None:
        last = await asyncio.to_thread(self._store.last_checkpoint, self.id)
        if step == (last.step if last else 0):
            return  # paused where there is nothing new
        row = CheckpointRow(
            id=new_id("ftckpt"),
            created=int(time.time()),
            job_id=self.id,
            step=step,
            model=f"{self.model}:ckpt-step-{step}",
            metrics=records.dump({"step": step, **metrics}),
            trained_tokens=self.row.trained_tokens,
        )
        event = self.event(f"Checkpoint created at step {step}: {row.model}")
        await off_loop(self._store.add_checkpoint, row, snapshot.write, [event])
        await self._shared.engine.publish(row.model, self._store.checkpoint_folder(row) / "adapter")
        await self._drop_checkpoints()

    async def _drop_checkpoints(self) -> None:
        """Those beyond the limit, the oldest first; never the best, nor one that requests use."""
        limit = self._shared.keep_checkpoints
        rows = await asyncio.to_thread(self._store.checkpoints, self.id)
        losses = {row.id: loss for row in rows if (loss := json.loads(row.metrics).get("valid_loss")) is not None}
        best = min(losses, key=losses.__getitem__, default=None)
        for row in rows[:-limit] if limit else ():
            if row.id != best and self._shared.engine.withdraw(row.model):
                event = self.event(f"Checkpoint of step {row.step} removed: the newest {limit} and the best are kept")
                await asyncio.to_thread(self._store.drop_checkpoint, row, event)

    # Ends ------------------------------------------------------------------------------------------------------

    async def _finish(self, job: TrainingJob, halt: _Halt | None) -> None:
        if halt is None:
            await self._succeed()
        elif halt.status is JobStatus.CANCELLED:
            await self._settle(JobStatus.CANCELLED)
        else:
            await self._checkpoint(job.step, {}, await off_loop(Snapshot, job))
            if halt.status is not None:
                await self._settle(halt.status)

    async def _succeed(self) -> None:
        store = self._store
        last = await asyncio.to_thread(store.last_checkpoint, self.id)
        assert last is not None, "a job ends with a checkpoint"
        await self._shared.engine.publish(self.model, store.checkpoint_folder(last) / "adapter")
        results = await asyncio.to_thread(self._place_results)
        await self._update(
            results,
            self.event(f"New fine-tuned model created: {self.model}"),
            self.event("The job has successfully completed"),
            status=JobStatus.SUCCEEDED.value,
            finished=int(time.time()),
            fine_tuned_model=self.model,
            result_file=results.id,
        )

    def _place_results(self) -> FileRow:
        upload = self._store.upload()
        try:
            upload.write(records.results_table(self._store.metrics(self.id)).encode())
            return self._store.place(upload, "step_metrics.csv", RESULTS)
        finally:
            upload.discard()

    async def _settle(self, status: JobStatus) -> None:
        """Paused or cancelled."""
        finished = {"finished": int(time.time())} if status.final else {}
        await self._update(self.event(f"The job is {status.value}"), status=status.value, **finished)

    async def _fail(self, error: Exception) -> None:
        if isinstance(error, MultigraftError):
            found = JobError(code=error.code, message=error.message, param=error.param)
        else:
            log.error("job %s failed", self.id, exc_info=error)
            found = JobError(code="internal_error", message=f"{type(error).__name__}: {error}")
        while True:
            try:
                await self._update(
                    self.event(found.message, "error"),
                    status=JobStatus.FAILED.value,
                    finished=int(time.time()),
                    error=records.dump(found),
                )
                break
            except StorageFull:
                log.error("job %s has failed, which cannot be stored: the disk is full", self.id)
                await asyncio.sleep(RETRY_SECONDS)

    # Helpers ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The name of what it trains."""
        base = self._shared.engine.model_name.rstrip("/").rpartition("/")[2]
        return f"ft:{base}:{ORGANIZATION}:{self.request.suffix or ''}:{self.id[-8:]}"

    @property
    def _folder(self) -> Path:
        return self._store.job_folder(self.id)

    def event(self, message: str, level: str = "info", data: dict[str, Any] | None = None) -> EventRow:
        return EventRow(
            id=new_id("ftevent"),
            created=int(time.time()),
            job_id=self.id,
            level=level,
            message=message,
            data=records.dump(data) if data else None,
        )

    async def _update(self, *rows: EventRow | FileRow, **columns: Any) -> None:
        """Columns of its row and new rows: stored, all or none, then seen."""
        write = asyncio.ensure_future(self._write(rows, columns))
        try:
            await asyncio.shield(write)
        except asyncio.CancelledError:
            await write  # who cancels this job writes next: not before this
            raise

    async def _write(self, rows: Sequence[EventRow | FileRow], columns: dict[str, Any]) -> None:
        row = replace(self.row, **columns)
        await asyncio.to_thread(self._store.update_job, self.id, rows, **columns)
        if JobStatus(row.status).final:
            await asyncio.to_thread(self._store.drop_state, self.id)
        self.row = row
        if self.status.final:
            self._on_end(self)


def _deliverer(inbox: asyncio.Queue[Any]) -> Callable[[Any], None]:
    """Puts into the inbox from any thread."""
    loop = asyncio.get_running_loop()

    def deliver(message: Any) -> None:
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, message)
        except RuntimeError:  # the loop is closed: the process ends, and the next goes on from the last checkpoint
            log.debug("nobody hears of %s", message)

    return deliver


def _is_metrics(message: object) -> bool:
    return isinstance(message, _Told) and message.event.kind is EventKind.METRICS


def _describe(data: Mapping[str, Any]) -> str:
    names = {"train_loss": "training loss", "valid_loss": "validation loss"}
    losses = [f"{words}={data[name]:.4f}" for name, words in names.items() if name in data]
    return f"Step {data['step']}/{data['total_steps']}: {', '.join(losses)}"
