"""The OpenAPI document: valid, complete, and true."""

from __future__ import annotations

import msgspec
import pytest
import trio
from gateway_fake_parts import Parts, fake_view
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.apis.native_routes import PASSED_METHODS


@pytest.fixture
def parts(nursery: trio.Nursery) -> Parts:
    return Parts(nursery)


@pytest.mark.trio
async def test_the_document_is_valid_and_holds_every_route(parts: Parts) -> None:
    status, document = await parts.ask("GET", "/v1/openapi.json")
    assert status == 200
    errors = [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()]
    assert errors == []
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(route.method, route.pattern) for route in parts.router.routes}
    assert ("POST", "/v1/functions/{name}/invoke") in described
    assert {("GET", "/fn/{name}/{path}"), ("PATCH", "/fn/{name}/{path}")} <= described
    assert len(PASSED_METHODS) == 7


@pytest.mark.trio
async def test_the_document_says_who_may(parts: Parts) -> None:
    _, document = await parts.ask("GET", "/v1/openapi.json")
    public = {path for path, item in document["paths"].items() for one in item.values() if not one["x-poold-admin"]}
    assert public == {
        "/healthz",
        "/metrics",
        "/v1/openapi.json",
        "/fn/{name}/{path}",
        "/v1/functions/{name}/invoke",
    }


@pytest.mark.trio
async def test_answers_have_the_shapes_the_document_promises(parts: Parts) -> None:
    revision = parts.registry.add().revision.id
    parts.pools.views = [fake_view(1, revision)]
    _, document = await parts.ask("GET", "/v1/openapi.json")
    for path in ("/v1/functions", "/v1/functions/hello", "/v1/instances", "/v1/status", "/healthz"):
        _, answer = await parts.ask("GET", path)
        described = path.replace("/hello", "/{name}")
        schema = document["paths"][described]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        Draft202012Validator(schema | {"components": document["components"]}).validate(answer)


def test_every_view_can_be_encoded_and_read_back() -> None:
    from gateway_fake_daemon import function_info, status_info

    for value in (function_info(), status_info()):
        assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value
