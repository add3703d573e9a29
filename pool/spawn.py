"""A thread that starts processes, for as long as a backend lives.

A parent-death signal is tied to the thread that forked (prctl(2), PR_SET_PDEATHSIG), and trio's pooled threads end
when they have been idle: what they start would be killed with them. So instances are started by one thread that stays.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import outcome
import trio

T = TypeVar("T")


class SpawnThread:
    """One thread, one job at a time. Not tied to a trio run; call end() when nothing it started lives any more."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # at most one: see _turn
        self._turn = trio.Lock()
        self._thread = threading.Thread(target=self._run, name="poold-spawn", daemon=True)
        self._thread.start()

    async def call(self, job: Callable[[], T]) -> T:
        """Run `job` there. Once begun it is waited for whatever happens, so its result is never lost to a cancel."""
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        results: list[outcome.Outcome[T]] = []

        def run() -> None:
            results.append(outcome.capture(job))
            token.run_sync_soon(done.set)

        async with self._turn:
            with trio.CancelScope(shield=True):
                self._jobs.put(run)
                await done.wait()
        return results[0].unwrap()

    def end(self) -> None:
        """Let the thread end after its job."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
