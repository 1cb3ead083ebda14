"""A path of the server as a row: what it takes, what it gives, who answers. Routes and OpenAPI are made of these."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from qcn_compile.runtime.server.errors import ApiError, bad_request, from_validation
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.sse import ClientGone

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """`public`: answered without an API key. `streams`: gives events when the body says `stream`."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    reply: type[BaseModel] | None = None
    streams: bool = False
    public: bool = False
    media_type: str = "application/json"


async def read(service: Service, request: Request, model: type[B]) -> B:
    """The body, checked. Raises ApiError 400 or 413, ClientGone when the client left while sending."""
    try:
        return model.model_validate_json(await _bytes(request, service.config.limits.body_bytes), strict=True)
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise bad_request("the body is nested too deep", code="invalid_json") from None


async def _bytes(request: Request, limit: int) -> bytes:
    error = ApiError(413, f"the body is larger than {limit} bytes (--max-body-bytes)", code="request_too_large")
    if int(request.headers.get("content-length") or 0) > limit:
        raise error
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise error
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)
