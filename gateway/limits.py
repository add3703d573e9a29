"""What one client may cost the server."""

from __future__ import annotations

from dataclasses import dataclass, field

from pool.wire.http1 import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Times in seconds, sizes in bytes. Timeouts of clients are kept to within a second."""

    max_connections: int = 1024
    head: Limits = field(default_factory=Limits)
    max_body_bytes: int = 64 * 1024 * 1024
    head_timeout_s: float = 15.0  # from a request's first byte to the end of its head
    body_timeout_s: float = 30.0  # without a byte of the body read, or of the answer taken
    idle_timeout_s: float = 300.0  # between requests
    allowed_hosts: frozenset[bytes] = frozenset()  # empty: any
