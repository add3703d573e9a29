"""Fixtures for all rooms' tests."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from scripts.engine import Engine


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
