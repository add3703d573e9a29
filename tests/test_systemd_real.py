"""poold under a real systemd: installed by the script, started, restarted under load, reloaded, hung, stopped.

systemd runs in a container whose /usr is this host's own, so nothing has to be fetched for it; only its /etc is
made here. It boots in about two seconds.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120
POLL_S = 0.05
OTHERS = ("docker.service", "docker.socket", "containerd.service")
LINKS = ("bin", "sbin", "lib", "lib64")  # a merged /usr, as Debian has it
ETC = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nmessagebus:x:100:100::/:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nmessagebus:x:100:\nnogroup:x:65534:\n",
    "etc/machine-id": uuid.uuid4().hex + "\n",  # present: systemd does not take this for a first boot
    "etc/hostname": "poold-test\n",
}
CONFIG = '[daemon]\nbackend = "process"\n'
FUNCTION = "name: hello\ncode: .\npool: {min: 1, max: 4}\n"
BOOTSTRAP = """#!/usr/bin/python3
import http.server, os, time
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1.5)
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\\n")
    do_POST = do_GET
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Answer).serve_forever()
"""
# A client that notes every connection that was refused or broken, until a file says stop.
LOOP = """
import http.client, os, sys, json
counts = {"answered": 0, "failed": []}
while not os.path.exists("/tmp/stop"):
    connection = http.client.HTTPConnection("127.0.0.1", 7070, timeout=60)
    try:
        connection.request("GET", "/fn/hello/")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200 or body != b"ok\\n":
            counts["failed"].append(f"{answer.status} {body[:200]!r}")
        else:
            counts["answered"] += 1
            open("/tmp/answered", "w").write(str(counts["answered"]))
    except OSError as exc:
        counts["failed"].append(repr(exc))
    except http.client.HTTPException as exc:
        counts["failed"].append(repr(exc))
    finally:
        connection.close()
print(json.dumps(counts))
"""


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


class Host:
    """A container in which systemd is the first process."""

    def __init__(self, engine: str, name: str) -> None:
        self.docker = ("docker", "--host", engine)
        self.inside = (*self.docker, "exec", name)
        self.id = ""

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in it and wait."""
        done = run(*self.inside, *command, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.journal()}"
        return done

    def journal(self) -> str:
        """The last that systemd and the service said."""
        return run(*self.inside, "journalctl", "--no-pager", "-n", "60", check=False).stdout

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Run a command in it meanwhile."""
        return subprocess.Popen(
            [*self.inside, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in it."""
        script = f'umask 0; mkdir -p $(dirname {path}) && printf %s "$1" >{path} && chmod {mode:o} {path}'
        self.run("sh", "-c", script, "sh", text)

    def show(self, *properties: str) -> list[str]:
        """Values of poold.service's properties, in the order asked for."""
        done = self.run("systemctl", "show", "poold.service", *(f"--property={name}" for name in properties))
        found = dict(line.split("=", 1) for line in done.stdout.splitlines())
        return [found[name] for name in properties]

    def until(self, what: str, command: str) -> str:
        """Wait for a shell command to succeed; its output."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            done = self.run("sh", "-c", command, check=False)
            if done.returncode == 0:
                return done.stdout
            time.sleep(POLL_S)
        raise AssertionError(f"{what}: {command!r} did not succeed in {TIMEOUT_S} s\n{self.journal()}")

    def ask(self, path: str = "/fn/hello/") -> str:
        """Ask the function; its answer, or why there is none."""
        return self.run("curl", "-sS", "--max-time", "60", f"http://127.0.0.1:7070{path}", check=False).stdout

    def instances(self) -> list[str]:
        """Process ids of the function's code."""
        return self.run("pgrep", "-f", "python3? .*bootstrap", check=False).stdout.split()


def image_archive() -> bytes:
    """The root file system, as a tar: everything but its /etc is the host's or empty."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("usr", "var/log", "var/lib", "var/tmp", "run", "tmp", "proc", "sys", "dev", "opt", "root", "home"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name in LINKS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(entry)
        for name in OTHERS:  # this host's own services have no business in there
            entry = tarfile.TarInfo(f"etc/systemd/system/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/dev/null"
            archive.addfile(entry)
        for name, text in ETC.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poold and all that it needs, as wheels for the host's own Python: the container has no network."""
    directory = tmp_path_factory.mktemp("wheels")
    run(sys.executable, "-m", "pip", "--python", "/usr/bin/python3", "-qq", "wheel", "--wheel-dir", directory, ROOT)
    return directory


