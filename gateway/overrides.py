"""The command line's say over the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from gateway.config import Config, ConfigError, faults
from gateway.shape import Problem, written

# Option -> section and key.
PLACES = {
    "state_dir": ("daemon", "state_dir"),
    "backend": ("daemon", "backend"),
    "log_level": ("daemon", "log_level"),
    "socket": ("http", "socket"),
    "listen": ("http", "listen"),
}


def override(config: Config, options: dict[str, Any]) -> Config:
    """The configuration with the options given in place of its keys; paths are made absolute. Raises ConfigError."""
    for option, value in options.items():
        section, key = PLACES[option]
        if isinstance(value, Path):
            value = str(value.absolute())
        changed = msgspec.structs.replace(getattr(config, section), **{key: value})
        config = msgspec.structs.replace(config, **{section: changed})
    problems = [Problem("command line", 0, 0, written(path), message, hint) for path, message, hint in faults(config)]
    if problems:
        raise ConfigError(problems)
    return config
