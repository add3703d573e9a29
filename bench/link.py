"""One connection of a load generator, and what a generator saw."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

import httptools

from bench.latency import Recorder

UNTOLD = "untold"  # the kind of an answer without X-Poold-Start


@dataclass(slots=True)
class Outcome:
    """What one generator saw."""

    kinds: dict[str, Recorder] = field(default_factory=dict)  # answers below 400, by start kind
    errors: dict[str, int] = field(default_factory=dict)  # connect, timeout, reset, bad_answer, status_NNN
    lateness: Recorder = field(default_factory=Recorder)  # open loop: sent after it was due with a connection free
    waited: int = 0  # open loop: due when no connection was free
    answers: int = 0  # below 400
    unfinished: int = 0  # interrupted
    elapsed_s: float = 0.0
    cpu_s: float = 0.0

    def error(self, kind: str) -> None:
        """Count one."""
        self.errors[kind] = self.errors.get(kind, 0) + 1


class Link:
    """One connection and the request on it."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.fd = -1
        self.intended_ns = 0  # 0: nothing is asked
        self.retry_ns = 0
        self.outbound = b""
        self.fresh()

    def fresh(self) -> None:
        """Forget what was parsed."""
        self.parser = httptools.HttpResponseParser(self)
        self.complete = self.head_done = self.sized = self.closing = False
        self.parsing = False  # the parser holds part of an answer
        self.kind = UNTOLD
        self.status = 0

    def on_message_begin(self) -> None:
        self.complete = self.head_done = self.sized = False
        self.kind = UNTOLD

    def on_header(self, name: bytes, value: bytes) -> None:
        length = len(name)
        if length == 13:
            if name.lower() == b"x-poold-start":
                self.kind = value.decode("latin-1")
        elif length == 14:
            self.sized = self.sized or name.lower() == b"content-length"
        elif length == 17:
            self.sized = self.sized or name.lower() == b"transfer-encoding"

    def on_headers_complete(self) -> None:
        self.head_done = True
        self.status = self.parser.get_status_code()
        self.closing = not self.parser.should_keep_alive()

    def on_message_complete(self) -> None:
        self.complete = self.status >= 200  # an interim answer is not the answer
