"""The twin: the production scheduler, page pool and residency under simulated time.

Its loop is engine.core's. A turn takes what has arrived, starts the loads that scheduling asks for, and runs a batch:
on the CPU to its end; with `overlap` the batch stays in flight, committed with tokens yet unknown, and the turn ends
when the batch before it does. Only durations are modelled. Outputs have the lengths that the workload says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Protocol

from multigraft.core.batch import AdapterMove, Batch, Phase, TrainPart
from multigraft.core.config import fetch_threads
from multigraft.core.errors import MultigraftError
from multigraft.core.request import AdapterRef, FinishReason, Request, SamplingParams
from multigraft.kvcache.pages import PagePool
from multigraft.scheduling.residency import Residency
from multigraft.scheduling.scheduler import Scheduler
from multigraft.scheduling.steady import decode_batch, skip, steady_steps
from multigraft.scheduling.steptime import StepShape
from multigraft.scheduling.training import TrainingShare, TrainWork, with_part

from .loads import HostMemory
from .profile import Deployment, Profile
from .record import Load, Record, Sample, Served
from .training import Training
from .workload import PREFIX_BLOCK, Arrival, Workload

NUM_SAMPLES = 600
"""States kept for the plots, about."""
SAMPLING = SamplingParams(ignore_eos=True)


class Timing(Protocol):
    """Where durations come from, when not from the profile: a recording of the engine, for instance."""

    def turn(self, batch: Batch) -> tuple[float, Sequence[tuple[StepShape, float]]]:
        """Seconds of a turn of the loop with something to do, from its schedule() to the next one, and what
        TrainingShare.observe is told in it."""
        ...

    def load(self, ref: AdapterRef) -> float:
        """Seconds from the decision to load until the adapter is on the device."""
        ...


@dataclass(slots=True)
class _Flight:
    """A step whose results are still to be delivered."""

    decodes: int
    """Rows that decode."""
    seconds: float = 0.0
    """Until the results are there."""
    sampled: list[Served] = field(default_factory=list)
    """Those whose prompt ended in it, or was computed again up to its end."""
    ended: list[Served] = field(default_factory=list)
    afterwards: float = 0.0
    """Seconds of the training that follows the results."""
    shape: StepShape | None = None
    """Of a step that the engine's clock times, for the training share to learn from."""
    slots: set[int] = field(default_factory=set)
    """Of its adapters."""


def simulate(
    workload: Workload,
    profile: Profile,
    deployment: Deployment,
    *,
    timing: Timing | None = None,
    on_batch: Callable[[Batch], None] | None = None,
) -> Record:
    """Serve the workload to its end.

    timing: in place of the profile's durations. on_batch: sees what every schedule() returns; with either, no step is
    skipped over.
    """
    shared = any(r.prefix for r in workload.requests)
    if deployment.enable_prefix_caching and not shared and timing is None and on_batch is None:
        # Without common prefixes the index serves preempted requests only: keep none until there is one.
        twin = Twin(workload, profile, replace(deployment, enable_prefix_caching=False))
        if twin.run(stop_at_preemption=True):
            return twin.record
    twin = Twin(workload, profile, deployment, timing, on_batch)
    twin.run()
    return twin.record


