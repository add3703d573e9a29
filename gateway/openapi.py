"""The API's description, made from the table of routes, so that the two cannot drift apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.router import JSON, NDJSON, Answer, Route

ERROR_TEXTS = {
    400: "The request is not valid; details name what and where.",
    403: "This socket may not administer the daemon.",
    404: "There is no such function, instance or route.",
    405: "The path takes other methods; see Allow.",
    409: "It cannot be done in the present state.",
    413: "The body is larger than the limit.",
    422: "The spec is valid, but what it names cannot be used or does not start.",
    429: "Over a limit; see Retry-After.",
    502: "The function failed to answer properly.",
    503: "No capacity, or the engine does not answer; see Retry-After.",
    504: "The function did not answer in time.",
}


class ErrorDetail(msgspec.Struct, omit_defaults=True):
    """One thing that was wrong: where in which text, or what an instance printed before it failed."""

    source: str = ""
    line: int = 0  # from 1; 0: unknown
    column: int = 0
    path: str = ""  # a key of the spec, such as pool.min
    message: str = ""
    hint: str = ""
    log_tail: str = ""


class ErrorInfo(msgspec.Struct, omit_defaults=True):
    """`code` is stable and for programs; `message` and `hint` are for people."""

    code: str
    message: str
    hint: str = ""
    retry_after_s: float | None = None
    details: list[ErrorDetail] = []


class Error(msgspec.Struct):
    """The body of every answer with an error status of the daemon's own."""

    error: ErrorInfo


def document(routes: Sequence[Route], *, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes, as JSON-able data."""
    shapes = _shapes(routes)
    schemas, components = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    by_shape = {repr(shape): schema for shape, schema in zip(shapes, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.pattern, {})[route.method.lower()] = _operation(route, by_shape)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "poold",
            "version": version,
            "description": "Warm pools of pre-started containers, one pool per function. Operations marked "
            "x-poold-admin are answered only on sockets that may administer the daemon.",
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(route.tag for route in routes)],
        "paths": paths,
        "components": {"schemas": components},
    }


def _shapes(routes: Sequence[Route]) -> list[Any]:
    found: dict[str, Any] = {repr(Error): Error}
    for route in routes:
        answers = route.answers.values()
        lines = (shape for answer in answers for shape in answer.lines)
        for shape in (route.request, *(answer.shape for answer in answers), *lines):
            if shape is not None:
                found[repr(shape)] = shape
    return list(found.values())


def _operation(route: Route, by_shape: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "tags": [route.tag],
        "x-poold-admin": route.admin,
    }
    if route.description:
        operation["description"] = route.description
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.parameters()
    ]
    parameters += [
        {"name": query.name, "in": "query", "description": query.description, "schema": {"type": query.kind}}
        for query in route.query
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.request_media:
        schema = by_shape[repr(route.request)] if route.request is not None else None
        content = {media: _media(media, schema) for media in route.request_media}
        operation["requestBody"] = {"required": route.request_required, "content": content}
    operation["responses"] = _responses(route, by_shape)
    return operation


def _responses(route: Route, by_shape: dict[str, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in route.answers.items():
        responses[str(status)] = _answer(answer, by_shape)
    error = {JSON: {"schema": by_shape[repr(Error)]}}
    statuses = {*route.errors, *((403,) if route.admin else ())}
    for status in sorted(statuses):
        responses[str(status)] = {"description": ERROR_TEXTS[status], "content": error}
    return responses


def _answer(answer: Answer, by_shape: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": answer.description}
    schema = by_shape[repr(answer.shape)] if answer.shape is not None else None
    content = {media: _media(media, schema) for media in answer.media}
    if answer.lines:
        lines = [by_shape[repr(line)] for line in answer.lines]
        content[NDJSON] = {"schema": {"anyOf": lines} if len(lines) > 1 else lines[0]}
    if content:
        shown["content"] = content
    return shown


def _media(media: str, schema: Any) -> dict[str, Any]:
    # OpenAPI 3.1 leaves the schema out for bytes.
    return {} if schema is None or not re.search(r"json|yaml", media) else {"schema": schema}
