"""poolctl's commands against a daemon of canned answers: what they ask, print, and exit with."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from gateway_fake_daemon import (
    Canned,
    FakeDaemon,
    Seen,
    canned,
    function_info,
    function_row,
    instance_info,
    ndjson,
    running,
    status_info,
)

from gateway import ctl, ctl_top
from gateway.apis import views
from gateway.ctl_common import Column, age, count, duration, megabytes, size, table_lines
from gateway.ctl_top import Sample
from gateway.version import VERSION
from scheduler.model import InstanceState


@dataclass(slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


Poolctl = Callable[..., Result]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running(tmp_path / "d.sock") as fake:
        yield fake


@pytest.fixture
def poolctl(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> Poolctl:
    def run(*arguments: str) -> Result:
        code = ctl.run(["-H", daemon.host, *arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


COMMANDS = list(ctl.cli.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(poolctl: Poolctl, name: str) -> None:
    result = poolctl(name, "--help")
    assert result.code == 0
    assert f"  poolctl {name}" in result.out or f"$(poolctl {name}" in result.out
    assert all(len(line) <= 100 for line in result.out.splitlines())


def test_help_names_the_exit_codes(poolctl: Poolctl) -> None:
    result = poolctl("--help")
    assert all(f"  {code}  " in result.out for code in range(5))


@pytest.mark.parametrize("arguments", [("nonsense",), ("ls", "--nonsense"), ("scale", "hello"), ("deploy",), ("rm",)])
def test_wrong_usage_is_2(poolctl: Poolctl, arguments: tuple[str, ...]) -> None:
    result = poolctl(*arguments)
    assert result.code == 2
    assert "Error" in result.err


def test_no_daemon_is_3_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.run(["-H", f"unix://{tmp_path}/none", "ls"]) == 3
    err = capsys.readouterr().err
    assert "is it running?" in err
    assert "hint:" in err


def test_the_address_comes_from_the_environment(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POOLD_HOST", daemon.host)
    daemon.on("GET", "/v1/functions", canned(views.FunctionList([])))
    assert ctl.run(["ls"]) == 0
    assert "no functions yet" in capsys.readouterr().err


def test_a_bad_address_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.run(["-H", "nowhere", "ls"]) == 2
    assert "nowhere" in capsys.readouterr().err


# --- looking ----------------------------------------------------------------------------------------------


def test_ls_shows_a_line_for_each(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("GET", "/v1/functions", canned(views.FunctionList([function_row("a"), function_row("b", min=0)])))
    lines = poolctl("ls").out.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "IDLE", "FROZEN", "BUSY", "RANGE", "QUEUE", "CALLS", "COLD", "ERRORS"]
    assert lines[1].split() == ["a", "ready", "1", "2", "0", "1-10", "0", "12.4k", "1", "2"]
    assert len(lines) == 3
    assert poolctl("ls", "-q").out == "a\nb\n"


@pytest.mark.parametrize("where", ["before", "after"])
def test_json_may_stand_before_or_after_the_command(daemon: FakeDaemon, poolctl: Poolctl, where: str) -> None:
    daemon.on("GET", "/v1/functions", canned(views.FunctionList([function_row("a")])))
    result = poolctl("--json", "ls") if where == "before" else poolctl("ls", "--json")
    assert [row["name"] for row in json.loads(result.out)["functions"]] == ["a"]


def test_ps_shows_all_or_one_functions_instances(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    everything = [instance_info(1), instance_info(2, state=InstanceState.STARTING, pid=None, memory_mb=None)]
    daemon.on("GET", "/v1/instances", canned(views.InstanceList(everything)))
    daemon.on("GET", "/v1/functions/hello", canned(function_info(instance_list=everything[:1])))
    lines = poolctl("ps").out.splitlines()
    assert lines[1].split() == ["3-1", "hello", "idle", "0/1", "12", "1h", "2m", "1m", "5s", "23", "MB", "4242"]
    assert lines[2].split()[-2:] == ["-", "-"]
    assert len(poolctl("ps", "hello").out.splitlines()) == 2
    assert len(json.loads(poolctl("ps", "hello", "--json").out)["instances"]) == 1


def test_inspect_shows_spec_pool_and_breaker(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    breaker = views.Breaker(open=True, failures=4, retry_after_s=12.3, detail="exit code 1")
    daemon.on("GET", "/v1/functions/hello", canned(function_info(breaker=breaker)))
    result = poolctl("inspect", "hello")
    assert result.code == 0
    for words in ("hello@0123456789ab", "1 idle, 2 frozen", "open after 4 failures", "exit code 1", "min: 1", "212 ms"):
        assert words in result.out
    assert json.loads(poolctl("inspect", "hello", "--json").out)["spec"]["name"] == "hello"


def test_an_unknown_function_is_4(poolctl: Poolctl) -> None:
    for command in (["inspect"], ["recycle"], ["reset"], ["logs"], ["scale", "--min", "1"], ["rm"], ["invoke"], ["ps"]):
        result = poolctl(*command, "nope")
        assert (command, result.code) == (command, 4)
        assert "error: nothing at" in result.err
        assert "hint: look elsewhere" in result.err
        assert "Traceback" not in result.err


def test_status_tells_what_is_wrong(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    breaker = views.OpenBreaker(function="bad", revision="bad@1", failures=3, retry_after_s=2.5, detail="exit code 3")
    info = status_info(warnings=["nothing isolates"], breakers=[breaker], engine_problem="connection refused")
    daemon.on("GET", "/v1/status", canned(info))
    out = poolctl("status").out
    for words in ("768 of 4096 MB", "nothing isolates", "poolctl reset bad", "exit code 3", "connection refused"):
        assert words in out
    assert json.loads(poolctl("status", "--json").out)["memory"]["limit_mb"] == 4096


def test_top_once_is_for_scripts(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("GET", "/v1/status", canned(status_info()))
    daemon.on("GET", "/v1/functions", canned(views.FunctionList([function_row("a")])))
    out = poolctl("top", "--once").out
    assert "poold 0.1.0 on docker" in out
    assert out.splitlines()[-1].split() == ["a", "ready", "-", "0", "0", "1", "2", "0", "0.0", "2"]
    assert set(json.loads(poolctl("top", "--json").out)) == {"status", "functions"}


def test_rates_are_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(calls: dict[str, int], at_s: float, before: Sample | None) -> Sample:
        monkeypatch.setattr(ctl_top.time, "monotonic", lambda: at_s)
        rows = [msgspec.to_builtins(function_row(n, totals=views.StartTotals(warm=c))) for n, c in calls.items()]
        return Sample(msgspec.to_builtins(status_info()), rows, before)

    first = look({"a": 10, "b": 5}, 100.0, None)
    assert first.rate("a") is None
    second = look({"a": 40, "b": 2, "new": 7}, 102.0, first)  # b was redeployed by another daemon
    assert [second.rate(name) for name in ("a", "b", "new")] == [15.0, None, None]
    assert [row[0] for row in second.rows()] == ["a", "b", "new"]
    assert "15.0 calls/s" in second.heading()[0]


def test_version_needs_no_daemon(
    daemon: FakeDaemon, poolctl: Poolctl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("GET", "/v1/status", canned(status_info(version="9.9.9")))
    assert json.loads(poolctl("version", "--json").out) == {"poolctl": VERSION, "poold": "9.9.9"}
    assert ctl.run(["-H", f"unix://{tmp_path}/none", "version"]) == 0
    assert "does not answer" in capsys.readouterr().out


# --- steering ---------------------------------------------------------------------------------------------


def test_scale_sends_only_what_is_given(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("POST", "/v1/functions/hello/scale", canned(views.Done(name="hello")))
    assert poolctl("scale", "hello", "--min", "0").out == "hello scaled\n"
    assert poolctl("scale", "hello", "--min", "2", "--max", "5", "--json").code == 0
    assert [json.loads(seen.body) for seen in daemon.seen] == [{"min": 0}, {"min": 2, "max": 5}]


@pytest.mark.parametrize("action", ["recycle", "reset"])
def test_an_action_reaches_its_route(daemon: FakeDaemon, poolctl: Poolctl, action: str) -> None:
    daemon.on("POST", f"/v1/functions/hello/{action}", canned(views.Done(name="hello")))
    assert poolctl(action, "hello").code == 0


def test_rm_goes_on_after_one_that_is_not_there(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("DELETE", "/v1/functions/b", canned(views.Done(name="b")))
    result = poolctl("rm", "a", "b")
    assert (result.code, result.out) == (4, "b removed\n")
    assert json.loads(poolctl("rm", "b", "--json").out) == {"removed": ["b"]}


def test_drain_waits_until_the_daemon_is_gone(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    def drain(seen: Seen) -> Canned:
        daemon.path.unlink()  # from now on nothing answers
        return canned(views.Done(message="draining"), 202)

    daemon.on("GET", "/v1/status", canned(status_info(pid=0)))  # of no process of ours: elsewhere
    daemon.on("POST", "/v1/drain", drain)
    assert poolctl("drain", "--wait").out == "poold has ended\n"


def test_the_journal_is_saved_byte_for_byte(daemon: FakeDaemon, poolctl: Poolctl, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    daemon.on("GET", "/v1/journal", Canned(200, data))
    result = poolctl("journal", str(tmp_path / "j"))
    assert (tmp_path / "j").read_bytes() == data
    assert "256000 bytes" in result.err
    result = poolctl("journal", "--show", str(tmp_path / "j"))
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: this is no journal: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_poolctl(poolctl: Poolctl, shell: str) -> None:
    result = poolctl("completion", shell)
    assert result.code == 0
    assert "_POOLCTL_COMPLETE" in result.out


def test_names_are_completed_from_what_is_deployed(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("GET", "/v1/functions", canned(views.FunctionList([function_row("hello"), function_row("other")])))
    monkeypatch.setenv("POOLD_HOST", daemon.host)
    monkeypatch.setenv("_POOLCTL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "poolctl inspect he")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        ctl.run([])
    assert capsys.readouterr().out.strip() == "plain,hello"


# --- logs -------------------------------------------------------------------------------------------------


def _entry(number: int, **more: object) -> views.LogEntry:
    values: dict[str, object] = {"at": "2026-11-21T20:22:00.123Z", "instance": "3-1", "invocation": "i1"}
    values |= {"stream": "stdout", "text": f"line {number}"}
    return views.LogEntry(**(values | more))  # type: ignore[arg-type] # test values by name


def test_logs_show_instance_and_text(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("GET", "/v1/functions/hello/logs", ndjson(_entry(1), _entry(2, stream="stderr", dropped=5)))
    result = poolctl("logs", "-f", "--tail", "7", "--invocation", "i 1", "--instance", "3-1", "hello")
    assert result.out == "3-1 | line 1\n3-1 | line 2\n"
    assert "5 lines were lost" in result.err
    assert daemon.seen[0].query == {"tail": "7", "follow": "true", "invocation": "i 1", "instance": "3-1"}


def test_logs_with_times_say_whose_they_are(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("GET", "/v1/functions/hello/logs", ndjson(_entry(1), _entry(2, invocation="")))
    lines = poolctl("logs", "-t", "hello").out.splitlines()
    assert lines == ["2026-11-21T20:22:00.123Z 3-1 | i1 line 1", "2026-11-21T20:22:00.123Z 3-1 | - line 2"]


def test_logs_as_json_are_one_object_a_line(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    daemon.on("GET", "/v1/functions/hello/logs", ndjson(_entry(1), _entry(2)))
    lines = poolctl("logs", "--json", "hello").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["line 1", "line 2"]


def test_a_daemon_that_ends_ends_the_following(daemon: FakeDaemon, poolctl: Poolctl) -> None:
    gate = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b'{"at": "t", "instance": "3-1", "invocation": "", "stream": "stdout", "text": "last words"}\n'
        gate.set()
        raise ConnectionResetError

    daemon.on("GET", "/v1/functions/hello/logs", Canned(200, parts()))
    result = poolctl("logs", "-f", "hello")
    assert gate.is_set()
    assert (result.code, result.out) == (3, "3-1 | last words\n")
    assert "closed the connection" in result.err


# --- pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0000351, "35 µs"), (0.00123, "1.23 ms"), (0.2, "200 ms"), (3.4, "3.4 s"), (310, "5m 10s")],
)
def test_durations_are_short(value: float | None, shown: str) -> None:
    assert duration(value) == shown


def test_numbers_are_short() -> None:
    assert [size(value) for value in (0, 1, 12_300, 3_400_000)] == ["0 KB", "1 KB", "13 KB", "3.4 MB"]
    assert [age(value) for value in (0, 59.9, 3599, 86_399, 200_000)] == ["0s", "59s", "59m 59s", "23h 59m", "2d 7h"]
    assert [count(value) for value in (0, 9999, 12_345, 4_500_000)] == ["0", "9999", "12.3k", "4.5M"]
    assert [megabytes(value) for value in (None, 23.4, 4096)] == ["-", "23 MB", "4.0 GB"]


def test_a_table_fits_its_terminal_by_cutting_what_may_be_cut() -> None:
    columns = (Column("NAME", flexible=True), Column("STATE", state=True), Column("N", right=True))
    rows = [["a" * 50, "ready", "5"], ["b", "failing", "12"]]
    assert table_lines(columns, rows)[1] == f"{'a' * 50}  ready     5"
    fitted = table_lines(columns, rows, 30)
    assert "a" * 16 + "…  " in fitted[1]
    assert "\x1b[32mready" in fitted[1]