class Twin:
    """One simulation. `scheduler` is the production's, and has run exactly what the engine's would have."""

    def __init__(
        self,
        workload: Workload,
        profile: Profile,
        deployment: Deployment,
        timing: Timing | None = None,
        on_batch: Callable[[Batch], None] | None = None,
    ):
        self.profile, self.timing, self.on_batch = profile, timing, on_batch
        self.deployment = deployment
        pages = PagePool(deployment.kv_pages, deployment.page_size, deployment.enable_prefix_caching)
        residency = Residency(deployment.max_loras, deployment.adapter_bytes)
        share = TrainingShare(deployment.training)
        self.scheduler = Scheduler(deployment.scheduler, pages, residency, share)
        self.training = Training(workload.jobs, profile.num_layers, profile.train_rows)
        self.now = 0.0
        self.record = Record(
            workload=workload,
            served=[Served(r) for r in workload.requests],
            loads=[],
            samples=[],
            preemptions=0,
            steps=0,
            max_loras=deployment.max_loras,
        )
        self._refs: dict[str | None, AdapterRef | None] = {None: None}
        for uid, a in enumerate(workload.adapters, 1):
            self._refs[a.name] = AdapterRef(
                a.name, uid, a.nbytes or profile.adapter_bytes(a.rank), a.scope, rank=a.rank
            )
        threads = fetch_threads(profile.hardware.get("cores"))
        self._host = HostMemory(deployment.max_cpu_loras, profile.loads, threads)
        self._arrived = 0  # requests handed to the scheduler or refused
        self._loads: list[tuple[float, int, float, AdapterMove]] = []
        """Copies to the device: a heap of (due, number, start of the load, move)."""
        self._num_loads = 0
        self._copied = 0.0
        """When the copies under way will be done."""
        self._in_flight: _Flight | None = None
        self._delivered = 0.0
        """When the last results came."""
        self._sample_every = max(workload.duration, 1.0) / NUM_SAMPLES
        self._next_sample = 0.0

    def run(self, *, stop_at_preemption: bool = False) -> bool:
        """Whether it came to the end; with stop_at_preemption it stops where the first request is preempted."""
        while self._goes_on():
            self._arrive()
            self._finish_loads()
            work = self.training.work(self.now)
            if not self._skip(work):
                batch = self.scheduler.schedule(work)
                if self.on_batch is not None:
                    self.on_batch(batch)
                if batch.preempted and stop_at_preemption:
                    return False
                for move in batch.loads:
                    self._start_load(move)
                if batch or batch.train is not None or self._in_flight is not None:
                    self._turn(batch, timed=work is not None)
                else:
                    self._wait()
            if self.now >= self._next_sample:
                self._sample()
        self.record.seconds = self.now
        self.record.preemptions = self.scheduler.num_preemptions
        self.record.train_tokens = self.training.tokens
        return True

    # Turns -----------------------------------------------------------------------------------------------------

    def _turn(self, batch: Batch, timed: bool) -> None:
        """As EngineCore._timed_step."""
        flight = None
        seconds, told = self.timing.turn(batch) if self.timing else (0.0, ())
        if batch or (batch.train is not None and self.timing is None):
            flight = self._launch(batch, timed)
            # Every span that samples gets a token; commit() asks for no others.
            self.scheduler.commit(batch, dict.fromkeys([span.request.id for span in batch.spans], 0))
            ended = [r for span in batch.spans if len((r := span.request).tokens) == r.max_len]
            flight.ended = [self._served(request) for request in ended]
            for request in ended:
                self._finish(request)
        if batch.train is not None:
            self.training.run(batch.train)
        self.now += seconds
        for shape, taken in told:
            self.scheduler.training.observe(shape, taken)
        self._fly(flight)
        for request in batch.preempted:
            self._pause(request)

    def _launch(self, batch: Batch, timed: bool) -> _Flight:
        flight = _Flight(len(batch.spans))
        if self.timing is None:
            shape = StepShape.of(batch)
            self._take_time(flight, shape, batch.train)
            flight.shape = shape if timed else None
        if self.profile.overlap:
            flight.slots = {span.slot for span in batch.spans if span.slot is not None}
        for span in batch.spans:
            if span.phase is Phase.DECODE:
                break  # the last phase
            flight.decodes -= 1
            served = self._served(span.request)
            if served.started is None:
                served.started = self.now
            if span.samples:
                flight.sampled.append(served)
        self.record.steps += 1  # type: ignore[operator]
        return flight

    def _take_time(self, flight: _Flight, shape: StepShape, train: TrainPart | None) -> None:
        model = self.profile.steps
        served = model.served(shape)
        if train is None:
            flight.seconds = model.seconds(served)
            return
        # Where steps overlap, training runs on its own behind them; elsewhere forward rows ride along.
        ahead = 0 if self.profile.overlap else train.forward
        flight.seconds = model.seconds(served, ahead * train.rows, 0, ahead)
        flight.afterwards = model.predict(shape, served) - flight.seconds

    def _finish(self, request: Request) -> None:
        self.scheduler.finish(request, FinishReason.LENGTH)
        self._host.release(request.adapter)

    def _fly(self, flight: _Flight | None) -> None:
        """Deliver the step, or with overlap the one before it, which has had time to end."""
        if self.profile.overlap:
            flight, self._in_flight = self._in_flight, flight
            if flight is None:
                launch = 0.0 if self.timing else self.profile.launch
                self.now = self._host.idle(self.now, self.now + launch)
        if flight is not None:
            self._deliver(flight)

    def _deliver(self, flight: _Flight) -> None:
        """Let the step's time pass, and hand its tokens out."""
        began = self.now
        self.now = self._host.step(self.now, flight.seconds)
        record, now = self.record, self.now
        if flight.decodes:
            record.add_gap(now - self._delivered, flight.decodes)
        for served in flight.sampled:
            served.num_tokens += 1
            if served.first is None:
                served.first = now
            elif served.last is not None:
                record.add_gap(now - served.last)
            served.last = None  # told by _delivered, while it decodes
        for served in flight.ended:
            served.last, served.num_tokens = now, served.request.output_len
        self._delivered = now
        self.now = self._host.step(self.now, flight.afterwards)
        if flight.shape is not None:
            self.scheduler.training.observe(flight.shape, self.now - began)

    def _pause(self, request: Request) -> None:
        """A preempted request has had its last token for a while."""
        served = self._served(request)
        if request.num_output and served.last is None:
            served.last = self._delivered

    def _skip(self, work: TrainWork | None) -> bool:
        """Run at once the steps up to the next event that only decode, and train if there is work; False when there are
        none."""
        if self.timing is not None or self.on_batch is not None:
            return False
        steps = steady_steps(self.scheduler)
        if steps == 0:
            return False
        spans = decode_batch(self.scheduler).spans
        ending = [span.request for span in spans if span.request.max_len - len(span.request.tokens) == steps]
        model, share, shape = self.profile.steps, self.scheduler.training, StepShape.of(Batch(spans=spans))
        seconds, growth = model.predict(shape), model.growth(shape)
        trains, event, done = work is not None, self._next_event(), 0
        while done < steps and self.now < event and not self._host.done:
            flight = _Flight(len(spans), seconds + done * growth)
            if trains:
                work = self.training.work(self.now)
                if work is None:
                    break
                part = share.part(shape, work, self.scheduler.num_waiting)
                flight.shape = with_part(shape, part)
                self._take_time(flight, flight.shape, part)
                if part is not None:
                    self.training.run(part)
                shape = with_part(shape, None)
                shape.decode_context += len(spans)
            done += 1
            if done == steps:
                flight.ended = [self._served(request) for request in ending]
            self._fly(flight)
        skip(self.scheduler, done)
        self.record.steps += done  # type: ignore[operator]
        if done == steps:
            for request in ending:
                self._finish(request)
        return True

    # Events ----------------------------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        """Until all requests have ended; jobs alone, until they have."""
        requests, s, flight = self.record.workload.requests, self.scheduler, self._in_flight
        if not requests:
            return bool(flight or self.training.next_start is not None or self.training.work(self.now))
        return bool(self._arrived < len(requests) or s.num_running or s.num_waiting or (flight and flight.ended))

    def _next_event(self) -> float:
        """When something next happens by itself, reads aside; infinity when nothing will."""
        requests = self.record.workload.requests
        arrival = requests[self._arrived].time if self._arrived < len(requests) else math.inf
        load = self._loads[0][0] if self._loads else math.inf
        job = self.training.next_start
        return min(arrival, load, math.inf if job is None else job)

    def _wait(self) -> None:
        """Let the time pass until the next event."""
        event = min(self._next_event(), self._host.next_done(self.now))
        if event < math.inf:
            self.now = self._host.idle(self.now, max(self.now, event))
        else:
            assert self._arrived == len(self.record.workload.requests) and not self.scheduler.num_waiting

    def _arrive(self) -> None:
        """As AsyncEngine's checks and EngineCore._add."""
        requests = self.record.workload.requests
        while self._arrived < len(requests) and requests[self._arrived].time <= self.now:
            i = self._arrived
            self._arrived += 1
            r, limit = requests[i], self.deployment.max_model_len
            ref = self._refs[r.adapter]
            if r.prompt_len + r.output_len > limit:
                self.record.served[i].error = f"needs {r.prompt_len + r.output_len} tokens of context, of {limit}"
                continue
            request = Request(str(i), prompt(i, r), SAMPLING, max_len=r.prompt_len + r.output_len, adapter=ref)
            try:
                self.scheduler.add(request)
            except MultigraftError as error:
                self.record.served[i].error = error.message
                continue
            self._host.hold(ref)

    def _start_load(self, move: AdapterMove) -> None:
        if self.timing is not None:
            self._push_copy(self.now + self.timing.load(move.ref), self.now, move)
        else:
            self._host.fetch(move, self.now)
            self._begin_copies()

    def _push_copy(self, due: float, start: float, move: AdapterMove) -> None:
        self._num_loads += 1
        heappush(self._loads, (due, self._num_loads, start, move))

    def _finish_loads(self) -> None:
        """As EngineCore's inbox and AdapterLoads."""
        self._begin_copies()
        while self._loads and self._loads[0][0] <= self.now:
            _, _, start, move = heappop(self._loads)
            self.scheduler.adapter_loaded(move.ref.uid)
            self.record.loads.append(Load(move.ref.name, start, self.now - start))  # type: ignore[union-attr]

    def _begin_copies(self) -> None:
        """Of adapters in host memory: on the CPU in the engine's own time, elsewhere on the bus, one at a time, each
        after the step in flight if that uses its slot."""
        loads, flight = self.profile.loads, self._in_flight
        while self._host.done:
            move, start = self._host.done.popleft()
            free = self.now + (flight.seconds if flight and move.slot in flight.slots else 0.0)
            self._copied = max(self._copied, free) + loads.copy_per_byte * move.ref.nbytes
            due = self._copied + loads.copy
            if not self.profile.overlap:
                self.now = self._host.idle(self.now, due)
            self._push_copy(due, start, move)

    def _sample(self) -> None:
        s = self.scheduler
        state = (s.num_running, s.num_waiting, s.pages.usage, s.residency.num_used)
        self.record.samples.append(Sample(self.now, *state))  # type: ignore[union-attr]
        self._next_sample = self.now + self._sample_every

    def _served(self, request: Request) -> Served:
        return self.record.served[int(request.id)]


def prompt(index: int, arrival: Arrival) -> list[int]:
    """Tokens that begin like another request's as far as their prefix ids agree, and nowhere else."""
    tokens: list[int] = []
    for block in arrival.prefix:
        tokens += [-2 - block] * PREFIX_BLOCK
    del tokens[arrival.prompt_len :]
    return tokens + [index] * (arrival.prompt_len - len(tokens))
