"""What an instance printed: bounded, in lines, attributed to the invocation where that can be known."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pool.backends.base import Output

LINE_BYTES = 16_384  # a longer line is cut there and goes on as the next
LINES_PER_S = 2_000  # one instance may print this many lines a second for long; more are counted, not kept
LINES_BURST = 5_000
TAIL_BYTES = 4_096


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line, without its newline. `at_s` is seconds since the epoch; `invocation` is "" where unknown."""

    at_s: float
    instance: str
    invocation: str
    stream: Output
    text: str


OnLine = Callable[[LogLine], None]
ReadMarker = Callable[[str], tuple[str, bool] | None]  # a line -> (invocation, whether it begins) if it is a marker


class InstanceLog:
    """The last lines of one instance, at most `keep_bytes` of them; the oldest go first.

    A line belongs to the invocation that alone holds the instance when it arrives, or held it last; with several at a
    time only markers that the code prints can tell: a contract that knows such sets `read_marker`.
    """

    __slots__ = (
        "_allowance",
        "_allowed_at_s",
        "_bytes",
        "_claimed",
        "_held",
        "_keep_bytes",
        "_left",
        "_lines",
        "_on_line",
        "_partial",
        "_shared",
        "dropped",
        "instance",
        "read_marker",
    )

    def __init__(self, instance: str, *, keep_bytes: int = 65_536, on_line: OnLine | None = None) -> None:
        self.instance = instance
        self.dropped = 0  # lines that had to make room
        self._keep_bytes = keep_bytes
        self._on_line = on_line
        self._lines: deque[LogLine] = deque()
        self._bytes = 0
        self._partial: dict[Output, bytes] = {}
        self._allowance = float(LINES_BURST)
        self._allowed_at_s = time.monotonic()
        self._held: set[str] = set()
        self._shared = False  # several held it at a time since it was last free
        self._left = ""  # the last to hold it, until the next: output often comes after the answer
        self._claimed: str | None = None  # by a marker: what follows is this invocation's
        self.read_marker: ReadMarker | None = None

    def enter(self, invocation: str) -> None:
        """An invocation begins to use the instance."""
        if not self._held:
            self._claimed = None  # an earlier one that never printed its end
            self._left = ""
            self._shared = False
        else:
            self._shared = True
        self._held.add(invocation)

    def leave(self, invocation: str) -> None:
        """An invocation is done with the instance."""
        held = self._held
        held.discard(invocation)
        if not held and not self._shared:
            self._left = invocation

    def write(self, stream: Output, data: bytes) -> None:
        """Take bytes as they come; whole lines are kept, the rest waits for its newline or for close()."""
        data = self._partial.pop(stream, b"") + data
        *lines, rest = data.split(b"\n", self._allow(data.count(b"\n")))
        if b"\n" in rest:  # a flood must not cost the loop a step for each line
            skipped, _, rest = rest.rpartition(b"\n")
            self.dropped += skipped.count(b"\n") + 1
        for line in lines:
            self._add(stream, line)
        while len(rest) > LINE_BYTES:
            self._add(stream, rest[:LINE_BYTES])
            rest = rest[LINE_BYTES:]
        if rest:
            self._partial[stream] = rest

    def close(self) -> None:
        """The instance is gone: what waits for a newline is a line."""
        for stream, rest in list(self._partial.items()):
            self._add(stream, rest)
        self._partial.clear()

    def lines(self) -> list[LogLine]:
        """What is kept, oldest first."""
        return list(self._lines)

    def tail(self, limit_bytes: int = TAIL_BYTES) -> str:
        """The last of it as text, for an error message."""
        texts = [line.text for line in self._lines]
        texts += [rest.decode("utf-8", "replace") for rest in self._partial.values()]
        return _last_bytes("\n".join(texts), limit_bytes)

    def tail_of(self, invocation: str, limit_bytes: int = TAIL_BYTES) -> str:
        """The last of what one invocation printed, as far as it is still kept."""
        return _last_bytes("\n".join(line.text for line in self._lines if line.invocation == invocation), limit_bytes)

    def note(self, text: str) -> None:
        """Add a line of poold's own, for the function's user to find among its output."""
        self._keep(Output.STDERR, f"poold: {text}", "")

    def _allow(self, count: int) -> int:
        """How many of `count` lines may be kept now (a token bucket)."""
        now_s = time.monotonic()
        refill = (now_s - self._allowed_at_s) * LINES_PER_S
        self._allowance = min(self._allowance + refill, LINES_BURST)
        self._allowed_at_s = now_s
        allowed = min(count, int(self._allowance))
        self._allowance -= allowed
        return allowed

    def _add(self, stream: Output, line: bytes) -> None:
        for start in range(0, max(len(line), 1), LINE_BYTES):
            text = line[start : start + LINE_BYTES].rstrip(b"\r").decode("utf-8", "replace")
            marker = self.read_marker(text) if self.read_marker is not None else None
            if marker is not None:
                self._keep(stream, text, marker[0])
                if marker[1]:
                    self._claimed = marker[0]
                elif self._claimed == marker[0]:
                    self._claimed = None
            else:
                self._keep(stream, text, self._claimed or self._owner())

    def _owner(self) -> str:
        """The invocation that alone held the instance last, or holds it."""
        if not self._held:
            return self._left
        return "" if self._shared else next(iter(self._held))

    def _keep(self, stream: Output, text: str, invocation: str) -> None:
        entry = LogLine(time.time(), self.instance, invocation, stream, text)
        self._lines.append(entry)
        self._bytes += len(text) + 64
        if self._on_line is not None:
            self._on_line(entry)
        while self._bytes > self._keep_bytes and len(self._lines) > 1:
            self._bytes -= len(self._lines.popleft().text) + 64
            self.dropped += 1


def _last_bytes(text: str, limit_bytes: int) -> str:
    return text.encode()[-limit_bytes:].decode("utf-8", "ignore")
