"""A backend in which nothing runs: seeded latencies and faults, and a count of everything.

For tests of the dispatcher under trio's MockClock and for simulations: no thread, no socket, no other clock than
trio's. What must never happen (a frozen instance is asked, more invocations at a time than the revision allows, an
instance is used after stop) is written down in `violations`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncGenerator

import trio

from pool.backends.base import (
    BackendBack,
    BackendEvent,
    BackendLost,
    Found,
    InstanceExited,
    OnOutput,
    OnProgress,
    Running,
    StartRequest,
)
from pool.backends.simulated_counts import Counts, Faults
from pool.backends.simulated_running import SimulatedRunning
from pool.errors import ArtifactError, BackendUnavailable, StartError
from pool.spec import Artifact, FunctionSpec, Revision

SPREAD = 0.2  # a latency is drawn within this share of its mean


class SimulatedBackend:
    """See pool.backends.base.Backend.

    Leaving and entering it again stands for a new daemon: what runs then is what find() finds.
    """

    name = "simulated"
    isolation = "simulated: nothing runs"

    def __init__(
        self,
        seed: int,
        *,
        start_s: float = 0.2,
        listen_s: float = 0.0,
        dial_s: float = 0.0005,
        answer_s: float = 0.001,
        freeze_s: float = 0.0002,
        thaw_s: float = 0.0,
        stop_s: float = 0.01,
        can_freeze: bool = True,
        faults: Faults | None = None,
    ) -> None:
        """Mean times in seconds of the trio clock; `listen_s`: from a start's end until the code listens."""
        self._random = random.Random(seed)
        self.start_s = start_s
        self.listen_s = listen_s
        self.dial_s = dial_s
        self.answer_s = answer_s
        self.freeze_s = freeze_s
        self.thaw_s = thaw_s
        self.stop_s = stop_s
        self.can_freeze = can_freeze
        self.faults = faults or Faults()
        self.counts = Counts()
        self.instances: dict[str, SimulatedRunning] = {}
        self._inherited: dict[str, SimulatedRunning] = {}
        self._events: list[BackendEvent] = []  # at most one exit an instance, and what tests do to the engine
        self._event_added = trio.Event()
        self._lost: str | None = None

    async def __aenter__(self) -> SimulatedBackend:
        await trio.lowlevel.checkpoint()
        self._inherited = {key: running for key, running in self.instances.items() if running.exited is None}
        self._events.clear()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Instances stay."""

    async def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        return {"version": "simulated", "isolation": self.isolation, "freezing": "yes" if self.can_freeze else "no"}

    async def resolve(self, spec: FunctionSpec, code_path: str | None, on_progress: OnProgress) -> Artifact:
        """See Backend.resolve. Every image exists but those whose name begins with "missing"."""
        self.check_engine()
        await trio.lowlevel.checkpoint()
        name = spec.image or code_path or ""
        if name.startswith("missing"):
            raise ArtifactError(f"{spec.name}: the image {name} does not exist", hint="correct its name")
        digest = hashlib.sha256(name.encode()).hexdigest()
        on_progress(f"simulated {name}")
        return Artifact(digest=f"sha256:{digest}", image=spec.image, code_path=code_path)

    async def start(self, request: StartRequest) -> Running:
        """See Backend.start."""
        self.check_engine()
        counts = self.counts
        counts.starting += 1
        counts.max_starting = max(counts.max_starting, counts.starting)
        try:
            await self.pass_time(self.start_s)
        except trio.Cancelled:
            counts.starts_cancelled += 1
            raise
        finally:
            counts.starting -= 1
        self.check_engine()
        if self._random.random() < self.faults.start_fails:
            counts.starts_failed += 1
            raise StartError(f"{request.instance_id}: a simulated fault", log_tail="it was drawn")
        running = SimulatedRunning(self, request, trio.current_time() + self.draw(self.listen_s))
        self.instances[request.instance_id] = running
        counts.starts += 1
        counts.live += 1
        counts.max_live = max(counts.max_live, counts.live)
        if self._random.random() < self.faults.dies_idle:
            running.die_later(self._random.expovariate(1 / self.faults.idle_death_s))
        running.print_line(b"simulated " + request.revision.id.encode())
        return running

    async def events(self) -> AsyncGenerator[BackendEvent, None]:
        """See Backend.events."""
        while True:
            while self._events:
                yield self._events.pop(0)
            self._event_added = trio.Event()
            await self._event_added.wait()

    async def find(self) -> list[Found]:
        """See Backend.find."""
        self.check_engine()
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        return [
            Found(key, running.revision_id, running.exited is None, running.frozen, now - running.started_at_s)
            for key, running in self._inherited.items()
        ]

    async def adopt(self, found: Found, revision: Revision, on_output: OnOutput) -> Running:
        """See Backend.adopt."""
        self.check_engine()
        running = self._inherited.get(found.instance_id)
        if running is None or running.exited is not None:
            raise StartError(f"{found.instance_id} does not run any more", backend_fault=True)
        await running.thaw()
        await trio.lowlevel.checkpoint()
        running.adopt(on_output)
        self._inherited.pop(found.instance_id, None)
        return running

    async def remove(self, found: Found) -> None:
        """See Backend.remove."""
        if running := self._inherited.get(found.instance_id):
            await running.stop(0.0)

    async def cleanup(self) -> None:
        """See Backend.cleanup. Nothing to do."""
        await trio.lowlevel.checkpoint()

    def lose_engine(self, detail: str = "the simulated engine is gone", *, kill: bool = True) -> None:
        """From now on the engine does not answer; `kill`: its instances die with it, told when it is back."""
        self._lost = detail
        self._tell(BackendLost(detail))
        if kill:
            for running in list(self.instances.values()):
                running.die("ended with its engine")

    def restore_engine(self) -> None:
        """The engine answers again."""
        self._lost = None
        self._tell(BackendBack())

    def check_engine(self) -> None:
        """Raises BackendUnavailable while the engine is lost."""
        if self._lost is not None:
            raise BackendUnavailable(self._lost, hint="wait for it to come back")

    def draw(self, mean_s: float) -> float:
        """One latency."""
        return mean_s * self._random.uniform(1 - SPREAD, 1 + SPREAD)

    def draw_fault(self) -> bytes | None:
        """What goes wrong with one answer, as the x-sim- header that asks for it."""
        drawn, faults = self._random.random(), self.faults
        named = ((b"die", faults.dies_in_request), (b"garbage", faults.garbage))
        for name, share in (*named, (b"silent", faults.silent), (b"close", faults.closes)):
            if drawn < share:
                return name
            drawn -= share
        return None

    async def pass_time(self, mean_s: float) -> None:
        """Wait for one latency."""
        await trio.sleep(self.draw(mean_s))

    def violation(self, text: str) -> None:
        """Write down what must never happen."""
        self.counts.violations.append(f"{trio.current_time():.6f} {text}")

    def exited(self, running: SimulatedRunning, detail: str) -> None:
        """An instance has ended by itself."""
        self._tell(InstanceExited(running.instance_id, detail))

    def removed(self, running: SimulatedRunning) -> None:
        """An instance has been stopped: nothing of it is left."""
        self.instances.pop(running.instance_id, None)
        self._inherited.pop(running.instance_id, None)

    def _tell(self, event: BackendEvent) -> None:
        self._events.append(event)
        self._event_added.set()
