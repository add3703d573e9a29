"""One instance of the simulated backend: states and counts, no process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from pool.backends.base import OnOutput, Output, StartRequest, Usage
from pool.backends.simulated_channel import Request, SimulatedChannel
from pool.channel import Channel
from pool.errors import BackendUnavailable, ChannelClosed

if TYPE_CHECKING:
    from pool.backends.simulated import SimulatedBackend
CRASH = "killed by signal 9 (SIGKILL)"


class SimulatedRunning:
    """See pool.backends.base.Running."""

    def __init__(self, backend: SimulatedBackend, request: StartRequest, listens_at_s: float) -> None:
        self._backend = backend
        self._request = request
        self._on_output = request.on_output
        self._listens_at_s = listens_at_s
        self.started_at_s = trio.current_time()
        self._frozen_at_s: float | None = None
        self._exited: str | None = None
        self._stopped = False
        self._serving = 0
        self._answers = 0
        self._channels: set[SimulatedChannel] = set()
        self._dies_when_thawed = False
        self._deaths: list[trio.CancelScope] = []  # of tasks that will let it die

    @property
    def instance_id(self) -> str:
        return self._request.instance_id

    @property
    def revision_id(self) -> str:
        return self._request.revision.id

    @property
    def can_freeze(self) -> bool:
        return self._backend.can_freeze

    @property
    def pid(self) -> int | None:
        return None

    @property
    def exited(self) -> str | None:
        return self._exited

    @property
    def frozen(self) -> bool:
        return self._frozen_at_s is not None

    @property
    def now_s(self) -> float:
        """See Inside.now_s."""
        return trio.current_time() if self._frozen_at_s is None else self._frozen_at_s

    @property
    def serving(self) -> int:
        """Requests that have begun and are not over."""
        return self._serving

    async def dial(self, port: int) -> Channel:
        """See Running.dial. Nothing listens on other ports than the request's."""
        await self._backend.pass_time(self._backend.dial_s)
        if self._exited is not None:
            raise ChannelClosed(f"the instance has ended: {self._exited}")
        if port != self._request.port or trio.current_time() < self._listens_at_s:
            raise ChannelClosed(f"nothing listens on port {port}")
        channel = SimulatedChannel(self)
        self._channels.add(channel)
        return channel

    async def listen(self, port: int) -> trio.SocketListener:
        """See Running.listen. Not possible here: no code runs that could ask."""
        raise BackendUnavailable(
            f"the simulated backend cannot listen on port {port}", hint="use a contract in which the code listens"
        )

    async def freeze(self) -> None:
        """See Running.freeze."""
        self._backend.check_engine()
        if not self.can_freeze:
            raise BackendUnavailable("this simulated backend cannot freeze")
        await self._backend.pass_time(self._backend.freeze_s)
        if self._exited is None and self._frozen_at_s is None:
            if self._serving:
                self._backend.violation(f"{self.instance_id} was frozen while serving {self._serving}")
            self._frozen_at_s = trio.current_time()
            self._backend.counts.freezes += 1

    async def thaw(self) -> None:
        """See Running.thaw."""
        if self._backend.thaw_s > 0:
            await self._backend.pass_time(self._backend.thaw_s)
        if self._frozen_at_s is not None:
            stood_s, self._frozen_at_s = trio.current_time() - self._frozen_at_s, None
            self._backend.counts.thaws += 1
            for channel in self._channels:
                channel.postpone(stood_s)
            if self._dies_when_thawed:
                self.die(CRASH)

    async def sample(self) -> Usage:
        """See Running.sample."""
        await trio.lowlevel.checkpoint()
        return Usage(self._request.revision.spec.memory_mb / 2, self._answers * self._backend.answer_s)

    async def stop(self, grace_s: float) -> None:
        """See Running.stop."""
        if self._stopped:
            await trio.lowlevel.checkpoint()
            return
        self._backend.check_engine()
        if self._serving and self._exited is None:
            self._backend.counts.stopped_while_serving += 1
        await self._backend.pass_time(min(grace_s, self._backend.stop_s))
        self._backend.check_engine()
        if not self._stopped:
            self._stopped = True
            self._backend.counts.stops += 1
            self._end("stopped")
            self._backend.removed(self)

    def begun(self) -> None:
        """See Inside.begun."""
        counts = self._backend.counts
        self._serving += 1
        counts.requests += 1
        counts.max_serving = max(counts.max_serving, self._serving)
        if self.frozen:
            self._backend.violation(f"{self.instance_id} was asked while frozen")
        if self._serving > self._request.revision.spec.concurrency:
            self._backend.violation(f"{self.instance_id} serves {self._serving} at a time")

    def finished(self, *, answered: bool) -> None:
        """See Inside.finished."""
        self._serving -= 1
        if answered:
            self._answers += 1
            self._backend.counts.answers += 1
            if self.frozen:
                self._backend.violation(f"{self.instance_id} answered while frozen")

    def delay_s(self, request: Request) -> float | None:
        """See Inside.delay_s."""
        fault = self._backend.draw_fault()
        if fault is not None:
            request.headers[b"x-sim-" + fault] = b"1"
        asked = request.headers.get(b"x-sim-delay-s")
        return float(asked) if asked is not None else self._backend.draw(self._backend.answer_s)

    def print_line(self, text: bytes) -> None:
        """See Inside.print_line."""
        self._on_output(Output.STDOUT, text + b"\n")

    def die_in_request(self, delay_s: float) -> None:
        """See Inside.die_in_request."""
        self.die_later(delay_s, awake=True)

    def die_later(self, delay_s: float, *, awake: bool = False) -> None:
        """Die after so long; `awake`: of something it does itself, which it cannot do while frozen."""

        async def wait(scope: trio.CancelScope) -> None:
            with scope:
                await trio.sleep(delay_s)
                if awake and self.frozen:
                    self._dies_when_thawed = True
                else:
                    self.die(CRASH)

        scope = trio.CancelScope()
        self._deaths.append(scope)
        trio.lowlevel.spawn_system_task(wait, scope)

    def die(self, detail: str) -> None:
        """End by itself, as a crash does; the backend tells it."""
        if self._exited is None:
            self._backend.counts.deaths += 1
            self._end(detail)
            self._backend.exited(self, detail)

    def forget(self, channel: SimulatedChannel) -> None:
        """See Inside.forget."""
        self._channels.discard(channel)

    def adopt(self, on_output: OnOutput) -> None:
        """Print there from now on."""
        self._on_output = on_output

    def _end(self, detail: str) -> None:
        if self._exited is None:
            self._exited = detail
            self._frozen_at_s = None
            self._backend.counts.live -= 1
        for scope in self._deaths:
            scope.cancel()
        for channel in list(self._channels):
            channel.wake()
