"""Ends what takes too long: one task looks at all connections now and then, so that a request pays for no timer.

A trio deadline costs two heap operations and a scope a request, about a sixth of the invocation path; a look at
every running request 40 times a second costs next to nothing, and nothing at all when none is running.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from pool.channel import load

if TYPE_CHECKING:
    from gateway.connection import Connection

RUN_TICK_S = 0.025  # an invocation's time limit is kept to within this, and never cut short
REST_TICK_S = 1.0


class Sweeper:
    """Knows every connection (`all`) and those with a request that is being answered (`running`)."""

    def __init__(self) -> None:
        self.all: set[Connection] = set()
        self.running: set[Connection] = set()
        self._wake_run = trio.Event()
        self._wake_rest = trio.Event()
        self._run_asleep = False
        self._rest_asleep = False

    def add(self, connection: Connection) -> None:
        """A connection was accepted."""
        self.all.add(connection)
        if self._rest_asleep:
            self._wake_rest.set()

    def began(self, connection: Connection) -> None:
        """A request is being answered from now on."""
        self.running.add(connection)
        load.requests = len(self.running)
        if self._run_asleep:
            self._wake_run.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_running)
            nursery.start_soon(self._watch_resting)

    async def _watch_running(self) -> None:
        while True:
            if not self.running:
                self._wake_run = trio.Event()
                self._run_asleep = True
                await self._wake_run.wait()
                self._run_asleep = False
            await trio.sleep(RUN_TICK_S)
            now_s = trio.current_time()
            for connection in self.running:
                if connection.deadline_s <= now_s:
                    connection.deadline_s = math.inf
                    connection.time_is_up()
                elif connection.requests != connection.requests_seen:
                    connection.requests_seen = connection.requests
                else:
                    connection.look_for_hang_up()

    async def _watch_resting(self) -> None:
        while True:
            if not self.all:
                self._wake_rest = trio.Event()
                self._rest_asleep = True
                await self._wake_rest.wait()
                self._rest_asleep = False
            await trio.sleep(REST_TICK_S)
            now_s = trio.current_time()
            for connection in self.all:
                connection.check_client(now_s)
