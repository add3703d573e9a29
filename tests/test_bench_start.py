"""poolbench start, deploy, rest and overhead: what they compute, and a small real run of each on processes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench import cli, plot, report, start, workload
from bench.asker import Answer, NoAnswer, parse_stages
from bench.daemon import Poold, own_poold
from bench.plain import LABEL_BENCH
from bench.start import ROWS, Measured, Samples
from bench.workload import BadWorkload
from pool.spec import FcSpec, FunctionSpec, PoolSpec


def untold(text: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Reachable for whom instances run as, which pytest's own directories are not."""
    path = Path(tempfile.mkdtemp(prefix="poold-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


# Figures


def test_percentiles_by_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [report.percentile(values, percent) for percent in (0, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert report.percentile([7.0], 50) == 7
    with pytest.raises(ValueError, match="no values"):
        report.percentile([], 50)


def test_ratios_are_medians_over_rounds() -> None:
    assert report.median_ratio([2, 30, 6], [1, 10, 6]) == 2  # 2, 3 and 1: drift of all together does not matter
    assert report.median_ratio([1], [0]) is None
    with pytest.raises(ValueError, match="zip"):
        report.median_ratio([1, 2], [1])


def test_stage_times() -> None:
    assert parse_stages("queue;dur=0.1, run;desc=x;dur=2") == {"queue": 0.1, "run": 2.0}
    assert parse_stages("") == {}
    assert parse_stages("cache, x;dur=much") == {}


def test_start_kinds_have_their_order() -> None:
    assert report.by_kind(["cold", "other", "warm"]) == ["warm", "cold", "other"]


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.1234, "0.123"), (12.345, "12.35"), (345.6, "346")])
def test_milliseconds_for_people(value: float | None, shown: str) -> None:
    assert report.ms(value) == shown


def test_a_machine_is_named_with_its_backend() -> None:
    facts = report.machine(backend="docker", engine="20.10", other="")
    assert "other" not in facts
    line = report.machine_line(facts)
    assert "cores" in line
    assert "kernel" in line
    assert "backend docker" in line


# Kinds of start


def instance(state: str, uses: int = 0) -> dict[str, Any]:
    return {"state": state, "uses": uses, "id": "i"}


@pytest.mark.parametrize(
    ("name", "ready", "not_ready"),
    [
        ("warm", [instance("idle", 3)], [instance("idle", 0)]),
        ("thawed", [instance("frozen", 1)], [instance("idle", 1)]),
        ("prewarmed", [instance("idle")], [instance("idle", 1)]),
        ("prewarmed, frozen", [instance("frozen")], [instance("frozen"), instance("stopping", 1)]),
        ("cold", [], [instance("stopping", 1)]),
    ],
)
def test_when_the_next_invocation_is_of_a_kind(
    name: str, ready: list[dict[str, Any]], not_ready: list[dict[str, Any]]
) -> None:
    kind = start.Kind.__new__(start.Kind)
    (kind.row,) = (row for row in ROWS if row.name == name)
    assert kind.ready(ready)
    assert not kind.ready(not_ready)
    assert kind.settled(ready)
    assert not kind.settled([*ready, instance("starting")])


def test_each_kind_is_forced_by_its_pool() -> None:
    pools = {row.name: row.pool for row in ROWS}
    assert pools["thawed"].freeze_after_s == pools["prewarmed, frozen"].freeze_after_s == 0
    assert pools["warm"].freeze_after_s is None
    assert pools["prewarmed"].max_uses == pools["cold"].max_uses == 1
    assert pools["cold"].min == 0


class FakePoold(Poold):
    """Instances are always ready; answers come from `answers`."""

    def __init__(self) -> None:
        self.deployed = []

    def wait(
        self, name: str, wanted: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 60.0
    ) -> list[dict[str, Any]]:
        return []


def kind_with(answers: list[Answer]) -> start.Kind:
    class FakeAsker:
        def ask(self, *arguments: object) -> Answer:
            return answers.pop(0)

    kind = start.Kind.__new__(start.Kind)
    kind.row, kind.samples = ROWS[0], Samples()
    kind._poold = FakePoold()
    kind._work = workload.Workload(FunctionSpec(name="f", image="i"), Path(), workload.Ask("GET", "/"))
    kind.spec = kind._work.spec
    kind._asker = FakeAsker()  # type: ignore[assignment] # it asks the same way
    return kind


def told(kind: str, latency_ms: float = 1.0) -> Answer:
    return Answer(200, {"x-poold-start": kind, "server-timing": "run;dur=0.5"}, latency_ms=latency_ms)


def test_answers_of_another_kind_are_not_counted() -> None:
    kind = kind_with([told("cold", 300), told("warm", 2)])
    kind.sample()
    assert kind.samples.latency_ms == [2]
    assert kind.samples.stages_ms == {"run": [0.5]}
    assert kind.samples.other_kinds == 1


def test_a_kind_that_cannot_be_brought_about_is_an_error() -> None:
    with pytest.raises(start.NoSample, match="cold"):
        kind_with([told("cold")] * start.ATTEMPTS).sample()


def test_a_function_that_fails_is_an_error() -> None:
    with pytest.raises(NoAnswer, match="502: broken"):
        kind_with([Answer(502, {}, b"broken")]).sample()


def measured() -> Measured:
    found = Measured(plain_ms=[200.0, 300.0, 400.0], own_first_ms=[0.5, 0.5, 0.5], own_ms=[0.2, 0.2, 0.2])
    for row in ROWS:
        samples = found.rows[row.name] = Samples()
        for latency_ms in (1.0, 2.0, 3.0):
            samples.add(latency_ms, {"queue": 0.01, "run": latency_ms / 2})
    return found


def test_the_result_of_start_has_a_stable_shape() -> None:
    result = start.as_result("f", report.machine(backend="docker"), measured(), start.Course(3, 0.1), "by hand")
    keys = ["poolbench", "schema", "machine", "function", "samples", "settle_s", "plain", "own_ms", "rows"]
    assert list(result) == keys
    assert [row["start"] for row in result["rows"]] == ["warm", "thawed", "prewarmed", "prewarmed, frozen", "cold"]
    row = result["rows"][2]
    row_keys = ["start", "latency_ms", "plain_to_this", "above_own_ms", "stages_ms", "other_kinds", "samples_ms"]
    assert list(row) == row_keys
    assert row["latency_ms"] == {"count": 3, "min": 1, "p50": 2, "p90": 3, "p99": 3, "max": 3}
    assert row["plain_to_this"] == 150
    assert row["above_own_ms"] == {"p50": 1.5, "p99": 2.5}  # over the function's own first answer
    assert result["rows"][0]["above_own_ms"]["p50"] == 1.8  # over its later ones
    json.dumps(result)


def test_the_table_and_the_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = start.as_result("f", report.machine(backend="docker"), measured(), start.Course(3, 0.1), "by hand")
    start.show(result)
    text = capsys.readouterr().out
    for word in ("prewarmed, frozen", "plain start", "150x", "queue", "by hand", "backend docker"):
        assert word in text
    plot.draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(plot.NoPicture, match="cannot be written"):
        plot.draw(result, tmp_path / "no" / "p.png")


def test_a_table_too_wide_for_the_terminal_loses_its_lines_and_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    for width, lines in ((120, True), (40, False), (20, False)):
        out = Console(width=width, highlight=False)
        row = ["prewarmed, frozen", "1.234", "2", "3"]
        report.print_table(out, "title", ("start", "p50", "p90 of it", "p99"), [row])
        text = capsys.readouterr().out
        assert ("│" in text) == lines
        assert "…" not in text
        assert text.splitlines()[-2 if lines else -1].replace("│", " ").split() == " ".join(row).split()


def test_the_tables_of_start_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "console", lambda: Console(width=80, highlight=False))
    start.show(start.as_result("f", report.machine(), measured(), start.Course(3, 0.1), "by hand"))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot.check(tmp_path / "p.png")
    with pytest.raises(plot.NoPicture, match="there is no directory"):
        plot.check(tmp_path / "no" / "p.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plot.NoPicture, match="pip install matplotlib"):
        plot.check(tmp_path / "p.png")


# Workloads


def test_the_built_in_function_is_a_code_function(tmp_path: Path) -> None:
    work = workload.builtin(tmp_path)
    assert work.code is not None
    bootstrap = work.code / "bootstrap"
    assert bootstrap.stat().st_mode & stat.S_IXOTH
    assert bootstrap.read_text().startswith("#!/usr/bin/python3\n")
    variant = work.variant("x", PoolSpec(min=2), concurrency=5)
    assert (variant.name, variant.pool.min, variant.concurrency) == ("bench-x", 2, 5)


def test_a_spec_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "function.yaml").write_text("name: mine\nimage: a:1\ncontract: fc\n")
    work = workload.load(tmp_path)
    assert work.ask.event
    assert work.ask.poold_path("mine-0") == "/v1/functions/mine-0/invoke"
    (tmp_path / "function.yaml").write_text("name: mine\nimage: a:1\n")
    work = workload.load(tmp_path / "function.yaml", target="/x?y")
    assert work.ask.poold_path("mine-0") == "/fn/mine-0/x?y"
    assert workload.load(tmp_path, body=b"x").ask.method == "POST"


