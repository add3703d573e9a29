"""poolctl: deploy, look at, invoke and steer the functions of a running poold."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from gateway import ctl_deploy, ctl_invoke, ctl_journal, ctl_logs, ctl_operate, ctl_show, ctl_top
from gateway.client_errors import DEFAULT_HOST, ClientError
from gateway.ctl_common import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE, Session, print_error, report

EPILOG = """\b
Exit codes:
  0  it worked
  1  the function or the request failed
  2  wrong usage
  3  poold does not answer
  4  there is no such function
\b
Examples:
  poolctl deploy examples/hello       deploy what examples/hello/function.yaml describes
  poolctl invoke hello -d '{"a": 1}'  run it once
  poolctl ls                          functions and their pools
  poolctl logs -f hello               what its instances print
"""


class _ReaderGone(Exception):
    """Nobody reads standard output any more. (click would make exit code 1 of the BrokenPipeError itself.)"""


class _Commands(click.Group):
    """Lists its commands as they were added: what a newcomer needs first comes first."""

    def invoke(self, ctx: click.Context) -> object:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            raise _ReaderGone from exc

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click.Group."""
        return list(self.commands)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EPILOG
)
@click.option(
    "-H",
    "--host",
    envvar="POOLD_HOST",
    default=DEFAULT_HOST,
    show_default=True,
    show_envvar=True,
    metavar="ADDRESS",
    help="Where poold answers: unix:///PATH or http://HOST:PORT.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_context
def cli(ctx: click.Context, host: str, as_json: bool) -> None:
    """Deploy, look at, invoke and steer the functions of a running poold.

    `poolctl COMMAND --help` shows a command's options and examples.
    """
    ctx.obj = Session(host=host, json=as_json)


for _command in (
    ctl_deploy.deploy,
    ctl_show.ls,
    ctl_show.ps,
    ctl_invoke.invoke,
    ctl_logs.logs,
    ctl_show.inspect,
    ctl_operate.scale,
    ctl_operate.recycle,
    ctl_operate.reset,
    ctl_top.top,
    ctl_show.status,
    ctl_operate.drain,
    ctl_operate.rm,
    ctl_journal.journal,
    ctl_operate.completion,
    ctl_show.version,
):
    cli.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run poolctl; returns its exit code. No error leaves a traceback."""
    try:
        result = cli.main(arguments, prog_name="poolctl", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except ClientError as exc:
        return report(exc)
    except (_ReaderGone, BrokenPipeError):
        # The reader (head, less) has had enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as exc:
        print_error(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def main() -> None:
    """The command's entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
