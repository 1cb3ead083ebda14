"""The ASGI application: routes from the endpoint rows, keys, CORS, and every error in its API's shape."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qcn_compile.errors import QcnError
from qcn_compile.runtime.server.endpoint import Endpoint
from qcn_compile.runtime.server.errors import ApiError, from_runtime
from qcn_compile.runtime.server.openapi import document
from qcn_compile.runtime.server.routes import chat, completions, messages, plain, responses
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.sse import ClientGone

_GONE = 499  # nginx's number for a client that closed the connection: for the metrics alone
_log = logging.getLogger("qcn.server")
_Answer = Callable[[Request], Awaitable[Response]]


async def openapi(service: Service, request: Request) -> Response:
    """This API as OpenAPI."""
    return JSONResponse(_document())


@cache
def _document() -> dict[str, Any]:
    return document(ENDPOINTS)


ENDPOINTS = (*chat.ENDPOINTS, *completions.ENDPOINTS, *responses.ENDPOINTS, *messages.ENDPOINTS, *plain.ENDPOINTS,
             Endpoint("GET", "/openapi.json", openapi, "This document", public=True))


def create_app(service: Service) -> Starlette:
    """The application over a service whose bridge is started."""
    middleware = []
    if service.config.cors_origins:
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(service.config.cors_origins),
                                     allow_methods=["GET", "POST"], allow_headers=["*"]))
    routes = [Route(endpoint.path, _guarded(service, endpoint), methods=[endpoint.method]) for endpoint in ENDPOINTS]
    handlers = {HTTPException: _http_error}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)  # type: ignore[arg-type]


def _guarded(service: Service, endpoint: Endpoint) -> _Answer:
    """The handler behind the key check, with errors turned into answers."""
    keys = [key.encode() for key in service.config.api_keys]

    async def answer(request: Request) -> Response:
        try:
            if keys and not endpoint.public:
                _check_key(request, keys)
            response = await endpoint.handler(service, request)
        except ClientGone:
            response = Response(status_code=_GONE)
        except (ApiError, QcnError) as error:
            response = _error(from_runtime(error), endpoint.path)
        except Exception as error:
            _log.exception("%s %s failed", endpoint.method, endpoint.path)
            response = _error(from_runtime(error), endpoint.path)
        service.metrics.requests.labels(endpoint.path, str(response.status_code)).inc()
        return response

    return answer


def _error(error: ApiError, path: str) -> Response:
    return JSONResponse(error.body(path), error.status, error.headers)


def _check_key(request: Request, keys: Sequence[bytes]) -> None:
    """A bearer token or x-api-key that is one of the keys; all are compared, in constant time."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    matches = [hmac.compare_digest(given.encode(), key) for key in keys]
    if not any(matches):
        raise ApiError(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key",
                       headers={"WWW-Authenticate": "Bearer"})


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Paths and methods that are not there."""
    path = request.url.path
    text = f"there is no {path[:100]}; see /docs" if error.status_code == 404 else (
        f"{path[:100]} does not take {request.method[:16]}; see /docs")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return _error(ApiError(error.status_code, text, code=code, headers=error.headers), path)
