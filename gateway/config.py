"""The daemon's configuration: one TOML file in which every key has a default and an unknown key is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from gateway.shape import Checker, Problem, place, written
from gateway.shape import Path as KeyPath
from gateway.textual import TextError
from gateway.tomltext import read_toml
from scheduler.model import HostLimits

DEFAULT_PATH = Path("/etc/poold/poold.toml")
CONFIG_BYTES = 1_048_576
SOCKET_PATH_BYTES = 107  # what sun_path holds on Linux, less its end

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=86_400)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class DaemonSection(_Section, frozen=True):
    """The daemon itself."""

    state_dir: Annotated[str, Meta(description="where deployed functions, their code and the database live")] = (
        "/var/lib/poold"
    )
    backend: Annotated[
        Literal["auto", "docker", "process", "simulated"],
        Meta(description="what runs instances; auto: docker if an engine answers, else process"),
    ] = "auto"
    on_exit: Annotated[
        Literal["stop", "keep"],
        Meta(
            description="idle containers at the end: stop them, or keep them for the next poold; processes always end"
        ),
    ] = "stop"
    drain_timeout_s: Annotated[SecondsOrNone, Meta(description="how long running invocations may go on at the end")] = (
        30.0
    )
    ready_timeout_s: Annotated[
        SecondsOrNone, Meta(description="report readiness (READY=1) after this even if floor pools are not yet warm")
    ] = 60.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="the least that is logged")] = (
        "info"
    )
    log_format: Annotated[
        Literal["auto", "console", "json"], Meta(description="auto: console on a terminal, else json")
    ] = "auto"


class HttpSection(_Section, frozen=True):
    """The HTTP server."""

    listen: Annotated[
        tuple[str, ...], Meta(description='TCP addresses, "host:port" or "[v6]:port"; port 0: any free one')
    ] = ("127.0.0.1:7070",)
    socket: Annotated[str, Meta(description='the Unix socket, which may administer; "": none')] = (
        "/run/poold/poold.sock"
    )
    socket_mode: Annotated[str, Meta(description="its permissions, octal, in quotes")] = "0660"
    admin_on_tcp: Annotated[
        bool, Meta(description="true: whoever reaches a TCP address may deploy and remove functions")
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...], Meta(description="Host headers that are answered, without ports; empty: any")
    ] = ()
    max_connections: Annotated[Count, Meta(description="open at a time, over all addresses")] = 1024
    max_header_count: Annotated[int, Meta(ge=8, le=10_000, description="in one request")] = 100
    max_header_bytes: Annotated[
        int, Meta(ge=512, le=1_048_576, description="names and values of one request together")
    ] = 32_768
    max_target_bytes: Annotated[int, Meta(ge=64, le=1_048_576, description="of path and query")] = 8_192
    max_body_mb: Annotated[int, Meta(ge=1, le=1024, description="a function's own max_body_mb may be less")] = 64
    head_timeout_s: Annotated[Seconds, Meta(description="from a request's first byte to the end of its headers")] = 15.0
    idle_timeout_s: Annotated[Seconds, Meta(description="between two requests of a connection")] = 300.0
    body_timeout_s: Annotated[
        Seconds, Meta(description="without a byte of the body received, or of the answer taken")
    ] = 30.0
    access_log: Annotated[bool, Meta(description="true: one log line for each request")] = False


class LimitsSection(_Section, frozen=True):
    """Limits of the whole host."""

    memory_mb: Annotated[
        int, Meta(ge=0, le=1_000_000_000, description="of all instances together; 0: 80 % of the host's")
    ] = 0
    max_concurrency: Annotated[Count, Meta(description="invocations running at a time, over all functions")] = 1000
    tenant_concurrency: Annotated[
        int, Meta(ge=0, le=1_000_000, description="the same per tenant; 0: no such limit")
    ] = 0
    max_starts: Annotated[int, Meta(ge=0, le=1000, description="instances starting at a time; 0: one per core")] = 0
    breaker_failures: Annotated[
        Count, Meta(description="failed starts in a row after which a revision is not started for a while")
    ] = 3
    breaker_base_s: Annotated[Seconds, Meta(description="the first such pause; it doubles each time")] = 1.0
    breaker_max_s: Annotated[Seconds, Meta(description="and grows no further than this")] = 300.0
    journal_entries: Annotated[
        int, Meta(ge=0, le=1_000_000, description="scheduler events kept in memory, to replay an incident")
    ] = 10_000
    tenant_overrides: Annotated[
        dict[str, Count], Meta(description="tenant_concurrency of single tenants, by name")
    ] = {}


class DockerSection(_Section, frozen=True):
    """The docker backend."""

    host: Annotated[
        str, Meta(description='the engine, such as "tcp://10.0.0.5:2376"; "": DOCKER_HOST, else the local socket')
    ] = ""
    network: Annotated[
        str, Meta(description='the network of functions with network: bridge; "": one of poold\'s own')
    ] = ""
    registry_auth_file: Annotated[
        str, Meta(description='credentials for pulls, a docker config.json; "": that of the user poold runs as')
    ] = ""
    cert_path: Annotated[
        str,
        Meta(
            description="for an engine over TLS: a directory with ca.pem, cert.pem and key.pem, read again when they "
            'change; "": DOCKER_CERT_PATH'
        ),
    ] = ""


class ProcessSection(_Section, frozen=True):
    """The process backend."""

    sandbox: Annotated[
        Literal["auto", "bwrap", "unshare", "plain"],
        Meta(description="what isolates instances; plain: nothing; auto: the best that works here"),
    ] = "auto"


class Config(_Section, frozen=True):
    """The whole of it."""

    daemon: DaemonSection = DaemonSection()
    http: HttpSection = HttpSection()
    limits: LimitsSection = LimitsSection()
    docker: DockerSection = DockerSection()
    process: ProcessSection = ProcessSection()


# What a reload (SIGHUP) changes in a running daemon; the rest needs a restart.
RELOADABLE: frozenset[str] = frozenset(
    (
        "daemon.on_exit",
        "daemon.drain_timeout_s",
        "daemon.log_level",
        "http.admin_on_tcp",
        "http.allowed_hosts",
        "http.max_connections",
        "http.max_header_count",
        "http.max_header_bytes",
        "http.max_target_bytes",
        "http.max_body_mb",
        "http.head_timeout_s",
        "http.idle_timeout_s",
        "http.body_timeout_s",
        "http.access_log",
    )
)


class ConfigError(Exception):
    """The configuration cannot be used; str() lists every problem, one a line, as `file:line: key: message`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: (problem.line, problem.column))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def load_config(path: Path | None) -> Config:
    """Read the file; None gives the defaults. Blocks for a small file. Raises ConfigError."""
    if path is None:
        return Config()
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        raise _file_error(path, "there is no such file", "poold --print-config prints one to begin with") from None
    except OSError as exc:
        raise _file_error(path, f"cannot be read: {(exc.strerror or str(exc)).lower()}") from None
    except UnicodeDecodeError as exc:
        raise _file_error(path, f"is not UTF-8 (byte {exc.start})") from None
    if len(data) > CONFIG_BYTES:
        raise _file_error(path, "is larger than 1 MB, which no configuration should be")
    return parse_config(text, str(path))


