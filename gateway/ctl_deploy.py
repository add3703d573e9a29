"""poolctl deploy: read specs, upload code, follow the deployment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from gateway.ctl_common import (
    EXIT_FAILED,
    Session,
    console,
    duration,
    print_error,
    print_json,
    report,
    session_command,
    size,
)

if TYPE_CHECKING:
    from gateway.client import Client
    from pool.spec import FunctionSpec

SPEC_NAMES = ("function.yaml", "function.yml", "function.json")
SPOOL_BYTES = 16 * 1024 * 1024  # a code tar larger than this waits on disk


@click.command(
    epilog="""\b
PATH is a spec file (YAML or JSON, one function or several), a directory with a
function.yaml, or - for standard input. A spec's code directory is uploaded; its
path is relative to the spec's file.
\b
Examples:
  poolctl deploy examples/hello
  poolctl deploy -f web.yaml -f batch.yaml
  poolctl deploy --check examples/hello         only say what is wrong with it
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1, type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="The same as PATH; repeatable.",
)
@click.option("--no-wait", is_flag=True, help="Return before the first instances are ready.")
@click.option("--check", is_flag=True, help="Only validate; poold is not asked.")
@session_command
@click.pass_context
def deploy(
    ctx: click.Context, session: Session, paths: tuple[Path, ...], files: tuple[Path, ...], no_wait: bool, check: bool
) -> None:
    """Deploy functions, or new revisions of them.

    The new revision is made ready before the old one goes.
    """
    from gateway.client_errors import ClientError

    if not paths and not files:
        raise click.UsageError("give a spec file or a directory with a function.yaml")
    found = [entry for path in (*paths, *files) for entry in _read(path)]
    _refuse_doubles(found)
    if check:
        _show_checked(session, found)
        return
    client = session.client
    results: list[dict[str, Any]] = []
    worst = 0
    for base, spec in found:
        try:
            with _course(session, spec.name) as course:
                result = _deploy_one(client, base, spec, wait=not no_wait, course=course)
        except ClientError as exc:
            worst = max(worst, report(exc))
            continue
        results.append(result)
        if not session.json:
            click.echo(_summary(result, spec.pool.min))
    if session.json:
        print_json({"deployed": results})
    ctx.exit(worst)


# --- reading ----------------------------------------------------------------------------------------------


def _read(path: Path) -> list[tuple[Path, FunctionSpec]]:
    """The specs at a path, each with the directory its relative paths start from."""
    from gateway.specfile import SpecError, parse_specs

    try:
        if str(path) == "-":
            base, source, text = Path.cwd(), "standard input", sys.stdin.buffer.read().decode()
        else:
            file = _spec_file(path)
            base, source, text = file.parent, str(file), file.read_text("utf-8")
        specs = parse_specs(text, source)
    except UnicodeDecodeError as exc:
        raise _Stop(f"{path} is not a text in UTF-8 (byte {exc.start})") from exc
    except SpecError as exc:
        count = len(exc.problems)
        print_error(f"{count} problem{'s' if count > 1 else ''} in {source}")
        for problem in exc.problems:
            click.echo(f"  {problem}", err=True)
        raise click.exceptions.Exit(EXIT_FAILED) from exc
    for spec in specs:
        _check_code(base, spec, source)
    return [(base, spec) for spec in specs]


class _Stop(click.ClickException):
    """Something is wrong with what the user gave; shown as any other error."""

    def show(self, file: Any = None) -> None:
        print_error(self.message)


def _spec_file(path: Path) -> Path:
    if not path.exists():
        raise _Stop(f"{path} does not exist")
    if not path.is_dir():
        return path
    for name in SPEC_NAMES:
        if (path / name).is_file():
            return path / name
    raise _Stop(f"there is no {SPEC_NAMES[0]} in {path}: write one, or name the spec's file itself")


