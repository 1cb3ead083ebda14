"""The small endpoints: models, tokens, health, metrics, live state, pages."""

from __future__ import annotations

import time
from functools import cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from qcn_compile.runtime.server.endpoint import Endpoint, read
from qcn_compile.runtime.server.errors import bad_request
from qcn_compile.runtime.server.prompts import chat_messages, template_tools
from qcn_compile.runtime.server.schema.plain import (
    DetokenizeReply,
    DetokenizeRequest,
    HealthReply,
    ModelReply,
    ModelsReply,
    StateReply,
    TokenizeReply,
    TokenizeRequest,
)
from qcn_compile.runtime.server.service import Service

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def _model(service: Service, name: str) -> ModelReply:
    return ModelReply(id=name, created=int(service.started), max_model_len=service.context_length)


async def models(service: Service, request: Request) -> Response:
    """The names this server answers to."""
    reply = ModelsReply(data=[_model(service, name) for name in service.config.model_names])
    return JSONResponse(reply.model_dump())


async def model(service: Service, request: Request) -> Response:
    """One of them."""
    return JSONResponse(_model(service, service.check_model(request.path_params["name"])).model_dump())


async def tokenize(service: Service, request: Request) -> Response:
    """Text or messages to token ids."""
    body = await read(service, request, TokenizeRequest)
    service.check_model(body.model)
    text = body.prompt if body.prompt is not None else body.text
    if (text is None) == (body.messages is None):
        raise bad_request("prompt: give a text here, or messages", "prompt")
    if text is None:
        text = await service.prompt(chat_messages(body.messages or []), template_tools(body.tools),
                                    body.chat_template_kwargs or {}, body.add_generation_prompt)
    tokens = await service.encode(text)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": service.context_length})


async def detokenize(service: Service, request: Request) -> Response:
    """Token ids to text."""
    body = await read(service, request, DetokenizeRequest)
    service.check_model(body.model)
    for place, token in enumerate(body.tokens):
        if not 0 <= token < service.vocab_size:
            raise bad_request(f"tokens[{place}]: {token} is outside the vocabulary of {service.vocab_size}",
                              f"tokens[{place}]")
    text = service.tokenizer.decode(body.tokens)
    return JSONResponse({"prompt": text, "text": text})


async def health(service: Service, request: Request) -> Response:
    """200 while it serves, 503 while it drains or after it failed."""
    status = service.status()
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


async def metrics(service: Service, request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def state(service: Service, request: Request) -> Response:
    """Live numbers."""
    full, totals = service.occupancy(), service.metrics.totals
    return JSONResponse(StateReply(
        model=service.config.model_name, status=service.status(), uptime=time.time() - service.started,
        running=full.running, queued=full.queued, slots=full.slots, kv_pages_used=full.pages_used, kv_pages=full.pages,
        context_length=service.context_length, tokens_per_second=service.metrics.rate(), **totals).model_dump())


@cache
def _static(name: str) -> str:
    return (resources.files("qcn_compile.runtime.server") / "static" / name).read_text(encoding="utf-8")


async def page(service: Service, request: Request) -> Response:
    """The chat page."""
    return HTMLResponse(_static("index.html"), headers={"Content-Security-Policy": _POLICY})


async def docs(service: Service, request: Request) -> Response:
    """The API's documentation, made from /openapi.json."""
    return HTMLResponse(_static("docs.html"), headers={"Content-Security-Policy": _POLICY})


async def configure(service: Service, request: Request) -> Response:
    """The commands for other hardware, with the planner's verdicts."""
    return HTMLResponse(_static("configure.html"), headers={"Content-Security-Policy": _POLICY})


async def verdicts(service: Service, request: Request) -> Response:
    """What the planner said about every GPU it knows, when this version was made."""
    return Response(_static("verdicts.json"), media_type="application/json")


ENDPOINTS = (
    Endpoint("GET", "/v1/models", models, "Models served", reply=ModelsReply),
    Endpoint("GET", "/v1/models/{name:path}", model, "One model", reply=ModelReply),
    Endpoint("POST", "/tokenize", tokenize, "Text or messages to tokens", TokenizeRequest, TokenizeReply),
    Endpoint("POST", "/detokenize", detokenize, "Tokens to text", DetokenizeRequest, DetokenizeReply),
    Endpoint("GET", "/health", health, "Whether the server serves", reply=HealthReply, public=True),
    Endpoint("GET", "/metrics", metrics, "Prometheus metrics", media_type="text/plain"),
    Endpoint("GET", "/state", state, "Live numbers", reply=StateReply),
    Endpoint("GET", "/", page, "Chat page", public=True, media_type="text/html"),
    Endpoint("GET", "/docs", docs, "Documentation", public=True, media_type="text/html"),
    Endpoint("GET", "/configure", configure, "Command configurator", public=True, media_type="text/html"),
    Endpoint("GET", "/verdicts.json", verdicts, "The planner's verdicts", public=True),
)
