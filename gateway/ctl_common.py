"""What poolctl's commands share: the session, tables, and how an error becomes a message and an exit code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

    from gateway.client import Client
    from gateway.client_errors import ClientError

EXIT_FAILED = 1  # the function or the request failed
EXIT_USAGE = 2  # click's own
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # as a shell shows a program ended by SIGPIPE

STATE_COLOURS = {
    "ready": "green",
    "idle": "cyan",
    "busy": "yellow",
    "frozen": "blue",
    "starting": "magenta",
    "stopping": "bright_black",
    "removing": "bright_black",
    "empty": "bright_black",
    "failing": "red",
}
FLEXIBLE_LEAST = 8  # characters that a column which may be cut keeps

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Session:
    """The global options; `--json` may stand before or after the command's name."""

    host: str
    json: bool = False

    @property
    def client(self) -> Client:
        """A client of the chosen daemon. Raises BadHost."""
        from gateway.client import Client

        return Client(self.host)


def session_command(function: F) -> F:
    """Give a command the session as its first argument, and its own --json."""
    passed: Any = click.make_pass_decorator(Session)(function)
    return cast(F, json_option(passed))


def json_option(function: F) -> F:
    """`--json` after the command's name."""
    return click.option(
        "--json", "_json", is_flag=True, expose_value=False, callback=_set_json, help="Print JSON for programs."
    )(function)


def _set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    session = ctx.find_object(Session)
    if value and session is not None:
        session.json = True


def name_argument(function: F) -> F:
    """NAME: a deployed function, completed by asking the daemon."""
    return click.argument("name", shell_complete=complete_name)(function)


def names_argument(function: F) -> F:
    """NAME...: deployed functions."""
    return click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)(function)


def complete_name(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The deployed functions whose names begin so; none when the daemon does not answer at once."""
    from click.shell_completion import CompletionItem

    from gateway.client import Client
    from gateway.client_errors import ClientError

    session = ctx.find_object(Session)
    host = session.host if session is not None else ctx.find_root().params["host"]
    try:
        rows = Client(host, timeout_s=1).call("GET", "/v1/functions")["functions"]
    except ClientError:
        return []
    return [CompletionItem(row["name"]) for row in rows if row["name"].startswith(incomplete)]


# --- output -----------------------------------------------------------------------------------------------


def print_json(data: Any) -> None:
    """One JSON document, indented, on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column. `flexible`: may be cut with an ellipsis where the terminal is narrow."""

    title: str
    right: bool = False
    flexible: bool = False
    state: bool = False  # coloured by STATE_COLOURS


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Columns without borders: coloured and fitted on a terminal, plain and whole in a pipe."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table_lines(columns, list(rows), width):
        click.echo(line)


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """The table's lines, aligned. `width`: a terminal's; flexible columns are cut to it, states are coloured."""
    titles = [column.title for column in columns]
    widths = [max(len(row[at]) for row in [titles, *rows]) for at in range(len(columns))]
    if width is not None:
        for at, column in enumerate(columns):
            excess = sum(widths) + 2 * (len(widths) - 1) - width
            if column.flexible and excess > 0:
                widths[at] = max(widths[at] - excess, FLEXIBLE_LEAST)
    lines = []
    for number, row in enumerate([titles, *rows]):
        cells = [_cell(text, size, column) for text, size, column in zip(row, widths, columns, strict=True)]
        if width is not None:
            cells = [
                click.style(cell, bold=True) if number == 0 else _coloured(cell, column)
                for cell, column in zip(cells, columns, strict=True)
            ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _cell(text: str, size: int, column: Column) -> str:
    if len(text) > size:
        text = text[: size - 1] + "…"
    return text.rjust(size) if column.right else text.ljust(size)


def _coloured(cell: str, column: Column) -> str:
    colour = STATE_COLOURS.get(cell.strip()) if column.state else None
    return click.style(cell, fg=colour) if colour else cell


def console(*, stderr: bool = False) -> Console:
    """A rich console that marks up and highlights nothing by itself."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0) + 1
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for name, value in shown:
        first, *more = _wrapped(value, room - width - 1) if room else value.split("\n")
        label = click.style(f"{name}:".ljust(width + 1), bold=True)
        click.echo(f"{label} {first}")
        for line in more:
            click.echo(f"{' ' * (width + 1)} {line}")


def _wrapped(text: str, room: int) -> list[str]:
    import textwrap

    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(line, max(room, 20), subsequent_indent=indent, break_on_hyphens=False) or [""]
    return lines


# --- numbers for people -----------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """35 µs, 1.2 ms, 3.4 s, 5m 10s, 3h 4m, 2d 3h; - for None."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else age(seconds)


def age(seconds: float | None) -> str:
    """12s, 5m 10s, 3h 4m, 2d 3h; - for None."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"


def count(number: int) -> str:
    """999, 12.3k, 4.5M: short enough for a column."""
    if number < 10_000:
        return str(number)
    if number < 1_000_000:
        return f"{number / 1000:.1f}k"
    return f"{number / 1_000_000:.1f}M"


def megabytes(value: float | None) -> str:
    """12 MB, 1.5 GB; - for None."""
    if value is None:
        return "-"
    return f"{value:.0f} MB" if value < 1000 else f"{value / 1024:.1f} GB"


def size(length: int) -> str:
    """12 KB, 3.4 MB: of a transfer."""
    return f"{length / 1e6:.1f} MB" if length >= 1_000_000 else f"{-(-length // 1000)} KB"


# --- errors -----------------------------------------------------------------------------------------------


def print_error(message: str, *, hint: str = "", details: Sequence[dict[str, Any]] = ()) -> None:
    """An error on stderr: what, where, what to do."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    for entry in details:
        click.echo(f"  {detail_line(entry)}", err=True)
        for line in str(entry.get("log_tail", "")).splitlines():
            click.echo(f"    | {line}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan', bold=True)} {hint}", err=True)


def detail_line(entry: dict[str, Any]) -> str:
    """One of an error's details: "FILE:LINE: PATH: message (hint)", as far as they are known."""
    place = str(entry.get("source") or "")
    if entry.get("line"):
        place = f"{place}:{entry['line']}" if place else f"line {entry['line']}"
    parts = [place, str(entry.get("path") or ""), str(entry.get("message") or "")]
    shown = ": ".join(part for part in parts if part)
    if entry.get("hint"):
        shown += f" ({entry['hint']})"
    return shown or ("what it printed last:" if entry.get("log_tail") else "")


def exit_code(error: ClientError) -> int:
    """The exit code that an error of the client means."""
    from gateway.client_errors import BadHost, RequestFailed, Unreachable

    if isinstance(error, Unreachable):
        return EXIT_UNREACHABLE
    if isinstance(error, BadHost):
        return EXIT_USAGE
    if isinstance(error, RequestFailed) and error.status == 404:
        return EXIT_NOT_FOUND
    return EXIT_FAILED


def report(error: ClientError) -> int:
    """Show an error of the client; returns its exit code."""
    from gateway.client_errors import RequestFailed

    details = error.details if isinstance(error, RequestFailed) else []
    print_error(error.message, hint=error.hint, details=details)
    return exit_code(error)
