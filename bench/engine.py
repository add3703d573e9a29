"""The load generator itself: one thread, raw epoll, prepared bytes.

Not trio: the generator shares the machine with what it measures, and a bare epoll loop costs it a third of the time
per request. It runs in its own process or thread, and talks to nobody while it runs.
"""

from __future__ import annotations

import ctypes
import errno
import re
import select
import socket
import time
from collections.abc import Callable

import httptools

from bench.latency import Recorder
from bench.link import UNTOLD, Link, Outcome
from bench.pacing import SECOND_NS, Pace, share
from bench.target import Plan, Target, parse_target, request_bytes

READ_BYTES = 262_144
TICK_NS = 100_000_000  # how often time-outs are looked for and progress is told
RETRY_NS = 50_000_000  # a connection that could not be made rests this long
CONNECT_TIMEOUT_S = 5.0
PR_SET_TIMERSLACK = 29  # prctl(2)
MAX_KINDS = 16  # the header is the target's: it shall not fill our memory

# What an ordinary answer's head says: its length and start kind; or a sign that it is not ordinary.
FIELDS = re.compile(
    rb"\n(?:(content-length|x-poold-start): *([a-z0-9]+) *\r|(?:transfer-encoding|connection|content-length) *:)",
    re.IGNORECASE,
).findall

OnProgress = Callable[[Outcome], None]