def test_an_fc_http_function_is_passed_through() -> None:
    spec = FunctionSpec(name="f", image="i", contract="fc", fc=FcSpec(type="http"))
    assert not workload._ask(spec, None, "/", None).event


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: [", r"f\.yaml:1: "), ("nam: x\nimage: a", "nam"), ("name: a\nimage: b\n---\nname: c\nimage: d", "2")],
)
def test_what_is_no_workload(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(BadWorkload, match=said):
        workload.load(tmp_path / "f.yaml")
    with pytest.raises(BadWorkload, match=r"function\.yaml"):
        workload.load(tmp_path)


# With a real poold, on the process backend


@pytest.fixture(scope="module")
def poold() -> Iterator[Poold]:
    with own_poold("process") as running:
        yield running


def test_starts_are_measured(poold: Poold, directory: Path) -> None:
    work = workload.builtin(directory)
    found, plain = start.measure(poold, work, "process", start.Course(1, 0.0), untold)
    assert "sandbox" in plain
    assert {name: len(samples.latency_ms) for name, samples in found.rows.items()} == {row.name: 1 for row in ROWS}
    assert "start" in found.rows["cold"].stages_ms
    assert min(found.plain_ms) > min(found.own_ms) > 0
    poold.remove_all()
    assert poold.status()["functions"] == 0


def test_the_deploy_command(poold: Poold) -> None:
    result = CliRunner().invoke(cli.main, ["deploy", "--host", poold.client.host, "-n", "1", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    keys = ["poolbench", "schema", "machine", "function", "samples", "deploy_ms", "plain", "deploy_to_plain"]
    assert list(shown) == keys
    assert shown["deploy_to_plain"] > 0
    assert shown["machine"]["backend"] == "process"


def test_starts_of_containers_are_measured(docker_host: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    work = workload.builtin(directory)
    with own_poold("docker") as running:
        found, plain = start.measure(running, work, "docker", start.Course(1, 0.0), untold)
        facts = running.facts()
    assert "network none" in plain
    assert facts["backend"] == "docker"
    assert facts["engine"]
    result = start.as_result("bench", report.machine(**facts), found, start.Course(1, 0.0), plain)
    assert result["rows"][0]["plain_to_this"] > 1
    client = docker.DockerClient.from_env()
    assert client.containers.list(all=True, filters={"label": LABEL_BENCH}) == []
    client.close()
