"""Function specs as their users write them, YAML or JSON, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import get_args

import msgspec
import yaml

from gateway.shape import Checker, Node, Path, Problem, nearest, place, written
from gateway.textual import TextError, read_text, scalar
from pool.contracts.registry import CONTRACTS
from pool.spec import AbsolutePath, FunctionSpec, Name
from scheduler.keepalive import REGISTRY as KEEPALIVE

# Where a bare number or boolean is taken as the text it was written as, the way docker-compose users expect of
# `PORT: 8080` and `command: [sleep, 10]`. (Unlike there, 1.10 stays 1.10.)
AS_WRITTEN: frozenset[Path] = frozenset((("env", "*"), ("command", "*"), ("entrypoint", "*"), ("security", "user")))

_WORDS: dict[str, str] = {
    get_args(Name)[1].pattern: "letters, digits, _ . and -, a letter or digit first, at most 63",
    get_args(AbsolutePath)[1].pattern: "must begin with /",
}

# What other tools call our keys.
_ALIASES = {
    "environment": "env",
    "environmentVariables": "env",
    "cpus": "cpu",
    "mem_limit": "memory_mb",
    "memory": "memory_mb",
    "memorySize": "memory_mb",
    "working_dir": "workdir",
    "workingDir": "workdir",
    "volumes": "mounts",
    "ports": "port",
    "caPort": "port",
    "cmd": "command",
    "args": "command",
    "timeout": "timeout_s",
    "instanceConcurrency": "concurrency",
    "network_mode": "network",
    "codeUri": "code",
    "functionName": "name",
    "minInstances": "min",
    "min_instances": "min",
    "maxInstances": "max",
    "max_instances": "max",
    "ttl_s": "keepalive_s",
}

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_USER = re.compile(r"([0-9]{1,10})(:[0-9]{1,10})?")
_CAPABILITY = re.compile(r"[A-Z][A-Z_]*")


class SpecError(Exception):
    """One or more specs are wrong; str() lists every problem, one a line, as `file:line: path: message (hint)`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: (problem.line, problem.column))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def parse_specs(text: str, source: str) -> list[FunctionSpec]:
    """Read function specs from YAML (one or several documents) or JSON.

    `source` names the text in messages: a file's name, or "request body". Raises SpecError with every problem
    found in all documents. Takes up to some seconds for a text near its limit (256 KB): call it in a thread for
    what came over the network.
    """
    try:
        nodes = read_text(text, source)
    except TextError as exc:
        raise SpecError(exc.problems) from None
    if not nodes:
        raise SpecError([Problem(source, 0, 0, "", "there is no function spec in it")])
    problems: list[Problem] = []
    specs: list[FunctionSpec] = []
    seen: dict[str, int] = {}
    for node in nodes:
        found: list[Problem] = []
        spec = _read(node, source, found)
        if spec is not None and spec.name in seen:
            line, column = place(node, ("name",))
            message = f"{spec.name} is there twice, first in line {seen[spec.name]}"
            found.append(Problem(source, line, column, "name", message))
        if spec is not None:
            seen[spec.name] = place(node, ("name",))[0]
            specs.append(spec)
        problems += found
    if problems:
        raise SpecError(problems)
    return specs


def _read(node: Node, source: str, problems: list[Problem]) -> FunctionSpec | None:
    def report(path: Path, message: str, hint: str) -> None:
        line, column = place(node, path)
        problems.append(Problem(source, line, column, written(path), message, hint))

    checker = Checker(report, AS_WRITTEN, _WORDS, _ALIASES)
    data = checker.check(node, msgspec.inspect.type_info(FunctionSpec))
    if problems:
        return None
    try:
        spec = msgspec.convert(data, FunctionSpec)
    except msgspec.ValidationError as exc:
        report((), str(exc), "")
        return None
    for path, message, hint in faults(spec, node):
        report(path, message, hint)
    return spec


# --- what no single value shows -----------------------------------------------------------------------------


