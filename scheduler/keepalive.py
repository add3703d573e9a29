"""Keep-alive policies: how long an idle instance above the floor stays, and which goes first for its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from scheduler.errors import ConfigurationError
from scheduler.model import RevisionSpec


@dataclass(frozen=True, slots=True)
class IdleFacts:
    """What a policy may know of one idle instance. Times on the clock of `now`."""

    last_used: float  # when its last lease ended, or it became ready
    uses: int
    memory_mb: int


class Policy(Protocol):
    """A pure chooser. Policies that size pools from arrivals come beside these, with the same registry."""

    def keep_s(self, spec: RevisionSpec) -> float:
        """Seconds after the last use at which an idle instance stops; inf: never by time alone."""

    def rank(self, facts: IdleFacts) -> float:
        """Order of eviction when memory is needed: the lowest goes first. Compared across functions."""


class Ttl:
    """A fixed keep-alive after the last use, as most platforms have it; under pressure the least recently
    used goes first."""

    def keep_s(self, spec: RevisionSpec) -> float:
        return spec.keepalive_s

    def rank(self, facts: IdleFacts) -> float:
        return facts.last_used


class Lru:
    """Nothing expires: an instance stays until its memory is needed and it is the least recently used."""

    def keep_s(self, spec: RevisionSpec) -> float:
        return math.inf

    def rank(self, facts: IdleFacts) -> float:
        return facts.last_used


REGISTRY: dict[str, Policy] = {"ttl": Ttl(), "lru": Lru()}


def policy_named(name: str) -> Policy:
    """The policy of that name. Raises ConfigurationError with the names there are."""
    policy = REGISTRY.get(name)
    if policy is None:
        raise ConfigurationError(f"unknown keep-alive policy {name!r}: known are {', '.join(sorted(REGISTRY))}")
    return policy