def _file_error(path: Path, message: str, hint: str = "") -> ConfigError:
    return ConfigError([Problem(str(path), 0, 0, "", message, hint)])


def parse_config(text: str, source: str) -> Config:
    """Read a configuration; `source` names it in messages. Raises ConfigError with every problem found."""
    try:
        root = read_toml(text, source)
    except TextError as exc:
        raise ConfigError(exc.problems) from None
    problems: list[Problem] = []

    def report(path: KeyPath, message: str, hint: str) -> None:
        problems.append(Problem(source, *place(root, path), written(path), message, hint))

    data = Checker(report, language="TOML").check(root, msgspec.inspect.type_info(Config))
    if problems:
        raise ConfigError(problems)
    config = msgspec.convert(data, Config)
    for path, message, hint in faults(config):
        report(path, message, hint)
    if problems:
        raise ConfigError(problems)
    return config


def changed_keys(old: Config, new: Config) -> list[str]:
    """The keys, such as "http.listen", whose values differ; in the order of the file."""
    return [
        f"{section}.{key}"
        for section in Config.__struct_fields__
        for key in type(getattr(old, section)).__struct_fields__
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]


def host_limits(config: Config, *, host_memory_mb: int, cores: int) -> HostLimits:
    """The scheduler's limits, with what the configuration leaves to the host filled in."""
    limits = config.limits
    return HostLimits(
        memory_mb=limits.memory_mb or max(64, host_memory_mb * 8 // 10),
        max_concurrency=limits.max_concurrency,
        tenant_concurrency=limits.tenant_concurrency or None,
        tenant_overrides=dict(limits.tenant_overrides),
        max_starts=limits.max_starts or max(1, cores),
        breaker_failures=limits.breaker_failures,
        breaker_base_s=limits.breaker_base_s,
        breaker_max_s=limits.breaker_max_s,
        journal_entries=limits.journal_entries,
    )


# --- what no type shows -------------------------------------------------------------------------------------


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ValueError, saying what is wrong."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9_.-]*)):([0-9]{1,5})", text)
    if match is None:
        raise ValueError('must be "host:port", such as "127.0.0.1:7070" or "[::1]:7070"')
    host, port = match[1] or match[2], int(match[3])
    if not host:
        raise ValueError('the host is missing; write "0.0.0.0" to listen on every address')
    if port > 65_535:
        raise ValueError("a port is at most 65535")
    return host, port


