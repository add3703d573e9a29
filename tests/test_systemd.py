"""The units and the install script, as far as the host's systemd-analyze and a staging directory show.

tests/test_systemd_real.py runs them under a systemd.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from gateway.config import load_config

SYSTEMD = Path(__file__).parent.parent / "systemd"
# `systemd-analyze security` of systemd 252 says 5.0 of 10 ("medium"). What is open is what poold does: it enters
# namespaces and writes cgroups as root; poold.service names the reason beside each.
EXPOSURE_AT_MOST = 5.0


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units with a program that this host has in place of one that is not installed here."""
    copies = [tmp_path / name for name in ("poold.service", "poold.socket")]
    for copy in copies:
        copy.write_text((SYSTEMD / copy.name).read_text().replace("/opt/poold/bin/poold", "/bin/true"))
    return copies


def test_systemd_has_nothing_to_say_about_the_units(units: list[Path]) -> None:
    done = run("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_would_see_a_mistake(units: list[Path]) -> None:
    units[0].write_text(units[0].read_text().replace("KillMode=mixed", "KilMode=mixed"))
    assert "KilMode" in run("systemd-analyze", "verify", "--man=no", *units).stderr


def test_the_service_is_as_closed_as_we_say(units: list[Path]) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager"]
    at_most = round(EXPOSURE_AT_MOST * 10)
    done = run(*command, f"--threshold={at_most}", units[0])
    assert done.returncode == 0, done.stdout
    assert run(*command, f"--threshold={at_most - 1}", units[0]).returncode != 0, "tighten EXPOSURE_AT_MOST"


def test_the_unit_keeps_what_a_restart_without_a_refusal_rests_on() -> None:
    text = (SYSTEMD / "poold.service").read_text()
    for line in (
        "Type=notify",
        "KillMode=mixed",
        "RuntimeDirectoryPreserve=yes",
        "Requires=poold.socket",
        "WatchdogSec=10",
        "Restart=on-failure",
    ):
        assert f"\n{line}\n" in text
    socket_unit = configparser.ConfigParser(strict=False, interpolation=None)
    socket_unit.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case
    socket_unit.read(SYSTEMD / "poold.socket")
    assert socket_unit["Socket"]["ListenStream"] == "/run/poold/poold.sock"
    assert socket_unit["Socket"]["SocketMode"] == "0660"
    assert socket_unit["Socket"]["SocketGroup"] == "poold"


def test_the_unit_waits_longer_than_the_daemon_does() -> None:
    unit = (SYSTEMD / "poold.service").read_text()
    config = load_config(SYSTEMD / "poold.toml")  # what is installed; every key of it is valid
    for name, at_least_s in (
        ("TimeoutStartSec", config.daemon.ready_timeout_s),
        ("TimeoutStopSec", config.daemon.drain_timeout_s + 10),  # it also ends instances then
    ):
        found = re.search(rf"^{name}=(\d+)$", unit, re.MULTILINE)
        assert found is not None
        assert int(found[1]) > at_least_s
    assert config.daemon.state_dir == "/var/lib/poold"
    assert (config.http.listen, config.http.socket) == (("127.0.0.1:7070",), "/run/poold/poold.sock")


def small_wheel(directory: Path, version: str) -> Path:
    """A poold of one line, with the real one's commands: the script's steps are tested, not pip's resolver."""
    info = f"poold-{version}.dist-info"
    files = {
        "gateway/__init__.py": "",
        "gateway/daemon.py": f"def main():\n    print('this is {version}')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: poold\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\n"
        + "".join(f"{name} = gateway.daemon:main\n" for name in ("poold", "poolctl", "poolbench")),
    }
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},"
        for name, text in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    wheel = directory / f"poold-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def listing(root: Path) -> set[str]:
    """Every file below `root` but the program's and what systemd-sysusers makes, as the installed system names it."""
    found = {f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}
    users = {
        "/etc/group",
        "/etc/gshadow",
        "/etc/passwd",
        "/etc/shadow",
        "/etc/.pwd.lock",
        "/etc/group-",
        "/etc/gshadow-",
    }
    return {name for name in found if not name.startswith("/srv/poold/")} - users


def test_install_says_what_it_did_and_can_be_repeated_and_undone(tmp_path: Path) -> None:
    root = tmp_path / "stage"

    def script(*options: str | Path) -> list[str]:
        done = run(SYSTEMD / "install.sh", "--root", root, "--prefix", "/srv/poold", *options)
        assert done.returncode == 0, done.stderr
        return [" ".join(line.split()) for line in done.stdout.splitlines()[1:]]

    def install(version: str) -> list[str]:
        return script("--wheel", small_wheel(tmp_path, version), "--find-links", tmp_path)

    assert install("1.0") == [
        "installed poold 1.0 in /srv/poold",
        "linked /usr/local/bin: poold poolctl poolbench",
        "installed /etc/systemd/system/poold.service",
        "installed /etc/systemd/system/poold.socket",
        "installed /etc/sysusers.d/poold.conf",
        "installed /etc/tmpfiles.d/poold.conf",
        "installed /etc/poold/poold.toml",
    ]
    # It names the place where it will lie, and not the one where it was staged.
    assert (root / "srv/poold/bin/poold").read_text().startswith("#!/srv/poold/bin/python")
    assert (root / "usr/local/bin/poold").readlink() == Path("/srv/poold/bin/poold")
    assert "ExecStart=/srv/poold/bin/poold " in (root / "etc/systemd/system/poold.service").read_text()
    assert "poold:" in (root / "etc/group").read_text()

    config = root / "etc/poold/poold.toml"
    config.write_text("# mine\n")
    (root / "etc/systemd/system/poold.socket").write_text("# of an older version\n")
    assert install("1.1") == [
        "updated poold 1.1 in /srv/poold",
        "linked /usr/local/bin: poold poolctl poolbench",
        "unchanged /etc/systemd/system/poold.service",
        "updated /etc/systemd/system/poold.socket",
        "unchanged /etc/sysusers.d/poold.conf",
        "unchanged /etc/tmpfiles.d/poold.conf",
        "kept /etc/poold/poold.toml",
    ]
    assert config.read_text() == "# mine\n"

    assert script("--uninstall")[-1] == "kept /etc/poold"
    assert listing(root) == {"/etc/poold/poold.toml"}
    assert not (root / "srv/poold").exists()
    assert script("--uninstall", "--purge") == ["removed /etc/poold"]
    assert listing(root) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefix", "/srv/pool d"], "--prefix must be an absolute path of letters"),
        (["--prefix", "opt"], "--prefix must be an absolute path"),
        (["--prefix"], "--prefix needs a value"),
        (["--purge"], "--purge goes with --uninstall"),
        (["--colour"], "unknown option --colour"),
        (["--python", "/no/python"], "no /no/python here"),
        (["--wheel", "/no/poold.whl"], "no such wheel: /no/poold.whl"),
        (["--prefix", "/etc"], "/etc exists and is no virtual environment"),
    ],
)
def test_install_refuses_what_it_cannot_do(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "etc").mkdir()
    done = run(SYSTEMD / "install.sh", "--root", tmp_path, *options)
    assert done.returncode != 0
    assert message in done.stderr
    assert listing(tmp_path) == set()