def faults(spec: FunctionSpec, node: Node | None = None) -> list[tuple[Path, str, str]]:
    """What cannot work in a spec whose values each are fine: (path, problem, hint). `node`: what was written."""
    given = node.value if node is not None and isinstance(node.value, dict) else {}
    found = [*_run_faults(spec), *_limit_faults(spec), *_security_faults(spec), *_mount_faults(spec)]
    contract = CONTRACTS.get(spec.contract)
    if contract is None:
        found.append((("contract",), f"there is no contract {spec.contract}", _choices(spec.contract, CONTRACTS)))
    else:
        found += [(_path(path), message, "") for path, message in contract.check(spec)]
        for section in ("web", "fc"):
            if section in given and section != spec.contract:
                hint = f"leave it out, or write contract: {section}"
                found.append(((section,), f"has no effect with contract {spec.contract}", hint))
    if spec.pool.keepalive not in KEEPALIVE:
        hint = _choices(spec.pool.keepalive, KEEPALIVE)
        found.append((("pool", "keepalive"), f"there is no keep-alive policy {spec.pool.keepalive}", hint))
    return found


def _choices(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    meant = nearest(word, names)
    return f"did you mean {meant}?" if meant else f"there are: {', '.join(names)}"


def _path(text: str) -> Path:
    """A contract names an environment variable as env.NAME, and the name may have dots."""
    head, dot, rest = text.partition(".")
    return (head, rest) if dot else (head,)


def _run_faults(spec: FunctionSpec) -> Iterator[tuple[Path, str, str]]:
    if spec.image is None and spec.code is None:
        yield (), "neither image nor code is given", "image: names what to run; code: a directory with a bootstrap"
    if spec.image is not None and (spec.image != spec.image.strip() or re.search(r"\s", spec.image)):
        yield ("image",), "must not contain blanks", ""
    for name in spec.env:
        if not _ENV_NAME.fullmatch(name):
            hint = "letters, digits, _ . and -, no digit first"
            yield ("env", name), "is no name for an environment variable", hint
    if spec.network == "host":
        hint = "use bridge, none, or the name of a docker network"
        yield ("network",), "host is refused: the function could reach whatever the host can", hint
    elif not _NETWORK.fullmatch(spec.network):
        yield ("network",), "is no name of a network", "use bridge, none, or the name of a docker network"
    if spec.entrypoint == ():
        yield ("entrypoint",), "must not be empty", "leave it out to keep the image's own"


def _limit_faults(spec: FunctionSpec) -> Iterator[tuple[Path, str, str]]:
    pool = spec.pool
    if pool.min > pool.max:
        yield ("pool", "min"), f"min {pool.min} is more than max {pool.max}", ""
    slots = pool.max * spec.concurrency
    if spec.reserved > slots:
        hint = f"{pool.max} instances with {spec.concurrency} at a time serve {slots}"
        yield ("reserved",), f"{spec.reserved} can never be used", hint
    if pool.max_memory_mb is not None and pool.max_memory_mb >= spec.memory_mb:
        hint = f"memory_mb is {spec.memory_mb}, and at that the kernel ends the instance first"
        yield ("pool", "max_memory_mb"), f"{pool.max_memory_mb} would never be reached", hint


def _security_faults(spec: FunctionSpec) -> Iterator[tuple[Path, str, str]]:
    security = spec.security
    if security.user is not None:
        match = _USER.fullmatch(security.user)
        if match is None:
            yield ("security", "user"), "must be uid or uid:gid, in numbers", ""
        elif int(match[1]) == 0 and not security.allow_root:
            yield ("security", "user"), "0 is root, which is refused", "write security.allow_root: true if it must be"
    for i, capability in enumerate(security.cap_add):
        if not _CAPABILITY.fullmatch(capability):
            yield ("security", "cap_add", i), "is no name of a capability", "such as NET_BIND_SERVICE"


def _mount_faults(spec: FunctionSpec) -> Iterator[tuple[Path, str, str]]:
    targets: set[str] = set()
    for i, mount in enumerate(spec.mounts):
        target = "/" + mount.target.strip("/")
        if ".." in target.split("/"):
            yield ("mounts", i, "target"), "must not contain ..", ""
        elif target == "/":
            yield ("mounts", i, "target"), "cannot be the root itself", ""
        elif target in targets:
            yield ("mounts", i, "target"), f"{target} is mounted twice", ""
        targets.add(target)


# --- back to text -------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our own reader would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # YAML 1.1 breaks lines at the last three characters, too.
    plain = isinstance(scalar(text), str) and not re.search("[\x85\u2028\u2029]", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_float(dumper: yaml.SafeDumper, number: float) -> yaml.Node:
    if number.is_integer() and abs(number) < 1e15:
        return dumper.represent_int(int(number))
    return dumper.represent_float(number)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def spec_to_yaml(spec: FunctionSpec) -> str:
    """The spec as YAML that parse_specs reads back to an equal one; what has its default is left out."""
    data = msgspec.to_builtins(spec)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)
