"""The command line of poolbench."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from bench import load, report
from bench.target import BadTarget, Plan

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="poold", message="poolbench %(version)s")
def main() -> None:
    """Measure how fast functions start and answer.

    Figures are for one machine at one time: each command compares within one interleaved run, and says the machine.

    \b
    Examples:
      poolbench load http://127.0.0.1:8080/fn/hello/ -c 32 -d 10
      poolbench load http://127.0.0.1:8080/fn/hello/ --rate 500 -d 30
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
      poolbench load http://127.0.0.1:8080/fn/hello/ -c 32 -d 10
      poolbench load http://127.0.0.1:8080/fn/hello/ --rate 500 -d 30 --json
      poolbench load http+unix:///run/poold/poold.sock:/fn/hello/ -n 1000
      poolbench load http://127.0.0.1:8080/v1/functions/hello/invoke --body '{"a": 1}'
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


if __name__ == "__main__":
    main()
