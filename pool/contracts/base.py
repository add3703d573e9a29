"""The protocol of a contract: how the code inside an instance is prepared, spoken to and told to rest.

A Contract is stateless and one per kind; a Session is its state with one instance. Push contracts (the code
listens, see push.py) and pull contracts (the code asks) fit the same protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pool.backends.base import Running
from pool.errors import StartError
from pool.logs import InstanceLog
from pool.spec import FunctionSpec, Revision

Headers = list[tuple[bytes, bytes]]  # names as received, in order


class BodySource(Protocol):
    """The rest of a body that did not come with its head."""

    async def receive(self) -> bytes:
        """The next bytes; b"" at the end. Raises ExchangeError (from an instance) or ClientGone (from a caller)."""


@dataclass(slots=True)
class Call:
    """One invocation on its way into an instance.

    `event`: an event with its body, else an HTTP request passed through. `body` is whole unless `stream` is set;
    then the rest comes from there (and `length` is the whole length where the caller declared it, else None).
    """

    id: str
    method: bytes
    target: bytes  # path and query, as the code shall see them
    headers: Headers
    body: bytes = b""
    stream: BodySource | None = None
    length: int | None = None
    event: bool = False
    base_path: bytes = b""  # what was cut off the path in front of target
    client_ip: bytes = b""
    retry_count: int = 0


@dataclass(slots=True)
class Reply:
    """What came back. `body` is whole unless `stream` is set; the lease must be held until the stream's end.

    `function_error`: None for success, else why the contract calls it the function's failure (its status may
    still be 200)."""

    status: int
    headers: Headers
    body: bytes = b""
    stream: BodySource | None = None
    function_error: str | None = None
    length: int | None = None  # of the whole body, where the instance declared it


@dataclass(slots=True)
class Link:
    """What a session gets to work with."""

    revision: Revision
    running: Running
    port: int
    log: InstanceLog
    adopted: bool = False  # an earlier daemon prepared it: what runs once per instance has run
    stages: dict[str, float] = field(default_factory=dict)  # prepare() adds "connect" and "init", in seconds


class Session(Protocol):
    """A contract's dealings with one instance."""

    async def prepare(self) -> None:
        """Return when the code can serve: listening or asking, connected, initialised. The caller sets the time
        limit by cancelling. Raises StartError."""

    async def exchange(self, call: Call) -> Reply:
        """Carry out one invocation; at most spec.concurrency at a time.

        Raises ExchangeError (`sent` says whether the instance may have seen it), BadAnswer. Cancelled: the
        connection used is closed, and the instance should not be trusted with another invocation if bytes were
        sent.
        """

    async def before_freeze(self) -> None:
        """The hook before freezing; bounded; its failures are only logged. May be cancelled at any point.

        Raises RestartWanted when the code asked to be replaced: do not freeze it, stop it.
        """

    async def after_freeze(self) -> None:
        """Called while the code is frozen, before it is thawed again. Short; raises nothing of its own.

        Servers count the rest of a connection in wall-clock time, so many close one right at the thaw, under the
        request. A push session replaces its connections here by one the code has not accepted yet, whose time has
        not begun: the kernel completes the handshake without the code.
        """

    async def before_stop(self) -> None:
        """The hook before a stop; bounded; its failures are only logged."""

    def close(self) -> None:
        """Close every connection now."""


class Contract(Protocol):
    """One way of speaking to code."""

    name: str
    default_port: int
    code_target: str  # where a code directory appears inside the instance

    def check(self, spec: FunctionSpec) -> list[tuple[str, str]]:
        """What in the spec cannot work under this contract: (path such as "env.FC_X", problem) pairs."""

    def environment(self, spec: FunctionSpec, instance_id: str, port: int) -> dict[str, str]:
        """The contract's own variables; the user's are added by the caller and win unless check() refuses them."""

    def check_call(self, spec: FunctionSpec, call: Call) -> None:
        """Whether the contract takes this invocation; to be asked before a slot is taken. Raises CallRefused."""

    def session(self, link: Link) -> Session:
        """A session with one instance, not yet prepared."""

    def start_error(self, spec: FunctionSpec, why: str, log_tail: str) -> StartError:
        """The error for code that was started and did not become ready, in the contract's own words."""
