"""The pool's errors as answers of the management routes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from gateway.errors import ApiError
from gateway.specfile import SpecError
from pool.errors import ArtifactError, BackendUnavailable, PoolError, Rejected, StartError

RETRY_BACKEND_S = 5.0


def unknown_function(name: str) -> ApiError:
    """404 for a function that is not deployed."""
    hint = "`poolctl ls` lists what is deployed"
    return ApiError(404, "function_not_found", f"there is no function named {name!r}", hint=hint)


def spec_fault(error: SpecError) -> ApiError:
    """400 with every problem: source, line, column, path, message, hint."""
    count = len(error.problems)
    found = ApiError(400, "invalid_spec", f"the spec has {count} problem{'s' if count != 1 else ''}")
    found.details = [
        {key: value for key, value in msgspec.to_builtins(problem).items() if value} for problem in error.problems
    ]
    return found


@contextmanager
def translated(name: str = "") -> Iterator[None]:
    """What the parts raise inside becomes an ApiError; KeyError: the function `name` went meanwhile."""
    try:
        yield
    except PoolError as exc:
        raise pool_fault(exc) from exc
    except KeyError as exc:
        raise unknown_function(name) from exc


def pool_fault(error: PoolError) -> ApiError:
    """The answer for an error of the pool: 422 when what was deployed is the cause, 503 when the engine
    or the store is."""
    if isinstance(error, BackendUnavailable) or (isinstance(error, StartError) and error.backend_fault):
        return ApiError(503, "backend_unavailable", error.message, hint=error.hint, retry_after_s=RETRY_BACKEND_S)
    if isinstance(error, Rejected):
        return ApiError(503, str(error.reason), error.message, hint=error.hint, retry_after_s=error.retry_after_s)
    status = 422 if isinstance(error, ArtifactError | StartError) else 503
    found = ApiError(status, error.code, error.message, hint=error.hint)
    if isinstance(error, StartError) and error.log_tail:
        found.details = [{"message": "what it printed last:", "log_tail": error.log_tail}]
    return found
