"""The docker backend's pure parts: what it asks the engine for, and how it reads the answers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.backends.base import Output, StartRequest
from pool.backends.docker_client import DEFAULT_HOST, Endpoint, unavailable
from pool.backends.docker_container import (
    LOG_OPTIONS,
    NOBODY,
    Mount,
    command_of,
    container_config,
    container_name,
    effective_user,
    is_root,
)
from pool.backends.docker_errors import start_error
from pool.backends.docker_logs import Demultiplexer
from pool.backends.docker_running import exit_text
from pool.backends.docker_userland import host_userland, remote_userland
from pool.errors import BackendUnavailable, StartError
from pool.spec import Artifact, FunctionSpec, MountSpec, SecuritySpec, make_revision

# Where the engine is


@pytest.mark.parametrize(
    ("environ", "host", "tls", "verify"),
    [
        ({}, DEFAULT_HOST, False, True),
        ({"DOCKER_HOST": "unix:///x.sock", "DOCKER_TLS_VERIFY": "1"}, "unix:///x.sock", False, True),
        ({"DOCKER_HOST": "tcp://h:1"}, "tcp://h:1", False, True),
        ({"DOCKER_HOST": "tcp://h:1", "DOCKER_CERT_PATH": "/c"}, "tcp://h:1", True, False),
        ({"DOCKER_HOST": "tcp://h:1", "DOCKER_CERT_PATH": "/c", "DOCKER_TLS_VERIFY": "1"}, "tcp://h:1", True, True),
        ({"DOCKER_HOST": "tcp://h:1", "DOCKER_TLS_VERIFY": ""}, "tcp://h:1", False, True),
    ],
)
def test_dockers_own_environment_variables(environ: dict[str, str], host: str, tls: bool, verify: bool) -> None:
    endpoint = Endpoint.find(environ=environ)
    assert (endpoint.host, endpoint.tls) == (host, tls)
    if tls:
        assert endpoint.verify is verify
        assert endpoint.key == Path("/c/key.pem")


def test_what_is_given_goes_before_the_environment() -> None:
    environ = {"DOCKER_HOST": "tcp://far:2375", "DOCKER_CERT_PATH": "/env"}
    endpoint = Endpoint.find("tcp://near", "/given", True, environ)
    assert endpoint.address == ("near", 2376)
    assert endpoint.ca == Path("/given/ca.pem")
    assert Endpoint.find("unix:///s", environ=environ).socket_path == "/s"


def test_the_stamp_changes_with_the_certificates(tmp_path: Path) -> None:
    endpoint = Endpoint.find("tcp://h", tmp_path, True, {})
    seen = {endpoint.stamp()}
    for text in ("one", "two", "three"):
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(tmp_path / "cert.pem")
        seen.add(endpoint.stamp())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("host", "error", "words", "hint"),
    [
        ("unix:///s", FileNotFoundError(2, "No such file or directory"), "no such socket", "start the engine"),
        ("unix:///s", PermissionError(13, "Permission denied"), "permission denied", "group"),
        ("tcp://h:1", ConnectionRefusedError(111, "Connection refused"), "nothing listens", "start the engine"),
        ("tcp://h:1", TimeoutError("timed out"), "in time", "docker ps"),
        ("tcp://h:1", OSError("Client sent an HTTP request to an HTTPS server."), "TLS", "DOCKER_TLS_VERIFY"),
    ],
)
def test_why_there_is_no_engine(host: str, error: OSError, words: str, hint: str) -> None:
    """Whatever the SDK wraps around the cause."""
    outer = OSError("outer")
    outer.__cause__ = error
    told = unavailable(Endpoint(host), outer)
    assert host in told.message
    assert words in told.message
    assert hint in told.hint
    assert 'backend = "process"' in told.hint


# Output


def frame(output: int, data: bytes) -> bytes:
    return bytes([output, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=50)), max_size=10),
    st.lists(st.integers(min_value=1, max_value=30), max_size=200),
)
def test_frames_in_any_pieces_give_the_same_output(frames: list[tuple[int, bytes]], pieces: list[int]) -> None:
    got = {Output.STDOUT: b"", Output.STDERR: b""}

    def take(output: Output, data: bytes) -> None:
        got[output] += data

    parts, data = Demultiplexer(take), b"".join(frame(*one) for one in frames)
    for size in pieces:
        parts.feed(data[:size])
        data = data[size:]
    parts.feed(data)
    for output in Output:
        assert got[output] == b"".join(text for number, text in frames if number == output)


# Containers


IMAGE = Artifact(digest="sha256:1", image="sha256:1", entrypoint=("/own",), command=("arg",))


def config_of(spec: FunctionSpec, artifact: Artifact = IMAGE, mounts: list[Mount] | None = None) -> dict[str, Any]:
    request = StartRequest(
        instance_id="i", revision=make_revision(spec, artifact), env={"A": "1"}, port=1, on_output=lambda *_: None
    )
    return container_config(request, image="sha256:1", network="net", labels={"l": "v"}, mounts=mounts or [])


def test_the_defaults_are_hardened() -> None:
    config = config_of(FunctionSpec(name="f", image="x", memory_mb=64, cpu=0.25))
    assert config["User"] == NOBODY
    assert config["Env"] == ["A=1"]
    assert "Entrypoint" not in config
    assert "Cmd" not in config
    host = config["HostConfig"]
    assert host == host | {
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "CapAdd": [],
        "SecurityOpt": ["no-new-privileges"],
        "Memory": 64 << 20,
        "MemorySwap": 64 << 20,
        "CpuQuota": 25_000,
        "PidsLimit": 256,
        "Init": True,
        "IpcMode": "private",
        "NetworkMode": "net",
        "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
    }
    assert set(host["Tmpfs"]) == {"/tmp"}
    assert "size=64m" in host["Tmpfs"]["/tmp"]
    assert not {"PortBindings", "PublishAllPorts", "Privileged", "Runtime"} & set(host)


def test_a_mount_on_tmp_takes_the_place_of_the_tmpfs() -> None:
    spec = FunctionSpec(name="f", image="x", mounts=(MountSpec(source="/a", target="/tmp/"),))
    assert "Tmpfs" not in config_of(spec)["HostConfig"]


def test_departures_from_the_defaults() -> None:
    security = SecuritySpec(allow_root=True, cap_add=("NET_RAW",), read_only=False, runtime="crun", pids=9)
    config = config_of(FunctionSpec(name="f", image="x", security=security, workdir="/w"))
    host = config["HostConfig"]
    assert "User" not in config
    assert config["WorkingDir"] == "/w"
    assert (host["CapAdd"], host["ReadonlyRootfs"], host["Runtime"], host["PidsLimit"]) == (
        ["NET_RAW"],
        False,
        "crun",
        9,
    )


@pytest.mark.parametrize("user", ["", "root", "0", "root:root", "0:5", "000"])
def test_root_by_any_name(user: str) -> None:
    assert is_root(user)
    assert effective_user(FunctionSpec(name="f", image="x"), Artifact(digest="d", image="d", user=user)) == NOBODY


@pytest.mark.parametrize("user", ["app", "1000", "1000:0", "rooty"])
def test_an_images_own_user_stays(user: str) -> None:
    assert not is_root(user)
    assert effective_user(FunctionSpec(name="f", image="x"), Artifact(digest="d", image="d", user=user)) == user


def test_code_without_an_image_is_never_root_by_default() -> None:
    spec = FunctionSpec(name="f", code="c", security=SecuritySpec(allow_root=True))
    assert effective_user(spec, Artifact(digest="d")) == NOBODY
    assert (
        effective_user(FunctionSpec(name="f", code="c", security=SecuritySpec(user="0")), Artifact(digest="d")) == "0"
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image": "x"}, (None, None)),
        ({"image": "x", "command": ("a",)}, (None, ["a"])),
        ({"image": "x", "entrypoint": ("e", "f")}, (["e", "f"], [])),
        ({"image": "x", "entrypoint": ("e",), "command": ("a",)}, (["e"], ["a"])),
        ({"code": "c"}, (["/code/bootstrap"], [])),
        ({"code": "c", "image": "x"}, (["/code/bootstrap"], [])),
        ({"code": "c", "command": ("node", "x.js")}, (["node"], ["x.js"])),
        ({"code": "c", "entrypoint": ("node",), "command": ("x.js",)}, (["node"], ["x.js"])),
    ],
)
def test_which_command_runs(fields: dict[str, Any], expected: tuple[list[str] | None, list[str] | None]) -> None:
    assert command_of(FunctionSpec(name="f", **fields), "/code/") == expected


def test_names_fit_what_the_engine_allows() -> None:
    assert container_name("host/one:two", "f.a-b", "7:1") == "poold-host-one-f.a-b-7-1"


@pytest.mark.parametrize(
    ("code", "oom", "text"),
    [
        (0, False, "exit code 0"),
        (3, False, "exit code 3"),
        (127, False, "exit code 127 (its command was not found)"),
        (128, False, "exit code 128"),
        (137, False, "killed by signal 9 (SIGKILL)"),
        (137, True, "out of memory"),
        (128 + 33, False, "killed by signal 33"),
        (255, False, "exit code 255"),
    ],
)
def test_how_it_ended(code: int, oom: bool, text: str) -> None:
    assert exit_text(code, oom) == text


@pytest.mark.parametrize(
    ("status", "message", "permanent", "fault"),
    [
        (400, 'OCI runtime create failed: exec: "x": executable file not found in $PATH: unknown', True, False),
        (400, "invalid mount config for type bind: bind source path does not exist: /x", True, False),
        (500, "write /var/lib/docker: no space left on device", False, True),
        (500, "something odd\nin two lines", False, True),
        (409, "conflict: the name is in use", False, False),
    ],
)
def test_what_a_refused_start_means(status: int, message: str, permanent: bool, fault: bool) -> None:
    spec = FunctionSpec(name="fun", image="x")
    request = StartRequest(
        instance_id="i", revision=make_revision(spec, IMAGE), env={}, port=1, on_output=lambda *_: None
    )
    error = start_error(message, status, request)
    assert isinstance(error, StartError)
    assert (error.permanent, error.backend_fault) == (permanent, fault)
    assert "fun" in error.message
    assert "\n" not in error.message


def test_any_other_refusal_is_the_engines() -> None:
    request = StartRequest(
        instance_id="i",
        revision=make_revision(FunctionSpec(name="fun", image="x"), IMAGE),
        env={},
        port=1,
        on_output=lambda *_: None,
    )
    assert isinstance(start_error("denied by a proxy", 403, request), BackendUnavailable)


# The userland image


def names_in(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {entry.name: entry for entry in tar}


def fake_root(tmp_path: Path, merged: bool) -> Path:
    for folder in ("usr/bin", "usr/sbin", "usr/lib", "etc/ssl/certs", "etc/python3.11"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        if merged:
            (tmp_path / name).symlink_to(f"usr/{name}")
        else:
            (tmp_path / name).mkdir()
    (tmp_path / "sbin/ldconfig").touch()
    (tmp_path / "etc/ld.so.cache").touch()
    (tmp_path / "etc/shadow").touch()
    return tmp_path


def test_a_host_with_a_merged_usr(tmp_path: Path) -> None:
    userland = host_userland(fake_root(tmp_path, merged=True))
    entries = names_in(userland.archive)
    assert {mount.target for mount in userland.mounts} == {
        "/usr",
        "/etc/ssl/certs",
        "/etc/ld.so.cache",
        "/etc/python3.11",
    }
    assert all(mount.read_only for mount in userland.mounts)
    assert (entries["bin"].issym(), entries["bin"].linkname) == (True, "usr/bin")
    assert entries["sbin"].isdir()  # the engine's init is mounted in it, and must not be made on the host
    assert entries["sbin/ldconfig"].linkname == "/usr/sbin/ldconfig"
    assert entries["tmp"].mode == 0o1777
    assert "etc/shadow" not in entries
    assert host_userland(tmp_path).tag == userland.tag


def test_a_host_without_a_merged_usr(tmp_path: Path) -> None:
    userland = host_userland(fake_root(tmp_path, merged=False))
    entries = names_in(userland.archive)
    targets = {mount.source: mount.target for mount in userland.mounts}
    assert (targets["/bin"], targets["/lib"], targets["/sbin"]) == ("/bin", "/lib", "/.sbin")
    assert entries["sbin/ldconfig"].linkname == "/.sbin/ldconfig"
    assert entries["sbin"].isdir()


def test_another_host() -> None:
    userland = remote_userland()
    assert [mount.source for mount in userland.mounts] == ["/usr"]
    assert names_in(userland.archive)["lib64"].linkname == "usr/lib64"
