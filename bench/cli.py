"""The command line of poolbench."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import click
from rich.console import Console
from rich.text import Text

from bench import firstready, load, overhead, report, rest, start
from bench.daemon import DaemonFailed
from bench.plain import PlainFailed
from bench.plot import NoPicture, check, draw
from bench.target import BadTarget, Plan
from bench.workload import BadWorkload
from gateway.client_errors import ClientError
from gateway.version import VERSION

FAILURES = (
    *(BadTarget, BadWorkload, DaemonFailed, PlainFailed),
    *(load.GeneratorFailed, overhead.TargetFailed, *start.FAILURES),
)

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(VERSION, prog_name="poolbench")
def main() -> None:
    """Measure how fast functions start and answer.

    Figures are for one machine at one time: each command compares within one interleaved run, and says the machine.

    \b
    Examples:
      poolbench load http://127.0.0.1:7070/fn/hello/ -c 32 -d 10
      poolbench load http://127.0.0.1:7070/fn/hello/ --rate 500 -d 30
      poolbench start examples/python-event
      poolbench overhead --backend process
      poolbench rest
    """


def _headers(values: tuple[str, ...]) -> list[tuple[str, str]]:
    found = []
    for value in values:
        name, colon, text = value.partition(":")
        if not colon:
            raise click.BadParameter(f"{value!r} is not NAME: VALUE", param_hint="--header")
        found.append((name.strip(), text.strip()))
    return found


@main.command("load")
@click.argument("url")
@click.option("-c", "--connections", type=click.IntRange(1, 10_000), default=10, show_default=True)
@click.option("-d", "--duration", type=click.FloatRange(0.01), help="Seconds; 10 when -n is not given either.")
@click.option("-n", "--requests", type=click.IntRange(1), help="Stop after so many requests.")
@click.option("--rate", type=click.FloatRange(0.001), help="Open loop: so many requests a second in all.")
@click.option("-X", "--method", default=None, help="GET, or POST with a body.")
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME: VALUE", help="May be repeated.")
@click.option("--body", default=None, help="The request's body.")
@click.option("--body-file", type=click.File("rb"), default=None, help="A file with the request's body.")
@click.option("--timeout", type=click.FloatRange(0.01), default=10.0, show_default=True, help="Seconds per request.")
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Generators.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def load_command(
    url: str,
    connections: int,
    duration: float | None,
    requests: int | None,
    rate: float | None,
    method: str | None,
    headers: tuple[str, ...],
    body: str | None,
    body_file: BinaryIO | None,
    timeout: float,
    processes: int,
    as_json: bool,
) -> None:
    """Put load on URL and show its latencies, split by start kind.

    Without --rate each connection asks again as soon as it is answered (closed loop): that shows the highest
    throughput, but a slow target is asked less often and looks better than its users find it. With --rate requests
    are due at fixed times whatever the target does (open loop), and latency counts from then.

    URL is http://HOST:PORT/PATH, or http+unix:///path/to/socket:/PATH. Ctrl-C ends early and prints what there is.

    \b
    Examples:
      poolbench load http://127.0.0.1:7070/fn/hello/ -c 32 -d 10
      poolbench load http://127.0.0.1:7070/fn/hello/ --rate 500 -d 30 --json
      poolbench load http+unix:///run/poold/poold.sock:/fn/hello/ -n 1000
      poolbench load http://127.0.0.1:7070/v1/functions/hello/invoke --body '{"a": 1}'
    """
    if body is not None and body_file is not None:
        raise click.UsageError("--body and --body-file cannot both be given")
    data = body.encode() if body is not None else body_file.read() if body_file is not None else b""
    plan = Plan(
        url=url,
        method=method or ("POST" if data else "GET"),
        headers=_headers(headers),
        body=data,
        connections=connections,
        duration_s=duration if duration is not None or requests is not None else 10.0,
        requests=requests,
        rate=rate,
        timeout_s=timeout,
    )
    tell = load.progress_on_terminal()
    try:
        outcome = load.run(plan, processes, tell)
    except (BadTarget, load.GeneratorFailed) as exc:
        raise click.ClickException(str(exc)) from None
    finally:
        if tell is not None:
            sys.stderr.write("\r\x1b[K")
    result = load.as_result(plan, outcome, processes)
    if as_json:
        report.print_json(result)
    else:
        load.show(result)
    if not outcome.answers:
        sys.exit(1)


def _backend(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
        click.option("--host", help="A poold that runs already: unix:///path, or http://HOST:PORT with admin_on_tcp."),
        click.option(
            "--backend",
            type=click.Choice(["auto", "docker", "process"]),
            default="auto",
            show_default=True,
            help="Of the poold that is started for this run (without --host).",
        ),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Tells what goes on, on stderr, when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(Text(text))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block in order too: what it started would outlive us."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(
    measure: Callable[[Callable[[str], None]], dict[str, Any]], show: Callable[[dict[str, Any]], None], as_json: bool
) -> dict[str, Any]:
    """Run a measurement, say what went wrong as a sentence, print the result."""
    try:
        with _terminable(), _progress() as tell:
            result = measure(tell)
    except ClientError as exc:
        raise click.ClickException(exc.message + (f"\nhint: {exc.hint}" if exc.hint else "")) from None
    except FAILURES as exc:
        raise click.ClickException(str(exc)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; what was started for the measurement has been ended") from None
    if as_json:
        report.print_json(result)
    else:
        show(result)
    return result


@main.command("overhead")
@_backend
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("-d", "--duration", type=click.FloatRange(0.05), default=1.0, show_default=True, help="Seconds each.")
def overhead_command(host: str | None, backend: str, as_json: bool, rounds: int, duration: float) -> None:
    """Compare poold with a bare trio + httptools proxy, and with the function asked directly.

    All three serve the same program, in one interleaved run, at 1, 8 and 32 connections. The ratios are what to read.

    \b
    Examples:
      poolbench overhead --backend process
      poolbench overhead --rounds 9 --json
    """
    _finish(lambda tell: overhead.run(host, backend, rounds, duration, tell), overhead.show, as_json)


def _function(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--body", default=None, help="What the function is asked with."),
        click.option("--path", "target", default="/", show_default=True, help="What it is asked for."),
        click.option("-X", "--method", default=None, help="How; GET, or POST with a body."),
        click.option("-n", "--samples", type=click.IntRange(1, 10_000), default=20, show_default=True),
        click.argument("function", required=False, type=click.Path(exists=True, path_type=Path)),
    ):
        command = option(command)
    return command


@main.command("start")
@_function
@_backend
@click.option("--settle", type=click.FloatRange(0), default=0.2, show_default=True, help="Seconds of rest before each.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture here (PNG).")
def start_command(
    function: Path | None,
    samples: int,
    method: str | None,
    target: str,
    body: str | None,
    host: str | None,
    backend: str,
    as_json: bool,
    settle: float,
    plot: Path | None,
) -> None:
    """Measure each kind of start of FUNCTION beside a plain create + start + first answer without poold.

    FUNCTION is a spec file or a directory with a function.yaml; without it the built-in one is measured. Each round
    takes one sample of each kind and one plain start, each while everything else is at rest.

    \b
    Examples:
      poolbench start examples/python-event
      poolbench start --backend docker -n 50 --plot starts.png
    """
    if plot is not None:
        try:
            check(plot)
        except NoPicture as exc:
            raise click.ClickException(str(exc)) from None
    body_bytes = body.encode() if body is not None else None
    work_of = start.builtin_or(function, method, target, body_bytes)
    result = _finish(
        lambda tell: start.run(work_of, host, backend, start.Course(samples, settle), tell), start.show, as_json
    )
    if plot is not None:
        try:
            draw(result, plot)
        except NoPicture as exc:
            raise click.ClickException(str(exc)) from None
        click.echo(f"picture: {plot}", err=True)


@main.command("deploy")
@_function
@_backend
def deploy_command(
    function: Path | None,
    samples: int,
    method: str | None,
    target: str,
    body: str | None,
    host: str | None,
    backend: str,
    as_json: bool,
) -> None:
    """Measure from a deployment of FUNCTION to its first ready instance, beside a plain start.

    \b
    Examples:
      poolbench deploy examples/python-event
      poolbench deploy --backend docker -n 10 --json
    """
    body_bytes = body.encode() if body is not None else None
    work_of = start.builtin_or(function, method, target, body_bytes)
    _finish(lambda tell: firstready.run(work_of, host, backend, samples, tell), firstready.show, as_json)


@main.command("rest")
@_backend
@click.option("--functions", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--frozen", type=click.IntRange(0, 10_000), default=40, show_default=True, help="Instances in all.")
@click.option("-d", "--duration", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Seconds.")
def rest_command(host: str | None, backend: str, as_json: bool, functions: int, frozen: int, duration: float) -> None:
    """Measure the daemon at rest: CPU and memory, with functions deployed and their instances frozen.

    \b
    Examples:
      poolbench rest --backend docker
      poolbench rest --functions 100 --frozen 100 -d 60 --json
    """
    _finish(lambda tell: rest.run(host, backend, functions, frozen, duration, tell), rest.show, as_json)


if __name__ == "__main__":
    main()
