"""The table of the native API's routes, with what the OpenAPI document says of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.apis.views import (
    Checked,
    CodeStored,
    Deployed,
    Done,
    Finished,
    FunctionInfo,
    FunctionList,
    Health,
    InstanceList,
    LogEntry,
    Progress,
    ScaleRequest,
    Status,
)
from gateway.openapi import Error
from gateway.router import JSON, Answer, QueryParameter, Route
from pool.spec import FunctionSpec

if TYPE_CHECKING:
    from gateway.apis.native import NativeApi

YAML = "application/yaml"
TAR = "application/x-tar"
BYTES = "application/octet-stream"
ANY = "*/*"

INVOKED = (
    "Carries X-Poold-Start (warm, thawed, prewarmed, cold), X-Poold-Invocation and Server-Timing; "
    "X-Poold-Function-Error when the contract calls the answer the function's failure."
)
INVOKE_ERRORS = (404, 413, 429, 502, 503, 504)
PASSED_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def table(api: NativeApi) -> list[Route]:
    """Every route of the native API, those that the server answers itself included."""
    return [*_deploying(api), *_looking(api), *_steering(api), *_host(api), *_public(api), *_invoking()]


def _deploying(api: NativeApi) -> list[Route]:
    return [
        Route(
            "PUT",
            "/v1/code",
            api.put_code,
            "Upload a code directory",
            "putCode",
            description="A tar, compressed or not, with the directory's content at its top. The same content gives "
            "the same digest; deploy with ?code=DIGEST.",
            request_media=(TAR,),
            answers={200: Answer("Stored", CodeStored)},
            errors=(413, 422, 503),
        ),
        Route(
            "PUT",
            "/v1/functions/{name}",
            api.put_function,
            "Deploy a function, or a new revision of it",
            "putFunction",
            description="The new revision is made ready before the old one goes. With `Accept: application/x-ndjson` "
            'the answer is 200 at once, then {"progress"} lines and at the end {"result"} or {"error"}.',
            query=(
                QueryParameter("code", "string", "The digest of an uploaded code directory."),
                QueryParameter("wait", "boolean", "Answer when the floor pool is ready (the default), or at once."),
            ),
            request=FunctionSpec,
            request_media=(YAML, JSON),
            answers={200: Answer("Deployed; as ndjson its course", Deployed, lines=(Progress, Finished, Error))},
            errors=(400, 413, 422, 503),
        ),
        Route(
            "POST",
            "/v1/specs/check",
            api.check_specs,
            "Validate specs without deploying them",
            "checkSpecs",
            description="One or several YAML documents, or JSON. Every problem is reported with its line.",
            request=FunctionSpec,
            request_media=(YAML, JSON),
            answers={200: Answer("All are valid", Checked)},
            errors=(400, 413),
        ),
    ]


def _looking(api: NativeApi) -> list[Route]:
    return [
        Route(
            "GET",
            "/v1/functions",
            api.list_functions,
            "List the deployed functions",
            "listFunctions",
            answers={200: Answer("By name", FunctionList)},
        ),
        Route(
            "GET",
            "/v1/functions/{name}",
            api.get_function,
            "Everything about one function",
            "getFunction",
            answers={200: Answer("Spec, revision, pool, breaker, estimates, totals, instances", FunctionInfo)},
            errors=(404,),
        ),
        Route(
            "GET",
            "/v1/functions/{name}/logs",
            api.get_logs,
            "What its instances printed",
            "getLogs",
            query=(
                QueryParameter("tail", "integer", "Begin so many lines back (100)."),
                QueryParameter("follow", "boolean", "Go on with what comes."),
                QueryParameter("instance", "string", "Only this instance's."),
                QueryParameter("invocation", "string", "Only what this invocation printed."),
            ),
            answers={200: Answer("One line each, oldest first", media=(), lines=(LogEntry,))},
            errors=(400, 404),
        ),
        Route(
            "GET",
            "/v1/instances",
            api.list_instances,
            "List the instances of all functions",
            "listInstances",
            answers={200: Answer("By function and age", InstanceList)},
        ),
    ]


def _steering(api: NativeApi) -> list[Route]:
    done = {200: Answer("Done", Done)}
    return [
        Route(
            "DELETE",
            "/v1/functions/{name}",
            api.delete_function,
            "Remove a function and its instances",
            "deleteFunction",
            description="What runs ends first; what waits is refused.",
            answers=done,
            errors=(404, 503),
        ),
        Route(
            "POST",
            "/v1/functions/{name}/scale",
            api.scale_function,
            "Change a function's floor and ceiling",
            "scaleFunction",
            request=ScaleRequest,
            request_media=(JSON,),
            answers=done,
            errors=(400, 404),
        ),
        Route(
            "POST",
            "/v1/functions/{name}/recycle",
            api.recycle_function,
            "Replace every instance by a fresh one",
            "recycleFunction",
            answers=done,
            errors=(404,),
        ),
        Route(
            "POST",
            "/v1/functions/{name}/reset",
            api.reset_function,
            "Close the breaker: let a function that crashed again and again start now",
            "resetFunction",
            answers=done,
            errors=(404,),
        ),
    ]


def _host(api: NativeApi) -> list[Route]:
    return [
        Route(
            "GET",
            "/v1/status",
            api.get_status,
            "The daemon's state",
            "getStatus",
            tag="daemon",
            answers={200: Answer("Backend, limits, memory, totals, warnings", Status)},
        ),
        Route(
            "POST",
            "/v1/drain",
            api.drain,
            "Refuse what is new and let what runs end",
            "drain",
            tag="daemon",
            answers={202: Answer("Begun; GET /v1/status tells how far it is", Done)},
        ),
        Route(
            "GET",
            "/v1/journal",
            api.get_journal,
            "The scheduler's journal, to replay an incident",
            "getJournal",
            tag="daemon",
            answers={200: Answer("The last events, oldest first", None, (BYTES,))},
        ),
    ]


def _public(api: NativeApi) -> list[Route]:
    return [
        Route(
            "GET",
            "/healthz",
            api.get_health,
            "The daemon answers",
            "getHealth",
            admin=False,
            tag="daemon",
            answers={200: Answer("It does", Health)},
        ),
        Route(
            "GET",
            "/metrics",
            api.get_metrics,
            "Counters and gauges for Prometheus",
            "getMetrics",
            admin=False,
            tag="daemon",
            answers={200: Answer("The text format, version 0.0.4", None, ("text/plain",))},
        ),
        Route(
            "GET",
            "/v1/openapi.json",
            api.get_document,
            "This document",
            "getDocument",
            admin=False,
            tag="daemon",
            answers={200: Answer("OpenAPI 3.1", dict[str, Any])},
        ),
    ]


def _invoking() -> list[Route]:
    invoke = Route(
        "POST",
        "/v1/functions/{name}/invoke",
        None,
        "Invoke a function with an event",
        "invoke",
        admin=False,
        tag="invocations",
        description=f"The body is the event, passed on as it is; the answer is the function's. {INVOKED}",
        request_media=(ANY,),
        request_required=False,
        answers={200: Answer("The function's answer; its status may be another", None, (ANY,))},
        errors=INVOKE_ERRORS,
    )
    passed = [
        Route(
            method,
            "/fn/{name}/{path}",
            None,
            "Pass an HTTP request through to a function",
            f"passThrough{method.capitalize()}",
            admin=False,
            tag="invocations",
            description="The function sees the rest of the path (which may hold more slashes, or nothing), the query, "
            f"the headers and the body; streams both ways. {INVOKED}",
            request_media=(ANY,) if method in ("POST", "PUT", "PATCH") else (),
            request_required=False,
            answers={200: Answer("The function's answer; its status may be another", None, (ANY,))},
            errors=INVOKE_ERRORS,
        )
        for method in PASSED_METHODS
    ]
    return [invoke, *passed]