def faults(config: Config) -> Iterator[tuple[KeyPath, str, str]]:
    """What cannot work though each value has its type: (path, problem, hint)."""
    if not config.daemon.state_dir.startswith("/"):
        yield ("daemon", "state_dir"), "must begin with /", ""
    yield from _http_faults(config.http)
    if config.limits.breaker_base_s > config.limits.breaker_max_s:
        yield ("limits", "breaker_base_s"), f"is more than breaker_max_s, {config.limits.breaker_max_s:g}", ""
    yield from _docker_faults(config.docker)


def _http_faults(http: HttpSection) -> Iterator[tuple[KeyPath, str, str]]:
    seen: set[tuple[str, int]] = set()
    for i, text in enumerate(http.listen):
        try:
            address = parse_address(text)
        except ValueError as exc:
            yield ("http", "listen", i), f'"{text}": {exc}', ""
            continue
        if address in seen and address[1]:
            yield ("http", "listen", i), f'"{text}" is there twice', ""
        seen.add(address)
    if http.socket and not http.socket.startswith("/"):
        yield ("http", "socket"), "must begin with /", 'write "" for no socket'
    elif len(http.socket.encode()) > SOCKET_PATH_BYTES:
        yield ("http", "socket"), f"is longer than {SOCKET_PATH_BYTES} bytes, which the system does not allow", ""
    if not re.fullmatch(r"0?[0-7]{3}", http.socket_mode):
        yield ("http", "socket_mode"), f'"{http.socket_mode}" is no set of permissions', 'such as "0660"'
    for i, host in enumerate(http.allowed_hosts):
        if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+", host):
            hint = "a name or an address, without scheme and port"
            yield ("http", "allowed_hosts", i), f'"{host}" is no host', hint


def _docker_faults(docker: DockerSection) -> Iterator[tuple[KeyPath, str, str]]:
    if docker.host and not re.match(r"(unix:///|tcp://|https?://|ssh://).", docker.host):
        yield ("docker", "host"), f'"{docker.host}" names no engine', 'such as "unix:///var/run/docker.sock"'
    for key in ("registry_auth_file", "cert_path"):
        if getattr(docker, key) and not getattr(docker, key).startswith("/"):
            yield ("docker", key), "must begin with /", ""


# --- as a file ----------------------------------------------------------------------------------------------


def config_text(config: Config | None = None) -> str:
    """A whole configuration file: every key with its value and what it means. None: the defaults."""
    config = config or Config()
    lines = [
        "# The configuration of poold. Every key is optional; what is written here is used instead of its default.",
        "# (r): changed in a running poold by a reload (SIGHUP). The others need a restart.",
    ]
    for section in Config.__struct_fields__:
        value = getattr(config, section)
        lines += ["", f"[{section}]"]
        hints = get_type_hints(type(value), include_extras=True)
        tables: list[str] = []
        for key in type(value).__struct_fields__:
            current = getattr(value, key)
            words = _description(hints[key])
            mark = "(r) " if f"{section}.{key}" in RELOADABLE else ""
            comment = f"{mark}{words}".strip()
            if isinstance(current, dict):
                tables += ["", f"# {comment}", f"[{section}.{key}]"]
                tables += [f"{_toml(name)} = {_toml(amount)}" for name, amount in current.items()]
                continue
            if comment:
                lines.append(f"# {comment}")
            lines.append(f"{key} = {_toml(current)}")
        lines += tables
    return "\n".join(lines) + "\n"


def _description(hint: object) -> str:
    """What a key means and the values it takes, from its annotation."""
    words = ""
    for meta in getattr(hint, "__metadata__", ()):
        words = (meta.description or words) if isinstance(meta, Meta) else words
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    choices = get_args(bare) if get_origin(bare) is Literal else ()
    if choices:
        listed = " | ".join(choices)
        return f"{words} ({listed})" if words else listed
    return words


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, str):
        return msgspec.json.encode(value).decode()  # what JSON escapes, TOML escapes alike
    return str(value)
