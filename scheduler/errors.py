"""Errors of the core."""

from __future__ import annotations


class SchedulerError(Exception):
    """Base of everything the core raises."""


class InvariantError(SchedulerError):
    """An event arrived that the present state does not allow, or a rule of the core does not hold.

    It means a bug in the caller or in the core, never bad input of a user. The state is unchanged where the
    event was refused.
    """


class ConfigurationError(SchedulerError, ValueError):
    """Limits or a policy that cannot be honoured: an unknown policy name, a negative limit."""


class JournalError(SchedulerError, ValueError):
    """A dump that is no journal, is of another version, or does not fit together."""
