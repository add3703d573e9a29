"""The output of all functions: the last of each kept, and followed by whoever subscribes."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import trio

from pool.logs import LogLine

KEEP_BYTES = 262_144  # a function
FOLLOW_LINES = 1_000  # a subscriber that is further behind loses lines


class Follower:
    """One subscription. Iterate `lines`; `missed` counts what came too fast."""

    __slots__ = ("_send", "lines", "missed")

    def __init__(self) -> None:
        self._send, self.lines = trio.open_memory_channel[LogLine](FOLLOW_LINES)
        self.missed = 0

    def offer(self, line: LogLine) -> None:
        """Pass a line on if there is room."""
        try:
            self._send.send_nowait(line)
        except trio.WouldBlock:
            self.missed += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def end(self) -> None:
        """Nothing comes any more: `lines` ends after what it holds."""
        self._send.close()


class _FunctionLines:
    __slots__ = ("followers", "lines", "size")

    def __init__(self) -> None:
        self.lines: deque[LogLine] = deque()
        self.size = 0
        self.followers: set[Follower] = set()


class LogBook:
    """Lines by function, over the lives of its instances. Memory: at most KEEP_BYTES for each function."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep_bytes = keep_bytes
        self._functions: dict[str, _FunctionLines] = {}
        self._ended = False

    def add(self, function: str, line: LogLine) -> None:
        """Keep a line; the oldest make room."""
        entry = self._functions.get(function)
        if entry is None:
            entry = self._functions[function] = _FunctionLines()
        entry.lines.append(line)
        entry.size += len(line.text) + 64
        while entry.size > self._keep_bytes and len(entry.lines) > 1:
            entry.size -= len(entry.lines.popleft().text) + 64
        for follower in entry.followers:
            follower.offer(line)

    def tail(
        self, function: str, limit: int, *, instance: str | None = None, invocation: str | None = None
    ) -> list[LogLine]:
        """The last lines of a function, oldest first, filtered."""
        entry = self._functions.get(function)
        if entry is None or limit <= 0:
            return []
        found: list[LogLine] = []
        for line in reversed(entry.lines):
            if (instance is None or line.instance == instance) and (
                invocation is None or line.invocation == invocation
            ):
                found.append(line)
                if len(found) == limit:
                    break
        found.reverse()
        return found

    @contextlib.contextmanager
    def subscribe(self, function: str) -> Iterator[Follower]:
        """Follow a function's lines from now on, whether it exists yet or not."""
        entry = self._functions.setdefault(function, _FunctionLines())
        follower = Follower()
        if self._ended:
            follower.end()
        entry.followers.add(follower)
        try:
            yield follower
        finally:
            entry.followers.discard(follower)
            follower.lines.close()
            if not entry.followers and not entry.lines and self._functions.get(function) is entry:
                del self._functions[function]  # it was removed meanwhile, or never there

    def end(self) -> None:
        """End every subscription, those to come too: the daemon goes down."""
        self._ended = True
        for entry in self._functions.values():
            for follower in entry.followers:
                follower.end()

    def forget(self, function: str) -> None:
        """A function was removed. Followers stay subscribed to the name."""
        entry = self._functions.get(function)
        if entry is not None:
            if entry.followers:
                entry.lines.clear()
                entry.size = 0
            else:
                del self._functions[function]
