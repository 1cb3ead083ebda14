"""The OpenAPI document, made from the endpoint rows and their pydantic models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from qcn_compile.runtime.server.endpoint import Endpoint
from qcn_compile.runtime.server.schema.common import ErrorReply

_ERRORS = {"400": "a mistake in the request", "401": "no valid API key", "404": "no such model",
           "413": "the body is too large", "503": "too many requests, or shutting down", "504": "took too long"}
Schemas = Mapping[Any, dict[str, Any]]  # (model, mode) -> its schema


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The whole document."""
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(ErrorReply, "serialization")]
    wanted += [(e.body, "validation") for e in endpoints if e.body is not None]
    wanted += [(e.reply, "serialization") for e in endpoints if e.reply is not None]
    schemas, components = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path", "")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    return {"openapi": "3.1.0", "info": {"title": "qcn-run", "version": "1"}, "paths": paths,
            "components": {"schemas": components.get("$defs", {}),
                           "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}}


def _operation(endpoint: Endpoint, schemas: Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media_type: _schema(endpoint.reply, "serialization", schemas)}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {"summary": endpoint.summary, "operationId": endpoint.handler.__name__,
                                 "responses": {"200": {"description": "the answer", "content": content}}}
    if "{name" in endpoint.path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.body is not None:
        body = {"application/json": _schema(endpoint.body, "validation", schemas)}
        operation["requestBody"] = {"required": True, "content": body}
    if endpoint.path == "/health":
        operation["responses"]["503"] = {"description": "draining or failed", "content": content}
    if not endpoint.public:
        operation["security"] = [{"key": []}]
        error = {"application/json": _schema(ErrorReply, "serialization", schemas)}
        if endpoint.path.startswith("/v1/messages"):
            error = {"application/json": {"schema": {"type": "object"}}}
        for status, text in _ERRORS.items():
            operation["responses"][status] = {"description": text, "content": error}
    return operation


def _schema(model: type[BaseModel] | None, mode: JsonSchemaMode, schemas: Schemas) -> dict[str, Any]:
    return {"schema": {} if model is None else schemas[model, mode]}
