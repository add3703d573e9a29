"""What `make demo` runs: a poold of its own, the examples in it, and how fast each kind of start answers.

Everything of it lives in .demo/ and ends with it, after Ctrl-C and after a failure too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml
from msgspec import convert
from rich.console import Console
from rich.table import Table

from gateway.client import Client, function_path
from gateway.client_errors import ClientError, RequestFailed
from pool.contracts.registry import CONTRACTS
from pool.spec import FunctionSpec
from scripts.demo_daemon import ENDING, DemoDaemon, DemoError
from scripts.demo_engine import DemoEngine, find_engine

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ("node-http", "python-event", "scratch-image")
FREEZE_AFTER_S = 0.25  # the examples' own 1 s would only make the demo longer
STATE_TIMEOUT_S = 60.0
POLL_S = 0.01
WARM_EACH = 3
EVENT = b'{"name": "demo", "text": "to be or not to be"}'
PLAIN = "docker run, without poold"
# What the table shows, slowest first: a title, and the start kinds that its invocations must have had.
ROWS = {
    PLAIN: "",
    "cold: no instance there": "cold",
    "pre-started and frozen": "prewarmed",
    "pre-started": "prewarmed",
    "used before and frozen": "thawed",
    "warm: used before": "warm",
}

console = Console(highlight=False)


class Ended(BaseException):
    """A signal asked the demo to end. Not an Exception: nothing on the way may take it for a failure."""


def _end(number: int, frame: FrameType | None) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)  # once is enough: what follows must be left clean
    raise Ended(signal.Signals(number).name)


class Example:
    """One deployed example: brings an instance into the state that a start kind needs, and takes the time."""

    def __init__(self, client: Client, connection: http.client.HTTPConnection, name: str) -> None:
        self._client = client
        self._connection = connection
        self.name = name
        self.times_s: dict[str, list[float]] = {row: [] for row in ROWS}

    def sample(self) -> None:
        """Take one time of each start kind."""
        self._fresh(floor=0)
        self._invoke("cold: no instance there")
        self._fresh(floor=1)
        self._until(frozen=1)
        self._invoke("pre-started and frozen")
        self._fresh(floor=1)
        self._invoke("pre-started")
        for _ in range(WARM_EACH):
            self._invoke("warm: used before")
        self._until(frozen=1)
        self._invoke("used before and frozen")

    def plain(self, engine: DemoEngine) -> None:
        """Take the time of a container like the function's own that is started for one answer."""
        info = self._client.call("GET", function_path(self.name))
        spec = convert(info["spec"], FunctionSpec)
        contract = CONTRACTS[spec.contract]
        instance = info["instance_list"][0]
        path = "/invoke" if spec.contract == "fc" else spec.web.invoke_path
        took_s = engine.plain_start_s(instance, spec.port or contract.default_port, path)
        self.times_s[PLAIN].append(took_s)

    def _fresh(self, *, floor: int) -> None:
        """Replace what runs by `floor` instances that nobody has used."""
        old = {row["id"] for row in self._instances()}
        self._client.call("POST", function_path(self.name, "scale"), body={"min": floor})
        self._client.call("POST", function_path(self.name, "recycle"), body={})
        for rows in self._polled():
            ready = [row for row in rows if row["state"] in ("idle", "frozen")]
            if not old & {row["id"] for row in rows} and len(rows) == len(ready) == floor:
                return

    def _until(self, *, frozen: int) -> None:
        for rows in self._polled():
            if sum(row["state"] == "frozen" for row in rows) == frozen:
                return

    def _polled(self) -> Iterator[list[dict[str, Any]]]:
        deadline_s = time.monotonic() + STATE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            yield self._instances()
            time.sleep(POLL_S)
        raise DemoError(f"{self.name}: its instances did not come to the wanted state in {STATE_TIMEOUT_S:.0f} s")

    def _instances(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._client.call("GET", function_path(self.name))["instance_list"]
        return rows

    def _invoke(self, row: str) -> None:
        started_s = time.perf_counter()
        self._connection.request("POST", function_path(self.name, "invoke"), body=EVENT)
        with self._connection.getresponse() as answer:
            body = answer.read()
        took_s = time.perf_counter() - started_s
        if answer.status != 200:
            raise DemoError(f"{self.name} answered {answer.status}: {body[:300].decode(errors='replace')}")
        # An instance that froze, or was replaced, between the look and the call gives no sample of this kind.
        if answer.headers["X-Poold-Start"] == ROWS[row]:
            self.times_s[row].append(took_s)


def deploy(daemon: DemoDaemon, engine: DemoEngine | None, directory: Path, name: str) -> str | None:
    """Deploy one example, as its own README says; None when it cannot run here, which it tells."""
    home = ROOT / "examples" / name
    spec: dict[str, Any] = yaml.safe_load((home / "function.yaml").read_text())
    if "code" not in spec:
        problem = "it is an image, and needs a Docker engine"
        if engine is not None:
            problem = engine.build(home, directory, spec["image"])
        if problem:
            console.print(f"  left out {name}: {problem}", style="yellow")
            return None
    spec["pool"] = {**spec.get("pool", {}), "min": 1, "max": 1, "freeze_after_s": FREEZE_AFTER_S}
    if "code" in spec:
        spec["code"] = str((home / spec["code"]).resolve())
    file = directory / f"{spec['name']}.yaml"
    file.write_text(yaml.safe_dump(spec))
    started_s = time.monotonic()
    daemon.deploy(file)
    console.print(f"  deployed {name}, its first instance ready, in {time.monotonic() - started_s:.2f} s")
    return str(spec["name"])


def tcp_port(addresses: list[str]) -> int:
    """The port of the first http://host:port among a daemon's addresses."""
    return next(int(address.rpartition(":")[2]) for address in addresses if address.startswith("http://"))


def table(examples: list[Example]) -> Table:
    """Start kinds down, functions across."""
    shown = Table(title="time to an answer, median", title_justify="left", title_style="bold")
    shown.add_column("start", no_wrap=True)
    for example in examples:
        shown.add_column(example.name, justify="right")
    for row in ROWS:
        cells = [cell(example.times_s[row], example.times_s[PLAIN]) for example in examples]
        if any(cells):
            shown.add_row(row, *cells)
    return shown


def cell(times_s: list[float], plain_s: list[float]) -> str:
    """The median, and how many times faster than plain it is."""
    if not times_s:
        return ""
    middle_s = statistics.median(times_s)
    text = f"{middle_s * 1000:.0f} ms" if middle_s >= 0.1 else f"{middle_s * 1000:.1f} ms"
    if not plain_s:
        return text
    ratio = statistics.median(plain_s) / middle_s
    return text + (f" {'':5}" if times_s is plain_s else f" {ratio:4.0f}x" if ratio >= 10 else f" {ratio:4.1f}x")


def measure(examples: list[Example], engine: DemoEngine | None, samples: int) -> None:
    """Interleave the samples, so that a busy moment of the machine meets every kind."""
    with console.status("measuring") as status:
        for number in range(1, samples + 1):
            for example in examples:
                status.update(f"measuring {example.name}, sample {number} of {samples}")
                example.sample()
                if engine is not None:
                    example.plain(engine)


def demo(options: argparse.Namespace, directory: Path) -> None:
    """The whole demo, in `directory`."""
    with contextlib.ExitStack() as stack:
        engine, reason = find_engine(options.backend)
        console.print(reason)
        if engine is not None:
            stack.enter_context(engine)
        daemon = stack.enter_context(DemoDaemon(directory, "process" if engine is None else "docker"))
        client = Client(daemon.host, timeout_s=120)
        status = client.call("GET", "/v1/status")
        console.print(f"poold runs on the [bold]{status['backend']}[/bold] backend: {status['isolation']}")
        for warning in status["warnings"]:
            console.print(f"  {warning}", style="yellow")
        connection = http.client.HTTPConnection("127.0.0.1", tcp_port(status["listen"]), timeout=120)
        stack.callback(connection.close)
        deployed = [deploy(daemon, engine, directory, name) for name in EXAMPLES]
        examples = [Example(client, connection, name) for name in deployed if name is not None]
        measure(examples, engine, options.samples)
        console.print()
        console.print(table(examples))
        if engine is not None:
            console.print("x: so many times faster than a container that is made for one answer, with the same limits")


def end_children() -> None:
    """A signal that arrives while a process is being made leaves that process to nobody."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=5)


def main(arguments: list[str]) -> int:
    """Exit status 0 when all went well, 1 when not, 128 + the signal's number when a signal ended it."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("--backend", choices=["auto", "docker", "process"], default="auto")
    parser.add_argument("--samples", type=int, default=5, help="of each start kind (5)")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error("--samples must be at least 1")
    (ROOT / ".demo").mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=ROOT / ".demo"))
    for number in ENDING:
        signal.signal(number, _end)
    code = 0
    try:
        demo(options, directory)
    except Ended as exc:
        console.print(f"\nended by {exc}")
        code = 128 + signal.Signals[str(exc)].value
    except DemoError as exc:
        console.print(f"demo: {exc}", style="red", markup=False)
        code = 1
    except ClientError as exc:
        hint = f" ({exc.hint})" if exc.hint else ""
        console.print(f"demo: {exc.message}{hint}", style="red", markup=False)
        if isinstance(exc, RequestFailed):
            for detail in exc.details:
                console.print(str(detail), markup=False)
        code = 1
    finally:
        end_children()
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(ROOT / ".demo")  # another demo may be running in it
    if code == 0:
        console.print("left behind: nothing", style="green")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
