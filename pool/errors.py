"""Errors of the pool. Each says what was wrong and what to do; the gateway gives them their status codes."""

from __future__ import annotations

from scheduler.model import RejectReason


class PoolError(Exception):
    """Base. `code` is stable and for programs; `message` is for people; `hint` says what to do."""

    code = "pool_error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BackendUnavailable(PoolError):
    """The engine does not answer, or the kernel refuses what the backend needs."""

    code = "backend_unavailable"


class ArtifactError(PoolError):
    """The image or the code cannot be used: does not exist, no permission, no bootstrap, bootstrap not executable."""

    code = "artifact_error"


class StartError(PoolError):
    """An instance could not be prepared. `log_tail`: the last of what it printed (bytes decoded, at most 4 KB).
    `permanent`: trying again cannot help. `backend_fault`: the engine's fault, not the function's."""

    code = "start_failed"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        log_tail: str = "",
        permanent: bool = False,
        backend_fault: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.log_tail = log_tail
        self.permanent = permanent
        self.backend_fault = backend_fault


class Rejected(PoolError):
    """The scheduler refused the invocation."""

    code = "rejected"

    def __init__(self, reason: RejectReason, retry_after_s: float | None, detail: str) -> None:
        super().__init__(detail or str(reason))
        self.reason = reason
        self.retry_after_s = retry_after_s


class ExchangeError(PoolError):
    """The instance did not answer an invocation properly. `sent`: some of the request may have reached it, so it
    must not be tried on another instance."""

    code = "instance_failed"

    def __init__(self, message: str, *, sent: bool, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.sent = sent


class BadAnswer(ExchangeError):
    """The instance answered something that is not the contract's protocol."""

    code = "bad_answer"


class ChannelClosed(Exception):
    """The peer closed or reset a channel."""


class CallRefused(PoolError):
    """A contract does not take this invocation: the wrong kind, or over one of its limits. Nothing was sent, and
    the instance is as good as before. `status`: what a caller over HTTP gets."""

    code = "invalid_argument"

    def __init__(self, message: str, *, status: int = 400, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class RestartWanted(PoolError):
    """An instance asked to be replaced: a hook before freezing answered 500. Stop it like one that died."""

    code = "restart_wanted"
