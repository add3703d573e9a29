"""Waiting in the end-to-end tests: for what is seen from outside, with a bound, and beside other calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

WAIT_S = 20.0  # a bound, not a guess: nothing that goes well comes near it
POLL_S = 0.01

T = TypeVar("T")


def wait_until(look: Callable[[], T], wanted: Callable[[T], bool], *, what: str = "it", timeout_s: float = WAIT_S) -> T:
    """Look until it is as wanted; what was seen then. Fails with what was seen last."""
    deadline_s = time.monotonic() + timeout_s
    while not wanted(seen := look()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}; now: {seen}"
        time.sleep(POLL_S)
    return seen


@contextlib.contextmanager
def background() -> Iterator[Callable[..., Future[Any]]]:
    """Calls beside the test: `with background() as begin: future = begin(poold.ask, "f")`. Ends when all have."""
    with ThreadPoolExecutor(max_workers=32) as threads:
        yield threads.submit