def _check_code(base: Path, spec: FunctionSpec, source: str) -> None:
    from gateway.codetar import CodeDirectoryError, check_directory

    if spec.code is None:
        return
    directory = base / spec.code
    try:
        check_directory(directory)
    except CodeDirectoryError as exc:
        raise _Stop(f"{source}: {spec.name}: {exc}") from exc
    bootstrap = directory / "bootstrap"
    if spec.entrypoint is None:
        if not bootstrap.exists():
            raise _Stop(f"{source}: {spec.name}: there is no `bootstrap` in {directory}: it is what an instance runs")
        if not bootstrap.stat().st_mode & 0o111:
            raise _Stop(f"{source}: {spec.name}: {bootstrap} is not executable: chmod +x {bootstrap}")


def _refuse_doubles(found: list[tuple[Path, FunctionSpec]]) -> None:
    names = [spec.name for _, spec in found]
    for name in names:
        if names.count(name) > 1:
            raise _Stop(f"the function {name} is described {names.count(name)} times: a name is one function")


def _show_checked(session: Session, found: list[tuple[Path, FunctionSpec]]) -> None:
    names = [spec.name for _, spec in found]
    if session.json:
        print_json({"ok": True, "functions": names})
    else:
        for name in names:
            click.echo(f"{name}: the spec is valid")


# --- deploying --------------------------------------------------------------------------------------------


class _Course:
    """Where a deployment's progress lines go."""

    def say(self, text: str) -> None:
        """Show one line."""


class _Lines(_Course):
    """Plain lines on stderr, for logs and pipes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def say(self, text: str) -> None:
        click.echo(f"{self._name}: {text}", err=True)


class _Spinner(_Course):
    """One line on a terminal that says what goes on now and for how long."""

    def __init__(self, name: str, status: Any) -> None:
        self._name = name
        self._status = status

    def say(self, text: str) -> None:
        from rich.text import Text

        self._status.update(Text.assemble((self._name, "bold"), f"  {text}"))


@contextmanager
def _course(session: Session, name: str) -> Iterator[_Course]:
    if session.json:
        yield _Course()
    elif sys.stderr.isatty():
        with console(stderr=True).status(name) as status:
            yield _Spinner(name, status)
    else:
        yield _Lines(name)


def _deploy_one(client: Client, base: Path, spec: FunctionSpec, *, wait: bool, course: _Course) -> dict[str, Any]:
    import msgspec

    from gateway.client import function_path
    from gateway.client_errors import ClientError, error_from

    started_s = time.monotonic()
    query = {"wait": "true" if wait else "false"}
    if spec.code is not None:
        query["code"] = _upload(client, base / spec.code, course)
    path = f"{function_path(spec.name)}?{urlencode(query)}"
    headers = [("Content-Type", "application/json")]
    with client.stream("PUT", path, body=msgspec.json.encode(spec), headers=headers) as answer:
        for line in answer.lines():
            if "progress" in line:
                course.say(line["progress"])
            elif "error" in line:
                raise error_from(422, line)
            elif "result" in line:
                result: dict[str, Any] = line["result"]
                result["client_took_s"] = round(time.monotonic() - started_s, 3)
                return result
    raise ClientError(f"the deployment of {spec.name} ended without a result", hint="see poold's log")


def _upload(client: Client, directory: Path, course: _Course) -> str:
    import tempfile

    from gateway.client_errors import ClientError
    from gateway.codetar import CodeDirectoryError, write_tar

    course.say(f"packing {directory}")
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as tar:
        try:
            files = write_tar(directory, tar)
        except CodeDirectoryError as exc:
            raise ClientError(str(exc)) from exc
        length = tar.tell()
        tar.seek(0)
        course.say(f"uploading {files} file{'s' if files != 1 else ''}, {size(length)}")
        headers = [("Content-Type", "application/x-tar")]
        with client.request("PUT", "/v1/code", body=tar, headers=headers, length=length) as answer:
            if answer.status >= 400:
                raise answer.failure()
            return str(answer.json()["digest"])


def _summary(result: dict[str, Any], floor: int) -> str:
    took = duration(result["client_took_s"])
    if result["outcome"] == "unchanged":
        return f"{result['name']}  unchanged ({result['revision']})"
    state = "ready" if floor and result["ready"] else "deployed"
    return f"{result['name']}  {click.style(state, fg='green')} in {took} ({result['revision']})"
