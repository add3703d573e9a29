"""Errors as the gateway's clients see them."""

from __future__ import annotations

import msgspec


class ApiError(Exception):
    """An answer with an error status: `code` is stable and for programs, `message` and `hint` are for people."""

    def __init__(
        self, status: int, code: str, message: str, *, hint: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.details: list[dict[str, object]] = []

    def body(self) -> bytes:
        """{"error": {"code", "message", "hint"?, "retry_after_s"?, "details"?}} as JSON."""
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.hint:
            error["hint"] = self.hint
        if self.retry_after_s is not None:
            error["retry_after_s"] = round(self.retry_after_s, 3)
        if self.details:
            error["details"] = self.details
        return msgspec.json.encode({"error": error}) + b"\n"


class ClientGone(Exception):
    """The client closed its connection before its request was answered."""