class Engine:
    """Runs one plan. `stop()` may be called from a signal or another thread."""

    def __init__(self, plan: Plan, on_progress: OnProgress | None = None) -> None:
        """Raises BadTarget."""
        self.plan = plan
        self.target: Target = parse_target(plan.url)
        self.request = request_bytes(self.target, plan.method, plan.headers, plan.body)
        self.headless = plan.method == "HEAD"
        self.outcome = Outcome()
        self.on_progress = on_progress
        self.timeout_ns = round(plan.timeout_s * SECOND_NS)
        self.links = [Link() for _ in range(max(1, share(plan.connections, plan.index, plan.count)))]
        self.by_fd: dict[int, Link] = {}
        self.idle: list[Link] = []
        self.down: list[Link] = []
        self.taken = 0  # requests begun
        self.limit = share(plan.requests, plan.index, plan.count) if plan.requests is not None else None
        self.end_ns: int | None = None
        self.pace: Pace | None = None
        self.poll = select.epoll()
        self.stopping = False

    def stop(self) -> None:
        """End the run soon; what is on its way is not waited for."""
        self.stopping = True

    def run(self, start_ns: int | None = None) -> Outcome:
        """Carry out the plan; `start_ns` on the monotonic clock lets several processes start together."""
        cpu_s = time.process_time()
        try:
            self._preconnect()
            start = time.monotonic_ns() if start_ns is None else max(start_ns, time.monotonic_ns())
            while not self.stopping and (rest := start - time.monotonic_ns()) > 0:
                time.sleep(min(rest, TICK_NS) / SECOND_NS)
            self._begin(start)
            self._loop(start)
        finally:
            self.outcome.unfinished = sum(1 for link in self.links if link.intended_ns)
            for link in self.links:
                self._close(link)
            self.poll.close()
            self.outcome.cpu_s = time.process_time() - cpu_s
        return self.outcome

    def _begin(self, start: int) -> None:
        plan = self.plan
        if plan.duration_s is not None:
            self.end_ns = start + round(plan.duration_s * SECOND_NS)
        if plan.rate is not None:
            self.pace = Pace(plan.rate, start, plan.index, plan.count)
            if plan.duration_s is not None:
                total = self.pace.total(plan.duration_s)
                self.limit = total if self.limit is None else min(total, self.limit)

    def _loop(self, start: int) -> None:
        tick = start + TICK_NS
        now = time.monotonic_ns()
        closed = self.pace is None
        while not self.stopping:
            if now >= tick:
                tick = now + TICK_NS
                self._look_after(now)
                self.outcome.elapsed_s = (now - start) / SECOND_NS
                if self.on_progress is not None:
                    self.on_progress(self.outcome)
            if closed and not self.idle and not self.down:
                events = self.poll.poll((tick - now) / SECOND_NS)  # the usual case: every connection is busy
            else:
                due = self._dispatch(now)
                if due is None and len(self.idle) + len(self.down) == len(self.links):
                    break
                events = self._wait(tick if due is None else min(tick, due))
            for fd, event in events:
                link = self.by_fd.get(fd)
                if link is not None:
                    self._on_event(link, event)
            now = time.monotonic_ns()
        self.outcome.elapsed_s = (time.monotonic_ns() - start) / SECOND_NS

    def _wait(self, until_ns: int) -> list[tuple[int, int]]:
        # epoll's own time-out has whole milliseconds; select has microseconds, and an epoll can be selected.
        if self.pace is not None and (rest := until_ns - time.monotonic_ns()) > 0:
            select.select([self.poll], [], [], rest / SECOND_NS)
            return self.poll.poll(0)
        return self.poll.poll(max(0.0, (until_ns - time.monotonic_ns()) / SECOND_NS))

    # What is to be sent

    def _take(self, now: int) -> int | None:
        """When the next request was due, if it is; it is taken."""
        if self.limit is not None and self.taken >= self.limit:
            return None
        if self.pace is None:
            if self.end_ns is not None and now >= self.end_ns:
                return None
            self.taken += 1
            return now
        due = self.pace.due_ns(self.taken)
        if due > now:
            return None
        self.taken += 1
        return due

    def _next_due(self, now: int) -> int | None:
        """When something is to be sent next; None when nothing more is."""
        if self.limit is not None and self.taken >= self.limit:
            return None
        if self.pace is None:
            return now if self.end_ns is None or now < self.end_ns else None
        return self.pace.due_ns(self.taken)

    def _dispatch(self, now: int) -> int | None:
        """Send what is due on what is free. Returns when to come back for the next; None: nothing is left to send."""
        while self.idle:
            intended = self._take(now)
            if intended is None:
                return self._next_due(now)
            link = self.idle.pop()
            if self.pace is not None:
                self.outcome.lateness.record(now - intended)
            self._send(link, intended)
            now = time.monotonic_ns()
        for link in [link for link in self.down if link.retry_ns <= now]:
            intended = self._take(now)
            if intended is None:
                return self._next_due(now)
            self.down.remove(link)
            self._connect(link, intended)
        due = self._next_due(now)
        if due is None:
            return None
        if self.pace is not None and due <= now - self.timeout_ns:
            self._give_up(now)
        # Everything is busy: an answer or a connection's rest will wake us.
        return max(due, min((link.retry_ns for link in self.down), default=now + TICK_NS))

    def _give_up(self, now: int) -> None:
        """Requests that waited their whole time for a connection."""
        while (due := self._next_due(now)) is not None and due <= now - self.timeout_ns:
            self.taken += 1
            self.outcome.waited += 1
            self.outcome.error("timeout")

    # Connections

    def _preconnect(self) -> None:
        """Connections are made before the clock starts; once one fails the rest are left for later."""
        for link in self.links:
            self.down.append(link)
        while self.down and not self.stopping:
            try:
                sock = self.target.connect(min(CONNECT_TIMEOUT_S, self.plan.timeout_s))
            except OSError:
                return
            link = self.down.pop()
            self._attach(link, sock, select.EPOLLIN)
            self.idle.append(link)

    def _attach(self, link: Link, sock: socket.socket, events: int) -> None:
        link.sock, link.fd = sock, sock.fileno()
        link.fresh()
        self.by_fd[link.fd] = link
        self.poll.register(link.fd, events)

    def _connect(self, link: Link, intended: int) -> None:
        sock = self.target.open()
        sock.setblocking(False)
        link.intended_ns = intended
        link.outbound = self.request
        code = sock.connect_ex(self.target.address)
        self._attach(link, sock, select.EPOLLOUT)
        if code not in (0, errno.EINPROGRESS):
            self._fail(link, "connect")

    def _close(self, link: Link) -> None:
        if link.sock is not None:
            self.by_fd.pop(link.fd, None)
            link.sock.close()  # which takes it out of the epoll
            link.sock = None
        link.intended_ns = 0
        link.outbound = b""

    def _fail(self, link: Link, kind: str) -> None:
        """The request on this link failed, and its connection with it."""
        now = time.monotonic_ns()
        if link.intended_ns:
            self.outcome.error(kind)
        elif link in self.idle:
            self.idle.remove(link)
        self._close(link)
        link.retry_ns = now + RETRY_NS if kind == "connect" else 0
        self.down.append(link)

    def _look_after(self, now: int) -> None:
        """End what has taken too long."""
        for link in self.links:
            if link.intended_ns and link.intended_ns + self.timeout_ns <= now:
                self._fail(link, "timeout")

    # One exchange

    def _send(self, link: Link, intended: int) -> None:
        sock = link.sock
        assert sock is not None
        # A closed loop's request is due when it is sent: our own bookkeeping is none of the target's time.
        link.intended_ns = time.monotonic_ns() if self.pace is None else intended
        try:
            sent = sock.send(self.request)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._fail(link, "reset")
            return
        if sent < len(self.request):
            link.outbound = self.request[sent:]
            self.poll.modify(link.fd, select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, link: Link) -> bool:
        """Send the rest. False when the connection failed."""
        assert link.sock is not None
        code = link.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        first = len(link.outbound) == len(self.request)
        try:
            if code:
                raise OSError(code, "")
            sent = link.sock.send(link.outbound)
        except BlockingIOError:
            return True
        except OSError:
            self._fail(link, "connect" if first else "reset")
            return False
        link.outbound = link.outbound[sent:]
        self.poll.modify(link.fd, select.EPOLLIN | (select.EPOLLOUT if link.outbound else 0))
        return True

    def _on_event(self, link: Link, event: int) -> None:
        sock = link.sock
        assert sock is not None
        if link.outbound and (not self._flush(link) or not event & select.EPOLLIN):
            return
        try:
            data = sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._fail(link, "reset")
            return
        now = time.monotonic_ns()
        if link.intended_ns and not link.parsing:
            kind = self.usual(data)
            if kind is not None:
                self._answered(link, kind, now)
                return
        link.parsing = True
        try:
            if data and link.intended_ns:
                link.parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(link, "bad_answer")
            return
        if link.head_done and self.headless and link.status >= 200:
            link.complete = True
        if not data:
            if not (link.head_done and not link.sized and link.intended_ns):
                self._fail(link, "reset")
                return
            link.complete = link.closing = True  # an answer that ends with its connection
        if link.complete:
            if link.status >= 400:
                self._refused(link, now)
            else:
                self._answered(link, link.kind, now)

    def usual(self, data: bytes) -> str | None:
        """The start kind of a whole 200 answer in `data`; None for anything else, which the parser then sees."""
        if self.headless or not data.startswith(b"HTTP/1.1 200 "):
            return None
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return None
        kind = UNTOLD
        length = -1
        for name, value in FIELDS(data, 0, end + 2):
            if not name:
                return None
            if len(name) == 14:
                if not value.isdigit():
                    return None
                length = int(value) if length < 0 else -2
            else:
                kind = value.decode("latin-1")
        return kind if len(data) == end + 4 + length and length >= 0 else None

    def _answered(self, link: Link, kind: str, now: int) -> None:
        """Count an answer, and go on."""
        outcome = self.outcome
        recorder = outcome.kinds.get(kind)
        if recorder is None:
            kind = kind if len(outcome.kinds) < MAX_KINDS else UNTOLD
            recorder = outcome.kinds.setdefault(kind, Recorder())
        recorder.record(now - link.intended_ns)
        outcome.answers += 1
        self._next(link, now)

    def _refused(self, link: Link, now: int) -> None:
        """Count an answer with an error status, and go on. Its latency would flatter."""
        self.outcome.error(f"status_{link.status}")
        self._next(link, now)

    def _next(self, link: Link, now: int) -> None:
        """Send the next request on the same connection, when there is one and the connection is good."""
        link.intended_ns = 0
        if link.parsing:
            if link.closing:
                self._close(link)
                link.retry_ns = 0
                self.down.append(link)
                return
            link.fresh()
        intended = self._take(now)
        if intended is None:
            self.idle.append(link)
            return
        if self.pace is not None:
            self.outcome.waited += 1
        self._send(link, intended)


def sleep_precisely() -> None:
    """Ask the kernel for timers without slack in this thread: by default each may be 50 µs late."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
