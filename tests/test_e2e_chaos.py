"""Everything that can go wrong, at the same time and in any order; afterwards all is as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from http.client import IncompleteRead
from typing import Any

import pytest
from daemon_bystander import Bystander
from daemon_kit import Poold
from daemon_waiting import background, wait_until

from gateway.client import function_path
from gateway.client_errors import RequestFailed

LASTS_S = 3.0
CALLERS = 8

# name: code, spec, bodies
FUNCTIONS: dict[str, tuple[str, dict[str, Any], list[bytes]]] = {
    "exits": ("exits-mid-request", {"pool": {"max": 2, "freeze_after_s": 0.05}}, [b"stay", b"stay", b"go", b"half"]),
    "never": ("never-answers", {"pool": {"min": 1, "max": 2}, "timeout_s": 0.2}, [b"x"]),
    "garbage": ("garbage", {"pool": {"max": 2}}, [b"x"]),
    "slow": (
        "slow",
        {"pool": {"min": 1, "max": 2, "freeze_after_s": 0}, "queue": {"max": 4, "timeout_s": 1}, "concurrency": 2},
        [b"0.01", b"0"],
    ),
    "counter": (
        "counter",
        {"pool": {"max": 3, "freeze_after_s": 0, "keepalive_s": 0.3}, "concurrency": 3},
        [b"x"],
    ),
    "streaming": ("streaming", {"pool": {"max": 2, "max_uses": 5}}, [bytes(200_000)]),
    "dead": ("exits-at-once", {"pool": {"max": 1}}, [b"x"]),
}
# Whatever happens, an answer is one of these; 404 while a function is removed and deployed again.
STATUSES = {200, 404, 429, 502, 503, 504}


class Chaos:
    """Callers that leave, a user who changes everything, and somebody who kills instances."""

    def __init__(self, poold: Poold, seed: int) -> None:
        self._poold, self._seed = poold, seed
        self._stop = threading.Event()
        self.seen: Counter[int] = Counter()

    def run(self) -> None:
        with background() as begin:
            futures = [begin(self._call, number) for number in range(CALLERS)]
            futures += [begin(self._steer), begin(self._kill)]
            try:
                self._stop.wait(LASTS_S)
            finally:
                self._stop.set()
            for future in futures:
                future.result()

    def _call(self, number: int) -> None:
        rng = random.Random(f"{self._seed} caller {number}")
        while not self._stop.is_set():
            name = rng.choice(list(FUNCTIONS))
            body = rng.choice(FUNCTIONS[name][2])
            if rng.random() < 0.25:
                self._leave(rng, name, body)
                continue
            # An answer that its function broke off is cut, never made to look whole.
            with contextlib.suppress(IncompleteRead):
                self.seen[self._poold.ask(name, body=body).status] += 1

    def _leave(self, rng: random.Random, name: str, body: bytes) -> None:
        with self._poold.connect() as sock:
            head = f"POST /fn/{name}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with contextlib.suppress(ConnectionError):
                sock.sendall(head + body[: rng.randrange(len(body) + 1)])
            time.sleep(rng.random() * 0.1)

    def _steer(self) -> None:
        rng = random.Random(f"{self._seed} user")
        while not self._stop.wait(0.03):
            name = rng.choice(list(FUNCTIONS))
            code, spec, _ = FUNCTIONS[name]
            step = rng.choice(["recycle", "reset", "scale", "deploy", "deploy", "remove"])
            if step in ("recycle", "reset"):
                self._poold.call("POST", function_path(name, step))
            elif step == "scale":
                self._poold.call("POST", function_path(name, step), {"min": rng.randrange(2), "max": rng.randint(2, 4)})
            elif step == "deploy":
                with contextlib.suppress(RequestFailed):  # it may be killed while it starts
                    self._poold.deploy(name, code, **spec, env={"V": str(rng.randrange(3))}, wait=rng.random() < 0.5)
            else:
                self._poold.remove(name)
                self._poold.deploy(name, code, **spec, wait=False)

    def _kill(self) -> None:
        rng = random.Random(f"{self._seed} killer")
        while not self._stop.wait(0.1):
            found = [one for name in FUNCTIONS for one in self._poold.instances(name) if one["pid"]]
            if found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(found)["pid"], signal.SIGKILL)


@pytest.mark.parametrize(("backend", "seed"), [("process", 1), ("docker", 2)])
def test_chaos(backend: str, seed: int, request: pytest.FixtureRequest) -> None:
    host = str(request.getfixturevalue("docker_host")) if backend == "docker" else ""
    quick = {"limits": {"breaker_base_s": 0.2, "breaker_max_s": 0.5}}
    with Poold(backend, host, quick) as poold:
        bystander = Bystander(poold)
        for name, (code, spec, _) in FUNCTIONS.items():
            poold.deploy(name, code, **spec, wait=False)
        chaos = Chaos(poold, seed)
        chaos.run()
        assert chaos.seen[200]
        assert set(chaos.seen) <= STATUSES, chaos.seen

        def at_work() -> tuple[int, int, int]:
            status = poold.status()
            return status["running"], status["queued"], status["starts_in_flight"]

        wait_until(at_work, lambda found: found == (0, 0, 0), what="everything to come to rest")
        assert poold.ask("counter", body=b"x").status == 200
        assert poold.ask("slow", body=b"0").status == 200
        bystander.alone()
        assert poold.status()["memory"]["charged_mb"] == 64
        errors = [line for line in poold.log().splitlines() if '"level": "error"' in line]
        assert errors == []
