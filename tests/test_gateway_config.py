"""The configuration file: defaults, mistakes, what a reload changes."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import msgspec
import pytest

from gateway.config import (
    RELOADABLE,
    Config,
    ConfigError,
    DaemonSection,
    DockerSection,
    HttpSection,
    LimitsSection,
    changed_keys,
    config_text,
    host_limits,
    load_config,
    parse_address,
    parse_config,
)
from scheduler.model import HostLimits

EXAMPLE = Path(__file__).parent.parent / "examples" / "poold.toml"


def refusal(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "p.toml")
    return str(caught.value).splitlines()


def test_no_file_gives_the_defaults() -> None:
    config = load_config(None)
    assert config == Config()
    assert config.http.listen == ("127.0.0.1:7070",)
    assert config.http.admin_on_tcp is False


def test_the_printed_file_has_every_key_with_a_comment_and_reads_back() -> None:
    text = config_text()
    assert parse_config(text, "printed") == Config()
    data = tomllib.loads(text)
    for section in msgspec.structs.fields(Config):
        keys = [field.name for field in msgspec.structs.fields(type(getattr(Config(), section.name)))]
        assert list(data[section.name]) == keys
    lines = text.splitlines()
    bare = [line for before, line in itertools.pairwise(lines) if "=" in line and before.strip("# (r)") == ""]
    assert bare == []


def test_the_example_is_the_printed_file() -> None:
    assert EXAMPLE.read_text() == config_text(), "write it anew: poold --print-config > examples/poold.toml"


def test_a_changed_configuration_prints_and_reads_back(tmp_path: Path) -> None:
    config = Config(
        daemon=DaemonSection(drain_timeout_s=0.25, log_level="error"),
        http=HttpSection(listen=("[::1]:0", "0.0.0.0:80"), socket="", allowed_hosts=('a"b', "c\\d", "é\n")),
        limits=LimitsSection(tenant_overrides={"blue team": 3, "b": 4}),
        docker=DockerSection(host="tcp://10.0.0.5:2376"),
    )
    path = tmp_path / "p.toml"
    path.write_text(config_text(msgspec.structs.replace(config, http=HttpSection())))
    assert load_config(path) == msgspec.structs.replace(config, http=HttpSection())
    assert tomllib.loads(config_text(config))["http"]["allowed_hosts"] == ['a"b', "c\\d", "é\n"]


def test_some_keys_and_inline_tables() -> None:
    config = parse_config('http = {access_log = true}\ndaemon.log_level = "debug"\n', "p")
    assert config.http.access_log is True
    assert config.daemon.log_level == "debug"
    assert config.http.max_connections == 1024


def test_every_problem_is_told_with_its_line() -> None:
    text = """\
[htp]
[http]
listn = ["a"]
socket_mode = 660
listen = ["127.0.0.1:7070",
          "nonsense"]
max_connections = 0
[daemon]
log_level = "warn"
drain_timeout_s = "30s"
[limits.tenant_overrides]
a = "many"
"""
    assert refusal(text) == [
        "p.toml:1: htp: unknown key (did you mean http?)",
        "p.toml:3: http.listn: unknown key (did you mean listen?)",
        'p.toml:4: http.socket_mode: a text is needed, this is the number 660 (put it in quotes: "660")',
        "p.toml:7: http.max_connections: must be at least 1, this is 0",
        "p.toml:9: daemon.log_level: must be one of debug, error, info, warning, "
        'this is the text "warn" (did you mean warning?)',
        'p.toml:10: daemon.drain_timeout_s: a number is needed, this is the text "30s" (write 30, a number of seconds)',
        'p.toml:12: limits.tenant_overrides.a: a whole number is needed, this is the text "many"',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[http]\nlisten = ["nonsense"]', 'p.toml:2: http.listen[0]: "nonsense": must be "host:port"'),
        ('[http]\nlisten = [":80"]', "the host is missing"),
        ('[http]\nlisten = ["a:99999"]', "a port is at most 65535"),
        ('[http]\nlisten = ["a:1", "a:1"]', '"a:1" is there twice'),
        ('[http]\nlisten = "a:1"', "p.toml:2: http.listen: a list is needed"),
        ('[http]\nsocket = "poold.sock"', 'http.socket: must begin with / (write "" for no socket)'),
        (f'[http]\nsocket = "/{"x" * 110}"', "longer than 107 bytes"),
        ('[http]\nsocket_mode = "rw"', "no set of permissions"),
        ('[http]\nallowed_hosts = ["http://a"]', '"http://a" is no host (a name or an address'),
        ('[daemon]\nstate_dir = "state"', "daemon.state_dir: must begin with /"),
        ("[limits]\nbreaker_base_s = 400", "is more than breaker_max_s, 300"),
        ("[limits]\nmemory_mb = -1", "must be at least 0, this is -1"),
        ('[docker]\nhost = "here"', '"here" names no engine'),
        ('[docker]\ncert_path = "certs"', "docker.cert_path: must begin with /"),
        ("[http]\naccess_log = 1", "true or false is needed, this is the number 1 (write true)"),
        ("http = 3", "p.toml:1: http: a mapping is needed"),
        ("[http]\nlog = 2026-11-21", "unknown key"),
        ("[http]\nsocket = 2026-11-21", "must begin with /"),
        ("[http]\nsocket = /run/x", "p.toml:2: not readable as TOML: invalid value (a text needs quotes)"),
        ("[http]\nidle_timeout_s = 1\nidle_timeout_s = 2", "p.toml:3: not readable as TOML: cannot overwrite a value"),
        ("[http", "not readable as TOML"),
    ],
)
def test_one_mistake(text: str, expected: str) -> None:
    (line,) = refusal(text)
    assert expected in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such file \(poold --print-config"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 0\)"):
        load_config(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"#" * 1_048_577)
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        load_config(tmp_path / "large")


def test_which_keys_changed_and_which_of_them_a_reload_takes_over() -> None:
    old = Config()
    new = Config(
        daemon=DaemonSection(log_level="debug", state_dir="/elsewhere"), http=HttpSection(listen=(), access_log=True)
    )
    changed = changed_keys(old, new)
    assert changed == ["daemon.state_dir", "daemon.log_level", "http.listen", "http.access_log"]
    assert [key for key in changed if key not in RELOADABLE] == ["daemon.state_dir", "http.listen"]
    assert changed_keys(old, Config()) == []


def test_reloadable_keys_exist() -> None:
    for name in RELOADABLE:
        section, key = name.split(".")
        assert hasattr(getattr(Config(), section), key)


def test_limits_that_the_host_fills_in() -> None:
    assert host_limits(Config(), host_memory_mb=10_000, cores=6) == HostLimits(memory_mb=8_000, max_starts=6)
    own = Config(limits=LimitsSection(memory_mb=512, max_starts=1, tenant_concurrency=5, tenant_overrides={"a": 9}))
    limits = host_limits(own, host_memory_mb=10_000, cores=6)
    assert (limits.memory_mb, limits.max_starts, limits.tenant_concurrency) == (512, 1, 5)
    assert limits.tenant_overrides == {"a": 9}


def test_addresses() -> None:
    assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_address("[::1]:0") == ("::1", 0)
    with pytest.raises(ValueError, match="host:port"):
        parse_address("::1:80")
