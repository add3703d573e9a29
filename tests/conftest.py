"""Fixtures for all rooms' tests."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Iterator

import pytest
import structlog

from scripts.engine import Engine

# A shell that runs the suite in the background has it ignore Ctrl-C, and whatever the tests start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Simulations log thousands of lines, which cost more than the simulation. A test that wants them configures its own.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(scope="session")
def docker_host(pytestconfig: pytest.Config) -> Iterator[str]:
    """Where a Docker engine answers: DOCKER_HOST, else one of the tests' own for as long as they run."""
    if host := os.environ.get("DOCKER_HOST"):
        yield host
        return
    with Engine(pytestconfig.rootpath / ".test" / "engine") as engine:
        yield engine.url


@pytest.fixture
def daemon_id() -> str:
    """A name that no other daemon on this host has."""
    return f"{secrets.token_hex(4)}-test"
