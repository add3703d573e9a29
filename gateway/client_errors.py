"""What a call of the client may raise. Apart from client.py, so that poolctl --help loads no HTTP."""

from __future__ import annotations

from typing import Any

DEFAULT_HOST = "unix:///run/poold/poold.sock"


class ClientError(Exception):
    """Base of what a call may raise. `message` says what was wrong, `hint` what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadHost(ClientError):
    """The address is not one."""


class Unreachable(ClientError):
    """Nothing answers at the address, or it went away in mid-answer."""


class RequestFailed(ClientError):
    """The daemon answered with an error. `details` are its own, each a mapping."""

    def __init__(
        self, status: int, code: str, message: str, *, hint: str = "", details: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.details = details or []


def error_from(status: int, data: Any) -> RequestFailed:
    """A RequestFailed from {"error": {"code", "message", "hint"?, "details"?}}."""
    error = data.get("error") if isinstance(data, dict) else None
    if not isinstance(error, dict):
        return RequestFailed(status, "http_error", f"HTTP {status}")
    details = [entry for entry in error.get("details", []) if isinstance(entry, dict)]
    return RequestFailed(
        status,
        str(error.get("code", "http_error")),
        str(error.get("message", f"HTTP {status}")),
        hint=str(error.get("hint", "")),
        details=details,
    )
