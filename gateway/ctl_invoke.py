"""poolctl invoke: one invocation, its answer on standard output."""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import IO, TYPE_CHECKING, Any

import click

from gateway.ctl_common import (
    EXIT_FAILED,
    Session,
    duration,
    name_argument,
    print_error,
    print_json,
    session_command,
)

if TYPE_CHECKING:
    from gateway.client import Answer

START_HEADER = "X-Poold-Start"
ERROR_HEADER = "X-Poold-Function-Error"


@click.command(
    epilog="""\b
Without --path the data is an event for the function; with it an HTTP request is
passed through to the function's own server. Data piped into poolctl is sent when
neither -d nor -f is given. The exit code is 1 when the function failed.
\b
Examples:
  poolctl invoke hello -d '{"name": "world"}'
  echo '{"a": 1}' | poolctl invoke hello
  poolctl invoke hello -i                       with status, headers and stage times
  poolctl invoke web --path /items?n=3          GET /items?n=3
  poolctl invoke web -X PUT --path /items/1 -f item.json --header 'Content-Type: application/json'
"""
)
@name_argument
@click.option("-d", "-e", "--data", help="The event or body, as text.")
@click.option("-f", "--file", "source", type=click.File("rb"), help="A file with it; - for standard input.")
@click.option(
    "-X", "--request", "method", metavar="METHOD", help="The HTTP method (with --path). [default: GET, with data POST]"
)
@click.option("--path", metavar="/PATH", help="Pass an HTTP request through to this path of the function.")
@click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="A request header; repeatable.")
@click.option("-i", "--include", is_flag=True, help="Show status, headers, start kind and stage times too.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Wait so long at most. [default: as long as poold lets it run]",
)
@session_command
@click.pass_context
def invoke(
    ctx: click.Context,
    session: Session,
    name: str,
    data: str | None,
    source: IO[bytes] | None,
    method: str | None,
    path: str | None,
    headers: tuple[str, ...],
    include: bool,
    timeout_s: float | None,
) -> None:
    """Invoke a function and print its answer."""
    from gateway.client import function_path

    if data is not None and source is not None:
        raise click.UsageError("give --data or --file, not both")
    if method is not None and path is None:
        raise click.UsageError("--request goes with --path: an event has no method")
    body = _body(data, source)
    sent = [_header(text) for text in headers]
    if path is None:
        method, target = "POST", function_path(name, "invoke")
    else:
        method, target = (method or ("GET" if body is None else "POST")).upper(), _pass_through(name, path)
    if body is None and method in ("POST", "PUT", "PATCH"):
        body = b""
    if body is not None and not any(key.lower() == "content-type" for key, _ in sent):
        sent.append(("Content-Type", "application/octet-stream" if not isinstance(body, bytes) else _guess(body)))
    client = session.client
    patient = timeout_s is None  # poold knows the function's limit and keeps it
    with client.request(
        method, target, body=body, headers=sent, length=_length(body), timeout_s=timeout_s, patient=patient
    ) as answer:
        if answer.status >= 400 and not answer.header(START_HEADER):
            raise answer.failure()  # poold's own words: no instance answered
        if session.json:
            _show_json(answer)
        else:
            _show(answer, include)
        ctx.exit(_verdict(name, answer, quiet=session.json))


def _body(data: str | None, source: IO[bytes] | None) -> bytes | IO[bytes] | None:
    if data is not None:
        return data.encode()
    if source is not None:
        return source
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return None
    # A pipe or a file was put there on purpose; a terminal, a socket or /dev/null was not.
    return sys.stdin.buffer if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else None


def _length(body: bytes | IO[bytes] | None) -> int | None:
    """What a file has left, so that it is not sent in chunks: not every function's server reads those."""
    if body is None or isinstance(body, bytes):
        return None
    try:
        found = os.fstat(body.fileno())
        return max(0, found.st_size - body.tell()) if stat.S_ISREG(found.st_mode) else None
    except (OSError, ValueError):
        return None


def _guess(body: bytes) -> str:
    return "application/json" if body[:1] in (b"{", b"[", b'"') else "application/octet-stream"


def _pass_through(name: str, path: str) -> str:
    from urllib.parse import quote

    if not path.startswith("/"):
        raise click.BadParameter(f"{path!r} does not begin with /", param_hint="--path")
    return f"/fn/{quote(name, safe='')}{quote(path, safe='/?&=%:@!$()*+,;~-._')}"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name.strip()):
        raise click.BadParameter(f"{text!r} is not 'NAME: VALUE'", param_hint="--header")
    return name.strip(), value.strip()


def _show(answer: Answer, include: bool) -> None:
    if include:
        click.echo(f"HTTP {answer.status} {answer.reason}")
        for key, value in answer.headers:
            click.echo(f"{key}: {value}")
        click.echo()
    out = sys.stdout.buffer
    last = b""
    for chunk in answer.chunks():
        out.write(chunk)
        out.flush()
        last = chunk
    if sys.stdout.isatty() and last and not last.endswith(b"\n"):
        click.echo()
    if include:
        stages = ", ".join(f"{stage} {duration(took_s)}" for stage, took_s in stage_times(answer).items())
        kind = answer.header(START_HEADER)
        click.echo(f"{click.style(kind, bold=True)} start: {stages or 'no stage times'}", err=True)


def _show_json(answer: Answer) -> None:
    import base64

    body = answer.read()
    shown: dict[str, Any] = {
        "status": answer.status,
        "start_kind": answer.header(START_HEADER),
        "stages_s": stage_times(answer),
        "headers": [[key, value] for key, value in answer.headers],
    }
    try:
        shown["body"] = body.decode()
    except UnicodeDecodeError:
        shown["body_base64"] = base64.b64encode(body).decode()
    print_json(shown)


def _verdict(name: str, answer: Answer, *, quiet: bool) -> int:
    why = answer.header(ERROR_HEADER)
    if why or answer.status >= 400:
        if not quiet:
            print_error(f"{name}: {why or f'the function answered with status {answer.status}'}")
        return EXIT_FAILED
    return 0


def stage_times(answer: Answer) -> dict[str, float]:
    """The stages in Server-Timing, in seconds, in order."""
    stages: dict[str, float] = {}
    for entry in answer.header("Server-Timing").split(","):
        name, _, rest = entry.strip().partition(";")
        found = re.search(r"dur=([0-9.]+)", rest)
        if name and found:
            stages[name] = round(float(found.group(1)) / 1000, 9)
    return stages