def remove_cgroups(container: str) -> None:
    """Remove what systemd made below the container's cgroup; the engine does not know of it.

    A process that was frozen there dies only when it thaws.
    """
    for state in Path("/sys/fs/cgroup").glob(f"freezer/docker/{container}/**/freezer.state"):
        state.write_text("THAWED")
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        left = f"*/{container}*"
        run("find", "/sys/fs/cgroup", "-depth", "-type", "d", "-path", left, "-delete", check=False)
        if not run("find", "/sys/fs/cgroup", "-type", "d", "-path", left).stdout:
            return
        assert time.monotonic() < deadline_s, f"the cgroups of {container} stay in use"
        time.sleep(POLL_S)


@pytest.fixture(scope="module")
def host(docker_host: str, wheels: Path) -> Iterator[Host]:
    """systemd, booted, with the checkout at /checkout and the wheels at /wheels."""
    name = f"poold-test-systemd-{uuid.uuid4().hex[:8]}"
    booted = Host(docker_host, name)
    made = subprocess.run([*booted.docker, "import", "-"], input=image_archive(), capture_output=True, check=True)
    image = made.stdout.decode().strip()
    options = ["--detach", f"--name={name}", "--env=container=docker", "--network=none"]
    options += ["--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--cap-add=SYS_PTRACE"]
    options += ["--security-opt=seccomp=unconfined", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"]
    options += ["--tmpfs=/run", "--tmpfs=/tmp", "--tmpfs=/usr/local", "--volume=/usr:/usr:ro"]
    options += [f"--volume={ROOT}:/checkout:ro", f"--volume={wheels}:/wheels:ro"]
    try:
        booted.id = run(*booted.docker, "run", *options, image, "/sbin/init").stdout.strip()
        booted.until("systemd boots", "systemctl is-system-running --wait")
        yield booted
    finally:
        run(*booted.docker, "rm", "--force", "--volumes", name, check=False)
        run(*booted.docker, "rmi", image, check=False)
        if booted.id:
            remove_cgroups(booted.id)


@pytest.fixture(scope="module")
def installed(host: Host) -> Host:
    """poold installed by the script, and a function deployed."""
    host.write("/etc/poold/poold.toml", CONFIG)
    host.run(
        "sh",
        "-c",
        "/checkout/systemd/install.sh --python /usr/bin/python3 --find-links /wheels --wheel /wheels/poold-*.whl",
    )
    host.run("systemctl", "enable", "--now", "poold.socket", "poold.service")
    host.write("/srv/hello/function.yaml", FUNCTION)
    host.write("/srv/hello/bootstrap", BOOTSTRAP, 0o755)
    host.write("/srv/loop.py", LOOP)
    host.run("/usr/local/bin/poolctl", "deploy", "/srv/hello")
    return host


@pytest.fixture
def active(installed: Host) -> Host:
    """The service runs and its function answers."""
    installed.run("systemctl", "start", "poold.service")
    assert installed.ask() == "ok\n"
    return installed


def test_the_service_is_active_when_it_is_ready(active: Host) -> None:
    assert active.show("ActiveState", "SubState", "Type", "StatusText") == ["active", "running", "notify", "serving"]
    status = json.loads(active.run("/usr/local/bin/poolctl", "--json", "status").stdout)
    assert status["backend"] == "process"
    assert str(status["pid"]) == active.show("MainPID")[0]
    # Who may administer is systemd's to say.
    assert active.run("stat", "-c", "%a %U %G", "/run/poold/poold.sock").stdout == "660 root poold\n"
    assert active.run("stat", "-c", "%a %U", "/var/lib/poold").stdout == "700 root\n"


def test_a_restart_refuses_no_connection(active: Host) -> None:
    active.run("rm", "-f", "/tmp/stop", "/tmp/answered")
    client = active.begin("python3", "/srv/loop.py")
    active.until("the client is at work", "[ $(cat /tmp/answered) -ge 20 ]")
    before = active.show("MainPID")
    active.run("systemctl", "restart", "poold.service")
    assert active.show("MainPID") != before
    at = int(active.run("cat", "/tmp/answered").stdout)
    active.until("the new one answers", f"[ $(cat /tmp/answered) -ge {at + 20} ]")
    active.run("touch", "/tmp/stop")
    counts = json.loads(client.communicate(timeout=TIMEOUT_S)[0])
    assert counts["failed"] == []
    assert counts["answered"] >= 40


def test_a_configuration_that_is_not_valid_is_not_taken(active: Host) -> None:
    pid = active.show("MainPID")
    active.write("/etc/poold/poold.toml", CONFIG + 'log_levle = "debug"\n')
    try:
        refused = active.run("systemctl", "reload", "poold.service", check=False)
        assert refused.returncode != 0
        log = active.run("journalctl", "--no-pager", "-u", "poold.service").stdout
        assert "poold.toml:3" in log
        assert "log_levle" in log
        # The signal alone, without the unit's check in front of it: the daemon refuses by itself.
        active.run("systemctl", "kill", "--kill-who=main", "--signal=HUP", "poold.service")
        active.until("poold says so", "poolctl status 2>&1 | grep -q 'not reloaded'")
    finally:
        active.write("/etc/poold/poold.toml", CONFIG)
    assert active.show("MainPID", "ActiveState") == [*pid, "active"]
    assert active.ask() == "ok\n"


def test_a_valid_configuration_is_taken_without_a_restart(active: Host) -> None:
    pid = active.show("MainPID")
    active.write("/etc/poold/poold.toml", '[http]\nallowed_hosts = ["pool.test"]\n' + CONFIG)
    active.run("systemctl", "reload", "poold.service")
    active.until("it is in force", "! curl -sf http://127.0.0.1:7070/fn/hello/")
    assert active.run("curl", "-sf", "-H", "Host: pool.test", "http://127.0.0.1:7070/fn/hello/").stdout == "ok\n"
    active.write("/etc/poold/poold.toml", CONFIG)
    active.run("systemctl", "reload", "poold.service")
    active.until("and again", "curl -sf http://127.0.0.1:7070/fn/hello/")
    assert active.show("MainPID") == pid


def test_a_daemon_that_hangs_is_replaced(active: Host) -> None:
    active.write("/run/systemd/system/poold.service.d/quick.conf", "[Service]\nWatchdogSec=2\n")
    active.run("systemctl", "daemon-reload")
    active.run("systemctl", "restart", "poold.service")
    try:
        pid, began = active.show("MainPID", "NRestarts")
        active.run("kill", "-STOP", pid)
        active.until("systemd replaces it", f"[ $(systemctl show poold -P NRestarts) -gt {began} ]")
        active.until("the next is ready", "[ $(systemctl is-active poold) = active ]")
        assert active.show("MainPID") != [pid]
        assert "watchdog" in active.run("journalctl", "--no-pager", "-u", "poold.service").stdout.lower()
        assert active.ask() == "ok\n"
        assert len(active.instances()) == 1
    finally:
        active.run("rm", "-r", "/run/systemd/system/poold.service.d")
        active.run("systemctl", "daemon-reload")


def test_a_daemon_that_is_killed_leaves_no_instance_of_its_own(active: Host) -> None:
    began = active.show("NRestarts")[0]
    left = set(active.instances())
    active.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "poold.service")
    active.until("systemd starts another", f"[ $(systemctl show poold -P NRestarts) -gt {began} ]")
    active.until("it is ready", "[ $(systemctl is-active poold) = active ]")
    assert active.ask() == "ok\n"
    assert left.isdisjoint(active.instances())


