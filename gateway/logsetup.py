"""Where log lines go and how they look: for people on a terminal, JSON for programs, always standard error."""

from __future__ import annotations

import logging
import sys

import structlog


def set_up_logging(style: str, level: str) -> None:
    """`style`: console, json, or auto (console on a terminal, else JSON). `level`: debug, info, warning, error."""
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console),
    ]
    if console:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0))
    else:
        processors.append(structlog.processors.format_exc_info)
        processors.append(structlog.processors.JSONRenderer())
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,  # so that set_level() reaches loggers already used
    )


def set_level(level: str) -> None:
    """Log this much from now on."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(_number(level)))


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
