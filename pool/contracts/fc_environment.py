"""What a function under the fc contract is told of itself: variables, common headers; and what its spec may not say.

Rules: shared/CONTRACTS.md section 1, "Inside the instance".
"""

from __future__ import annotations

import re

from pool.spec import FunctionSpec, HookSpec

ENV_BYTES = 4 * 1024
START_LIMIT_S = 120.0
CODE_PATH = "/code/"

_HANDLER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/\-]{0,127}")
_VALUE = re.compile(r"[!-~]{0,128}")  # it goes into a header and a variable as it is


def hook_name(spec: FunctionSpec, hook: HookSpec | None, name: str) -> str:
    """How a hook is called in variables and headers: beside the handler in its file; "" when there is none."""
    return f"{spec.fc.handler.partition('.')[0]}.{name}" if hook is not None and hook.enabled else ""


def variables(spec: FunctionSpec, instance_id: str, port: int) -> dict[str, str]:
    """The environment of an instance, names of FC 2 and FC 3. Keys and tokens are empty: there is no cloud account."""
    fc = spec.fc
    initializer = hook_name(spec, fc.initializer, "initializer")
    return {
        "FC_FUNC_CODE_PATH": CODE_PATH,
        "FC_ACCOUNT_ID": fc.account_id,
        "FC_REGION": fc.region,
        "FC_SERVICE_NAME": fc.service,
        "FC_QUALIFIER": fc.qualifier,
        "FC_FUNCTION_NAME": spec.name,
        "FC_FUNCTION_VERSION": fc.qualifier,
        "FC_FUNCTION_HANDLER": fc.handler,
        "FC_HANDLER": fc.handler,
        "FC_FUNCTION_MEMORY_SIZE": str(spec.memory_mb),
        "FC_MEMORY_SIZE": str(spec.memory_mb),
        "FC_TIMEOUT": f"{spec.timeout_s:g}",
        "FC_INITIALIZER": initializer,
        "FC_INITIALIZATION_TIMEOUT": f"{fc.initializer.timeout_s:g}" if fc.initializer and initializer else "",
        "FC_CUSTOM_LISTEN_PORT": str(port),
        "FC_SERVER_PORT": str(port),
        "FC_INSTANCE_ID": instance_id,
        "ALIBABA_CLOUD_ACCESS_KEY_ID": "",
        "ALIBABA_CLOUD_ACCESS_KEY_SECRET": "",
        "ALIBABA_CLOUD_SECURITY_TOKEN": "",
    }


def common_headers(spec: FunctionSpec) -> bytes:
    """The header lines that are the same for every request to an instance; values that are not set are empty."""
    fc = spec.fc
    initializer = hook_name(spec, fc.initializer, "initializer")
    values = {
        "access-key-id": "",
        "access-key-secret": "",
        "security-token": "",
        "function-name": spec.name,
        "function-handler": fc.handler,
        "function-memory": str(spec.memory_mb),
        "function-timeout": f"{spec.timeout_s:g}",
        "function-initializer": initializer,
        "initialization-timeout": f"{fc.initializer.timeout_s:g}" if fc.initializer and initializer else "",
        "instance-lifecycle-pre-stop-handler": hook_name(spec, fc.pre_stop, "pre_stop"),
        "instance-lifecycle-pre-freeze-handler": hook_name(spec, fc.pre_freeze, "pre_freeze"),
        "region": fc.region,
        "account-id": fc.account_id,
        "qualifier": fc.qualifier,
        "version-id": fc.qualifier if fc.qualifier.isdigit() else "",  # an alias is no version
        "service-name": fc.service,
        "service-logproject": "",
        "service-logstore": "",
    }
    return "".join(f"x-fc-{name}: {value}\r\n" for name, value in values.items()).encode("ascii")


def check_spec(spec: FunctionSpec) -> list[tuple[str, str]]:
    """What the spec says that this contract does not allow. See Contract.check."""
    problems = [
        (f"env.{name}", "names that begin with FC_ are the platform's under the contract fc; choose another name")
        for name in spec.env
        if name.startswith("FC_")
    ]
    size = sum(len(name.encode()) + len(value.encode()) for name, value in spec.env.items())
    if size > ENV_BYTES:
        problems.append(("env", f"{size} bytes of names and values; the contract fc allows {ENV_BYTES}"))
    if spec.start_timeout_s > START_LIMIT_S:
        problems.append(("start_timeout_s", f"at most {START_LIMIT_S:g} under the contract fc"))
    fc = spec.fc
    if not _HANDLER.fullmatch(fc.handler):
        problems.append(("fc.handler", "letters, digits and _ . : / -, such as index.handler, at most 128"))
    for name, value in (
        ("service", fc.service),
        ("qualifier", fc.qualifier),
        ("region", fc.region),
        ("account_id", fc.account_id),
    ):
        if not _VALUE.fullmatch(value):
            problems.append((f"fc.{name}", "at most 128 printable ASCII characters without spaces"))
    return problems