def test_a_stop_answers_what_runs_and_leaves_nothing(active: Host) -> None:
    slow = active.begin("curl", "-sS", "--max-time", "60", "http://127.0.0.1:7070/fn/hello/slow")
    active.until("it runs", "poolctl --json status | grep -q '\"running\": 1'")
    active.run("systemctl", "stop", "poold.service")
    assert slow.communicate(timeout=TIMEOUT_S)[0] == "ok\n"
    assert active.show("ActiveState", "Result", "MainPID") == ["inactive", "success", "0"]
    assert active.instances() == []
    assert active.run("find", "/sys/fs/cgroup", "-path", f"*{active.id}*/poold.service/poold*").stdout == ""
    # The sockets stay: whoever connects starts it again, with the functions it had.
    assert active.ask() == "ok\n"
    assert active.show("ActiveState") == ["active"]


def test_uninstalling_leaves_what_the_user_made(active: Host) -> None:
    active.run("/checkout/systemd/install.sh", "--uninstall")
    assert active.run("systemctl", "is-active", "poold.service", "poold.socket", check=False).stdout.split() == [
        "inactive",
        "inactive",
    ]
    gone = "! ls /opt/poold /usr/local/bin/poold /etc/systemd/system/poold.* /run/poold/poold.sock"
    active.run("sh", "-c", f"{gone} 2>/dev/null")
    active.run("ls", "/etc/poold/poold.toml", "/var/lib/poold/poold.db")
    active.run("/checkout/systemd/install.sh", "--uninstall", "--purge")
    active.run("sh", "-c", "! ls -d /etc/poold /var/lib/poold /var/log/poold 2>/dev/null")
