"""One request at a time on a blocking connection, timed: for first answers, where a load generator has no place."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

import httptools

from bench.target import Target, request_bytes

READ_BYTES = 262_144


class NoAnswer(Exception):
    """The connection failed, or what came back was not an HTTP answer."""


@dataclass(slots=True)
class Answer:
    """What came back; `latency_ms` is from before the send to the last byte."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # lower-case names
    body: bytes = b""
    latency_ms: float = 0.0
    complete: bool = False
    keep_alive: bool = False

    @property
    def kind(self) -> str:
        """The start kind, "" when there is none."""
        return self.headers.get("x-poold-start", "")

    @property
    def stages(self) -> dict[str, float]:
        """Server-Timing's durations in milliseconds, in order."""
        return parse_stages(self.headers.get("server-timing", ""))


def parse_stages(text: str) -> dict[str, float]:
    """`queue;dur=0.1, run;dur=2` as {"queue": 0.1, "run": 2.0}; what is no duration is left out."""
    found: dict[str, float] = {}
    for entry in text.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "dur":
                try:
                    found[name] = float(value.strip('" '))
                except ValueError:
                    continue
    return found


class Parsed:
    """One answer as it is parsed."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.parts: list[bytes] = []
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answer.status = self.parser.get_status_code()
        self.answer.keep_alive = self.parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        self.answer.complete = self.answer.status >= 200


class Asker:
    """A kept-alive connection that is made when it is needed, before the clock runs."""

    def __init__(self, target: Target, timeout_s: float = 60.0) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._sock: socket.socket | None = None

    def connect(self) -> None:
        """Connect, unless it is connected. Raises OSError."""
        if self._sock is not None:
            return
        sock = self.target.connect(self.timeout_s)
        sock.settimeout(self.timeout_s)
        self._sock = sock

    def ask(self, method: str, path: str, body: bytes = b"", headers: tuple[tuple[str, str], ...] = ()) -> Answer:
        """One exchange. Raises NoAnswer."""
        target = Target(self.target.family, self.target.address, self.target.host, path)
        request = request_bytes(target, method, list(headers), body)
        try:
            self.connect()
            return self._exchange(request)
        except (OSError, httptools.HttpParserError) as exc:
            self.close()
            raise NoAnswer(f"{method} {path}: {exc or type(exc).__name__}") from exc

    def _exchange(self, request: bytes) -> Answer:
        sock = self._sock
        assert sock is not None
        parsed = Parsed()
        answer = parsed.answer
        began = time.perf_counter_ns()
        sock.sendall(request)
        while not answer.complete:
            data = sock.recv(READ_BYTES)
            if not data:
                if "content-length" in answer.headers or "transfer-encoding" in answer.headers or not answer.status:
                    raise OSError("the connection was closed without a whole answer")
                answer.complete = True
                answer.keep_alive = False
                break
            parsed.parser.feed_data(data)
        answer.latency_ms = (time.perf_counter_ns() - began) / 1e6
        answer.body = b"".join(parsed.parts)
        if not answer.keep_alive:
            self.close()
        return answer

    def close(self) -> None:
        """Close the connection; the next ask makes a new one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
