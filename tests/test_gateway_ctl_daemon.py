"""poolctl and a real poold, as two processes, on the simulated backend: one function's whole life."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import ctl
from gateway.client import Client
from gateway.client_errors import RequestFailed
from scheduler.journal import replay

SPEC = "name: sim\nimage: demo:1\ndescription: one\npool: {min: 2, max: 4}\n"


@pytest.fixture
def poold(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A daemon that serves; its socket is tmp_path/s."""
    command = [sys.executable, "-m", "gateway.daemon", "--backend", "simulated"]
    command += ["--state-dir", str(tmp_path / "state"), "--socket", str(tmp_path / "s"), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if '"ready"' in line:
                    break
            else:
                pytest.fail("".join(said))
            yield process
        finally:
            process.kill()


def test_a_functions_life_from_deploy_to_drain(
    poold: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poolctl(*arguments: str) -> str:
        code = ctl.run(["-H", f"unix://{tmp_path}/s", *arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    spec = tmp_path / "sim.yaml"
    spec.write_text(SPEC)
    assert poolctl("deploy", str(spec)).startswith("sim  ready in ")
    spec.write_text(SPEC.replace("one", "two"))
    assert "unchanged" in poolctl("deploy", str(spec))
    spec.write_text(SPEC + "timeout_s: 5\n")
    assert json.loads(poolctl("deploy", str(spec), "--json"))["deployed"][0]["outcome"] == "updated"

    assert poolctl("invoke", "sim", "-d", "hello") == "hello"
    shown = json.loads(poolctl("invoke", "sim", "-d", "again", "--json"))
    assert shown["start_kind"] in ("warm", "thawed")
    assert "run" in shown["stages_s"]

    row = json.loads(poolctl("ls", "--json"))["functions"][0]
    assert (row["state"], row["min"], row["max"], sum(row["totals"].values())) == ("ready", 2, 4, 2)
    assert "simulated" in poolctl("logs", "sim")
    assert len(json.loads(poolctl("ps", "sim", "--json"))["instances"]) >= 2
    assert json.loads(poolctl("inspect", "sim", "--json"))["spec"]["timeout_s"] == 5
    poolctl("scale", "sim", "--min", "1")
    poolctl("recycle", "sim")
    poolctl("reset", "sim")
    assert json.loads(poolctl("status", "--json"))["backend"] == "simulated"
    assert "sim" in poolctl("top", "--once")
    poolctl("journal", str(tmp_path / "journal"))
    events = len(replay((tmp_path / "journal").read_bytes()))
    assert events > 5
    shown_events = poolctl("journal", "--show", str(tmp_path / "journal"))
    assert "-> Grant invocation=1 " in shown_events
    assert "Invoked invocation=1 " in shown_events
    assert " deadline=+" in shown_events
    lines = poolctl("journal", "--show", "--json", str(tmp_path / "journal")).splitlines()
    assert (len(lines), json.loads(lines[0])["at_s"]) == (events, 0)

    poolctl("rm", "sim")
    assert json.loads(poolctl("ls", "--json"))["functions"] == []
    assert poolctl("drain", "--wait") == "poold has ended\n"
    assert poold.poll() == 0, "it listens no more, but it has not ended"


def test_over_tcp_only_invocations_and_the_public_routes_are_answered(
    poold: subprocess.Popen[str], tmp_path: Path
) -> None:
    over_unix = Client(f"unix://{tmp_path}/s")
    status = over_unix.call("GET", "/v1/status")
    address = next(address for address in status["listen"] if address.startswith("http"))
    over_tcp = Client(address)
    assert over_tcp.call("GET", "/healthz") == {"status": "ok"}
    document = over_tcp.call("GET", "/v1/openapi.json")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation["x-poold-admin"]:
                with pytest.raises(RequestFailed) as refused:
                    over_tcp.call(method.upper(), path.replace("{name}", "sim"))
                assert (path, refused.value.status) == (path, 403)


def test_the_metrics_of_a_live_daemon_are_readable(poold: subprocess.Popen[str], tmp_path: Path) -> None:
    client = Client(f"unix://{tmp_path}/s")
    client.call("PUT", "/v1/functions/sim", body={"name": "sim", "image": "demo:1"})
    with client.request("POST", "/v1/functions/sim/invoke", body=b"x") as answer:
        assert answer.read() == b"x"
    with client.request("GET", "/metrics") as answer:
        text = answer.read().decode()
    assert 'poold_invocations_total{function="sim",start_kind="cold",outcome="ok"} 1\n' in text
    assert 'poold_invocation_duration_seconds_count{function="sim",start_kind="cold"} 1\n' in text
