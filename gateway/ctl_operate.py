"""poolctl scale, recycle, reset, drain, rm, completion: steering what is deployed."""

from __future__ import annotations

import contextlib
import os
import select
import time

import click

from gateway.ctl_common import Session, name_argument, names_argument, print_json, report, session_command

POLL_S = 0.5


@click.command(
    epilog="""\b
Examples:
  poolctl scale hello --min 3           keep three instances started
  poolctl scale hello --min 0 --max 20
"""
)
@name_argument
@click.option("--min", "floor", type=click.IntRange(0, 1000), help="Instances kept started, whatever happens.")
@click.option("--max", "ceiling", type=click.IntRange(1, 1000), help="Instances at most.")
@session_command
def scale(session: Session, name: str, floor: int | None, ceiling: int | None) -> None:
    """Change how many instances a function keeps and may have.

    It lasts, over restarts too, until the function is deployed with other numbers.
    """
    if floor is None and ceiling is None:
        raise click.UsageError("give --min, --max or both")
    body = {key: value for key, value in (("min", floor), ("max", ceiling)) if value is not None}
    _act(session, name, "scale", f"{name} scaled", body)


@click.command(
    epilog="""\b
Example:
  poolctl recycle hello
"""
)
@name_argument
@session_command
def recycle(session: Session, name: str) -> None:
    """Replace every instance of a function by a fresh one.

    Idle ones go at once, busy ones when they are done.
    """
    _act(session, name, "recycle", f"{name} recycled")


@click.command(
    epilog="""\b
Example:
  poolctl reset hello
"""
)
@name_argument
@session_command
def reset(session: Session, name: str) -> None:
    """Try a function again now that failed to start."""
    _act(session, name, "reset", f"{name} may start again")


def _act(session: Session, name: str, action: str, message: str, body: dict[str, int] | None = None) -> None:
    from gateway.client import function_path

    answer = session.client.call("POST", function_path(name, action), body=body or {})
    if session.json:
        print_json(answer)
    else:
        click.echo(message)


@click.command(
    epilog="""\b
Examples:
  poolctl rm hello
  poolctl rm hello greet
"""
)
@names_argument
@session_command
@click.pass_context
def rm(ctx: click.Context, session: Session, names: tuple[str, ...]) -> None:
    """Remove functions and their instances.

    What runs ends first; what waits is refused.
    """
    from gateway.client import function_path
    from gateway.client_errors import RequestFailed

    removed: list[str] = []
    worst = 0
    for name in names:
        try:
            session.client.call("DELETE", function_path(name))
        except RequestFailed as exc:
            worst = max(worst, report(exc))
            continue
        removed.append(name)
        if not session.json:
            click.echo(f"{name} removed")
    if session.json:
        print_json({"removed": removed})
    ctx.exit(worst)


@click.command(
    epilog="""\b
Examples:
  poolctl drain
  poolctl drain --wait && sudo reboot
"""
)
@click.option("--wait", is_flag=True, help="Return when poold has ended.")
@session_command
def drain(session: Session, wait: bool) -> None:
    """End the daemon in good order.

    New invocations are refused, the running ones end, the instances stop, then poold itself.
    """
    with contextlib.ExitStack() as opened:
        process = _process(session, opened) if wait else None
        answer = session.client.call("POST", "/v1/drain", body={})
        if wait:
            _wait_ended(session, process)
    if session.json:
        print_json(answer)
    else:
        click.echo("poold has ended" if wait else "draining: new invocations are refused")


def _process(session: Session, opened: contextlib.ExitStack) -> int | None:
    """A descriptor of poold's process, where it is one of this host (and this PID namespace)."""
    if not session.client.is_local:
        return None
    pid = session.client.call("GET", "/v1/status")["pid"]
    try:
        process = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
    opened.callback(os.close, process)
    return process


def _wait_ended(session: Session, process: int | None) -> None:
    """Return when poold is gone: it stops listening first, its instances and itself end later."""
    from gateway.client_errors import Unreachable

    if process is not None:
        select.select([process], [], [])
        return
    while True:
        try:
            session.client.call("GET", "/healthz")
        except Unreachable:
            return
        time.sleep(POLL_S)


@click.command(
    epilog="""\b
Examples:
  eval "$(poolctl completion bash)"
  poolctl completion zsh > ~/.zfunc/_poolctl
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script."""
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    if cls is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(cls(ctx.find_root().command, {}, "poolctl", "_POOLCTL_COMPLETE").source())
